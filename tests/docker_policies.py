"""Policies for a Docker Engine: as the others, but for the user namespace, which it does not give."""

from __future__ import annotations

from typing import TYPE_CHECKING

from daemons import until

if TYPE_CHECKING:
    from daemons import Daemon

POLICIES = {
    name: f"version: 1\nname: {name}\nextends: {parent}\nprocess: {{user_namespace: none}}\n"
    for name, parent in (("plain", "default"), ("py", "python"), ("small", "tiny\nimage: host"))
}
"""``small`` has nothing to import into an engine."""


def add_policies(daemon: Daemon, **more: str) -> None:
    """Policies for this engine; ``more`` by name, without their first two lines."""
    texts = {**POLICIES, **{name: f"version: 1\nname: {name}\n{text}" for name, text in more.items()}}
    client = daemon.client()
    before = {one.name: one.digest for one in client.policies()}
    changed = set()
    for name, text in texts.items():
        path = daemon.policies / f"{name}.yaml"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            changed.add(name)

    def in_force() -> bool:
        found = {one.name: one.digest for one in client.policies()}
        return all(found.get(name) not in {None, before.get(name)} for name in changed)

    until(in_force, f"the policies are in force: {client.health().problems}")
