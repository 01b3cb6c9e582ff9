"""Search and pruning through a real daemon: who finds what, and what is left of a pruned call."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import until

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

SANDBOXD = Path(sys.executable).with_name("sandboxd")
AGENT = 54_321
CALLERS = (
    "callers:\n  - {match: {uid: 0}, role: operator}\n"
    f"  - {{match: {{uid: {AGENT}}}, role: agent, policies: [default]}}\n"
)


AS_AGENT = """
import os, sys
from pathlib import Path
from sandboxd import Client, errors
socket, uid, code = sys.argv[1:]
client = Client(Path(socket))
client.health()  # all that it imports is root's to read
os.setgroups([]); os.setgid(int(uid)); os.setuid(int(uid))
try:
    print(eval(code))
except errors.SandboxdError as error:
    print(error.code)
"""


def as_agent(daemon: Daemon, code: str) -> str:
    """What an expression on a client of the agent's gives, or the code of its error."""
    done = subprocess.run(
        [sys.executable, "-c", AS_AGENT, daemon.socket, str(AGENT), code],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def journal(daemon: Daemon, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SANDBOXD, "journal", *argv, "--socket", daemon.socket],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def found(daemon: Daemon, *argv: str) -> list[str]:
    done = journal(daemon, "search", *argv, "--json")
    assert done.returncode == 0, done.stderr
    return [hit["id"] for hit in json.loads(done.stdout)["hits"]]


def test_callers_find_their_own_calls_and_operators_all(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config=CALLERS)
    daemon.admit_everybody()
    mine = daemon.run("sh", "-c", "echo needle of root")
    theirs = as_agent(daemon, "client.run(['echo', 'needle']).id")
    until(lambda: len(found(daemon, "needle")) == 2, "both calls are in the index")
    assert found(daemon, "needle") == [theirs, mine.id]
    assert found(daemon, "--uid", str(AGENT)) == [theirs]
    assert found(daemon, "--since", "1h", "--cause", "exited") == [theirs, mine.id]
    assert found(daemon, "--until", "1h") == found(daemon, "--cause", "memory") == []
    for words in ("'needle'", "''", "'root OR needle'", f"'', uid={AGENT}"):
        assert as_agent(daemon, f"[hit.id for hit in client.search({words}).hits]") == f"['{theirs}']"
    assert as_agent(daemon, "client.search('', uid=0)") == "not_permitted"
    assert as_agent(daemon, "client.search('needle) OR (root')") == "invalid_request"
    assert as_agent(daemon, "client.prune(age=1)") == "not_permitted"
    done = journal(daemon, "search", "a-b")
    assert (done.returncode, "double quotes" in done.stderr) == (1, True)
    shown = subprocess.run(
        [SANDBOXD, "journal", "show", mine.id, "--state", daemon.state, "--json"],
        capture_output=True,
        check=True,
    ).stdout
    assert json.loads(shown)["header"]["id"] == mine.id


def test_a_pruned_call_says_so(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory()
    client = daemon.client()
    call = daemon.run("sh", "-c", "echo out > a.txt; echo shown", policy="files", key="k")
    assert [artifact.path for artifact in call.artifacts] == ["a.txt"]
    assert call.outcome is not None
    before = time.time_ns() // 1000
    assert journal(daemon, "prune", "--age", "0s").stdout.startswith("1 calls were pruned")
    kept = client.get(call.id)
    assert kept.pruned is not None
    assert kept.pruned >= before
    assert (kept.outcome, kept.artifacts, kept.argv) == (call.outcome, [], [])
    assert kept.stdout is not None
    assert call.stdout is not None
    assert (kept.stdout.digest, kept.stdout.text) == (call.stdout.digest, "")
    assert client.run(["sh", "-c", "echo out > a.txt; echo shown"], policy="files", key="k").id == call.id
    with pytest.raises(errors.KeyConflict):
        client.run(["true"], key="k")
    for ask in (
        lambda: list(client.events(call.id)),
        lambda: b"".join(client.stdout(call.id)),
        lambda: b"".join(client.artifact(call.id, "a.txt")),
    ):
        with pytest.raises(errors.Pruned) as caught:
            ask()
        assert caught.value.details["pruned"] == kept.pruned
    assert not (daemon.state / "calls" / call.id).exists()
    daemon.stop()
    done = subprocess.run(
        [SANDBOXD, "journal", "verify", "--deep", "--state", daemon.state], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def ask(daemon: Daemon, target: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """A request as curl would make it."""
    with contextlib.closing(UnixConnection(daemon.socket)) as connection:
        connection.request(
            "GET", target, headers={name.replace("_", "-"): text for name, text in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, answer.read(), {name.lower(): text for name, text in answer.getheaders()}


class UnixConnection(http.client.HTTPConnection):
    """http.client over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("sandboxd", timeout=20)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(os.fspath(self.path))


def test_artifacts_by_digest_in_ranges_and_with_their_lineage(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config=CALLERS.replace("[default]", "[files]"))
    daemon.admit_everybody()
    data = bytes(range(256)) * 2000
    make = ["sh", "-c", "cat > a; cp a b"]
    call = daemon.run(*make, policy="files", stdin=data)
    again = daemon.run(*make, policy="files", stdin=data)
    digest = call.artifacts[0].digest
    lineage = daemon.client().lineage(digest)
    assert (lineage.size, [one.id for one in lineage.calls]) == (len(data), [again.id, call.id])
    assert lineage.calls[1].paths == ["a", "b"]
    assert lineage.calls[1].policy == call.policy
    assert as_agent(daemon, f"client.lineage({digest!r})") == "not_found"
    assert daemon.client().run(["true"], policy="files").outcome is not None
    by_digest, by_path = f"/v1/artifacts/{digest}", f"/v1/invocations/{call.id}/artifacts/a"
    etag, size = f'"{digest}"', len(data)
    for target in (by_digest, by_path):
        assert ask(daemon, target)[:2] == (200, data)
        for text, start, end in (
            ("bytes=0-0", 0, 1), ("bytes=5-9", 5, 10), ("bytes=500000-", 500_000, size),
            ("bytes=-7", size - 7, size), ("bytes=10-99999999", 10, size), ("bytes=-99999999", 0, size),
            ("BYTES=1-2", 1, 3),
        ):  # fmt: skip
            status, body, headers = ask(daemon, target, Range=text)
            assert (status, body) == (206, data[start:end]), text
            assert headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
            assert headers["content-length"] == str(end - start)
            assert headers["etag"] == etag
        for text in (
            "bytes=5-4",
            "bytes=0-1,3-4",
            "lines=0-1",
            "bytes=-",
            "bytes=a-b",
            "nonsense",
            "bytes=" + "9" * 90,
        ):
            assert ask(daemon, target, Range=text)[:2] == (200, data), text
        for text in (f"bytes={size}-", "bytes=-0", "bytes=99999999-"):
            status, body, headers = ask(daemon, target, Range=text)
            assert (status, headers["content-range"]) == (416, f"bytes */{size}"), text
            assert json.loads(body)["code"] == "range_not_satisfiable"
        assert ask(daemon, target, If_None_Match=f'"other", W/{etag}')[:2] == (304, b"")
        assert ask(daemon, target, If_None_Match='"other"', Range="bytes=5-9")[:2] == (206, data[5:10])
        assert ask(daemon, target, If_Match=etag, Range="bytes=5-9")[:2] == (206, data[5:10])
        status, body, _ = ask(daemon, target, If_Match='"other"')
        assert (status, json.loads(body)["details"]) == (412, {"digest": digest})
        assert ask(daemon, target, Range="bytes=0-0", If_Range=etag)[0] == 206
        assert ask(daemon, target, Range="bytes=0-0", If_Range='"other"')[0] == 200
        assert ask(daemon, target, Range="bytes=0-0", If_Range="W/" + etag)[0] == 200
        assert ask(daemon, target, Range="bytes=0-0", If_Range="Sat, 28 Nov 2026 00:00:00 GMT")[0] == 200
    bare = digest.removeprefix("sha256:")
    (daemon.state / "blobs" / "sha256" / bare[:2] / bare).unlink()
    status, body, _ = ask(daemon, by_digest)
    assert (status, json.loads(body)["code"]) == (500, "journal_corrupt")
    assert daemon.client().lineage(digest) == lineage
    for wrong in ("sha256:" + "0" * 64, "sha256:zz", "..%2f..%2fetc", "sha256:" + "A" * 64):
        assert ask(daemon, f"/v1/artifacts/{wrong}")[0] in {400, 404}


def test_streams_in_ranges(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory()
    client = daemon.client()
    call = daemon.run("sh", "-c", "seq 1 20000")
    whole = b"".join(client.stdout(call.id))
    target = f"/v1/invocations/{call.id}/stdout"
    status, body, headers = ask(daemon, target, Range="bytes=100-70000")
    assert (status, body) == (206, whole[100:70001])
    assert call.stdout is not None
    etag = headers["etag"]
    assert etag == f'"{call.stdout.digest}"'
    assert ask(daemon, target, If_None_Match=etag)[0] == 304
    assert ask(daemon, target, If_Match=etag)[:2] == (200, whole)
    assert ask(daemon, target, If_Match='"other"')[0] == 412
    assert ask(daemon, target, Range="bytes=-5")[1] == whole[-5:]
    assert ask(daemon, target, Range=f"bytes={len(whole)}-")[0] == 416
    assert ask(daemon, target + "?offset=10", Range="bytes=0-0")[:2] == (200, whole[10:])
    assert ask(daemon, f"/v1/invocations/{call.id}/stderr", Range="bytes=0-0")[0] == 416
    running = client.start(["sh", "-c", "echo 0123456789; exec sleep 100"])
    until(lambda: (client.get(running.id).stdout or call.stdout).size == 11, "it has written")  # type: ignore[union-attr]
    status, body, headers = ask(daemon, f"/v1/invocations/{running.id}/stdout", Range="bytes=2-4")
    assert (status, body, "etag" in headers) == (206, b"234", False)
    running_target = f"/v1/invocations/{running.id}/stdout"
    assert ask(daemon, running_target, If_None_Match=etag)[:2] == (200, b"0123456789\n")
    assert ask(daemon, running_target, If_Match=etag)[0] == 412
    client.cancel(running.id)


def test_an_agent_replays_its_own_calls_under_policies_of_now(daemon_factory: Callable[..., Daemon]) -> None:
    """No call of others, and no policy that was taken away: neither by its old form nor by its name."""
    daemon = daemon_factory(config=CALLERS.replace("[default]", "[mine, default]"))
    daemon.admit_everybody()
    file = daemon.policies / "mine.yaml"
    file.write_text("version: 1\nname: mine\nextends: default\nlimits: {wall: 20s}\n")
    until(lambda: "mine" in {one.name for one in daemon.client().policies()}, "the policy is in force")
    time.sleep(1)  # it is kept
    theirs = as_agent(daemon, "client.run(['true'], policy='mine').id")
    mine = daemon.run("true")
    assert as_agent(daemon, f"client.replay({theirs!r}).differs") == "[]"
    assert as_agent(daemon, f"client.replay({mine.id!r})") == "not_found"
    assert as_agent(daemon, f"client.replay({theirs!r}, policy='files')") == "not_permitted"
    wide = daemon.client().policy("mine").digest
    file.write_text("version: 1\nname: mine\nextends: default\nlimits: {wall: 10s}\n")
    until(lambda: daemon.client().policy("mine").digest != wide, "the edit is in force")
    assert as_agent(daemon, f"client.replay({theirs!r})") == "not_permitted"
    narrow = as_agent(daemon, f"[one.what for one in client.replay({theirs!r}, policy='mine').differs]")
    assert narrow == "['policy', 'plan']"
    assert daemon.client().replay(theirs).differs == []


def test_a_session_is_exported_and_verifies_elsewhere(
    daemon_factory: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = daemon_factory()
    client = daemon.client()
    session = client.create_session(name="work")
    calls = [
        client.run(["sh", "-c", f"echo {n} >> log; cat log"], session="work", policy="files")
        for n in range(3)
    ]
    daemon.run("echo", "of nobody's concern")
    bundle, key = tmp_path / "evidence.tar", tmp_path / "node.pem"
    state = ["--state", str(daemon.state)]
    key.write_bytes(
        subprocess.run([str(SANDBOXD), "journal", "key", *state], capture_output=True, check=True).stdout
    )
    for named in (session.id, "work"):
        command = [
            str(SANDBOXD),
            "journal",
            "export",
            "--session",
            named,
            "-o",
            str(bundle),
            *state,
            "--json",
        ]
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["calls"] == 3
    daemon.stop()
    check = [str(SANDBOXD), "journal", "verify", "--bundle", str(bundle), "--key", str(key), "--json"]
    report = json.loads(subprocess.run(check, capture_output=True, check=True, cwd="/").stdout)
    assert (report["ok"], report["calls"], report["absent"]) == (True, 3, [])  # the policy is in it too
    data = bundle.read_bytes()
    at = data.index(b"0\n1\n2\n")
    bundle.write_bytes(data[:at] + b"0\n1\n3\n" + data[at + 6 :])
    done = subprocess.run(check, capture_output=True, check=False)
    assert done.returncode == 1
    assert calls[2].id in done.stdout.decode()
    done = subprocess.run(check[:-1], capture_output=True, check=False)
    assert b"was changed" in done.stderr
