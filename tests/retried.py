"""What tests of calls that are tried again share: their policies, and what is waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from daemons import until

if TYPE_CHECKING:
    from daemons import Daemon

    from sandboxd import Client
    from sandboxd.models import Invocation

NETWORK = "network: {allow: [{host: a.example, ports: [443]}]}\n"
EATER = "x=$(head -c 100M /dev/zero | tr '\\0' a); echo ${#x}"


def policy(daemon: Daemon, name: str, text: str) -> str:
    (daemon.policies / f"{name}.yaml").write_text(f"version: 1\nname: {name}\nextends: default\n{text}")
    until(lambda: name in [each.name for each in daemon.client().policies()], "the policy is loaded")
    return name


def cause(found: Invocation) -> str:
    assert found.outcome is not None
    return found.outcome.cause


def began(client: Client, id_: str, attempt: int = 1) -> None:
    until(lambda: (found := client.get(id_)).state == "running" and found.attempts == attempt, "it runs")


def written(client: Client, id_: str, size: int) -> bool:
    stdout = client.get(id_).stdout
    return stdout is not None and stdout.size == size
