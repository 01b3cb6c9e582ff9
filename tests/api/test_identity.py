"""Who gets in: real peers with other uids and groups, as the kernel tells them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

from sandboxd.api.identity import Caller, Identity, Peer, peer_of
from sandboxd.config import CallerRule, Match

ASK = """
import json, os, socket, sys
uid, gid, groups, path, target = json.loads(sys.argv[1])
os.setgroups(groups); os.setgid(gid); os.setuid(uid)
sock = socket.socket(socket.AF_UNIX); sock.settimeout(10); sock.connect(path)
sock.sendall(f"GET {target} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n".encode())
answer = b""
while part := sock.recv(65536): answer += part
print(answer.partition(b"\\r\\n\\r\\n")[2].decode())
"""
AGENT_UID, AGENT_GID = 54_321, 54_322


def ask_as(server: Any, uid: int, gid: int, groups: list[int], target: str = "/v1/health") -> Any:
    given = json.dumps([uid, gid, groups, server.path, target])
    done = subprocess.run([sys.executable, "-c", ASK, given], capture_output=True, check=True, timeout=30)
    return json.loads(done.stdout)


def test_a_peer_that_matches_nothing_is_refused_and_recorded(server: Any) -> None:
    found = ask_as(server, 12_345, 12_345, [12_346])
    assert (found["status"], found["code"]) == (401, "not_identified")
    caller, code, _ = server.service.refusals[-1]
    assert (caller.uid, caller.role, code) == (12_345, "none", "not_identified")
    assert caller.groups == {12_345, 12_346}
    assert ask_as(server, 12_345, 12_345, [], "/openapi.json")["code"] == "not_identified"


def test_a_supplementary_group_and_a_primary_one_let_in(server: Any) -> None:
    assert ask_as(server, AGENT_UID, 1, [2, AGENT_GID])["status"] == "ready"
    assert ask_as(server, AGENT_UID, AGENT_GID, [])["status"] == "ready"


def test_a_caller_sees_only_its_own_calls_and_an_operator_all(server: Any) -> None:
    server.ask("POST", "/v1/invocations", {"argv": ["true"]})
    assert ask_as(server, AGENT_UID, AGENT_GID, [], "/v1/invocations")["invocations"] == []
    assert ask_as(server, AGENT_UID, AGENT_GID, [], "/v1/invocations/call-0")["code"] == "not_found"
    assert len(server.ask("GET", "/v1/invocations")[1]["invocations"]) == 1


def test_more_groups_than_python_s_getsockopt_has_room_for(server: Any) -> None:
    assert ask_as(server, AGENT_UID, 1, [*range(100_000, 101_000), AGENT_GID])["status"] == "ready"


def test_the_peer_of_a_socket() -> None:
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        peer = peer_of(left)
    assert (peer.uid, peer.gid, peer.pid) == (os.getuid(), os.getgid(), os.getpid())
    assert peer.groups == set(os.getgroups()) | {os.getgid()}


def test_the_first_rule_whose_keys_all_hold_decides() -> None:
    identity = Identity(
        (
            CallerRule(match=Match(uid=5, gid=7), role="operator"),
            CallerRule(match=Match(user="root"), role="operator", policies=("a",)),
            CallerRule(match=Match(group="no-such-group-here"), role="operator"),
            CallerRule(match=Match(group="root"), role="agent", policies=("b",), concurrent=2, weight=3),
            CallerRule(match=Match(uid=5), role="agent"),
        )
    )

    def role(uid: int, *groups: int) -> Caller:
        return identity.caller(Peer(uid, groups[0], frozenset(groups)))

    assert role(5, 7).role == "operator"
    assert role(5, 8).role == "agent"
    assert role(0, 9).policies == ("a",)
    found = role(6, 9, 0)
    assert (found.role, found.policies, found.concurrent, found.weight) == ("agent", ("b",), 2, 3)
    assert found.may_use("b")
    assert not found.may_use("a")
    assert role(6, 9).role == "none"
    assert not role(6, 9).may_use("a")


def test_only_operators_see_what_the_daemon_holds_for_all(server: Any) -> None:
    assert ask_as(server, AGENT_UID, AGENT_GID, [], "/v1/slots")["code"] == "not_permitted"
    assert ask_as(server, AGENT_UID, AGENT_GID, [], "/metrics")["code"] == "not_permitted"
