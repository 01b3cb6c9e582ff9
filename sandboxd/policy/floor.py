"""``floor.yaml``: what no policy may exceed.

Limits are maxima, ``syscalls.deny`` is added to every policy and ``network.deny`` to every one with rules,
and a policy may have a network only where the floor has one. A policy is compared after it has inherited, so
no parent hides anything; a request is narrowed against the policy, which is under the floor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sandboxd import units
from sandboxd.policy import paths
from sandboxd.policy.checks import RAISES, check_network, check_syscalls
from sandboxd.policy.diagnosis import validate
from sandboxd.policy.resolved import Places
from sandboxd.policy.retry import OWN_CAUSES
from sandboxd.policy.schema import FloorFile, Limits
from sandboxd.policy.source import Entry, MappingNode, Origin, SequenceNode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.models import PolicyProblem
    from sandboxd.policy.network import Network
    from sandboxd.policy.schema import PolicyFile

__all__ = ["FORMATS", "Floor", "make_floor"]

FORMATS: dict[str, Callable[[int], str]] = {
    "wall": units.format_duration,
    "cpu_time": units.format_duration,
    "cpus": units.format_cpus,
    "memory": units.format_size,
    "pids": units.format_count,
    "open_files": units.format_count,
    "file_size": units.format_size,
    "workspace.size": units.format_size,
    "workspace.inodes": units.format_count,
    "tmp.size": units.format_size,
    "tmp.inodes": units.format_count,
    "stdout.size": units.format_size,
    "stderr.size": units.format_size,
    "io.read": units.format_size,
    "io.write": units.format_size,
}
"""Every numeric limit by its path under ``limits``, and how a person reads it."""
_STRENGTH = {"slot": 0, "engine": 1, "none": 2}
_INJECTED = {"none": 0, "tls": 1, "plain": 2}
_KEPT = {"never": 0, "success": 1, "exited": 2, "always": 3}


def limit(limits: Limits, path: str) -> int | None:
    """The value of a limit by its path, such as ``workspace.size``."""
    value: Any = limits
    for step in path.split("."):
        value = getattr(value, step)
    return None if value is None else int(value)


def _written(limits: Limits, path: str) -> bool:
    """Whether somebody wrote this limit; a default of the schema is no floor."""
    section: Any = limits
    *sections, last = path.split(".")
    for step in sections:
        section = getattr(section, step)
    return last in section.model_fields_set


@dataclass(frozen=True)
class Floor:
    """One floor file, read and valid."""

    file: str
    spec: FloorFile
    tree: MappingNode

    def apply(self, tree: MappingNode) -> MappingNode:
        """A policy's tree with the system calls and targets that the floor denies denied there too."""
        tree = self._deny(tree, "syscalls")
        network = tree.get("network")
        if isinstance(network, MappingNode) and isinstance(network.get("allow"), SequenceNode):
            tree = self._deny(tree, "network")
        return tree

    def _deny(self, tree: MappingNode, section: str) -> MappingNode:
        """A policy's tree with what a section of the floor denies denied in its own."""
        denied = self.tree.get(section)
        items = denied.get("deny") if isinstance(denied, MappingNode) else None
        if not isinstance(items, SequenceNode) or not items.items:
            return tree
        found = tree.entries.get(section, Entry(items.at, MappingNode(items.at)))
        own = found.node
        if not isinstance(own, MappingNode):
            return tree  # the schema says what is wrong with it
        deny = own.entries.get("deny", Entry(items.at, SequenceNode((), items.at)))
        if not isinstance(deny.node, SequenceNode):
            return tree
        had = [item.plain() for item in deny.node.items]
        more = tuple(item for item in items.items if item.plain() not in had)
        merged = Entry(deny.at, SequenceNode(deny.node.items + more, deny.node.at))
        whole = Entry(found.at, MappingNode(own.at, {**own.entries, "deny": merged}))
        return MappingNode(tree.at, {**tree.entries, section: whole})

    def origin(self, path: str) -> Origin:
        """Where the floor sets a value."""
        return Places(self.file, self.tree).origin(path)

    def exceeded(self, spec: PolicyFile, places: Places) -> Iterator[PolicyProblem]:
        """A problem for everything in which a resolved policy is surely wider than this floor."""

        def wider(path: str, has: str, may: str, floor_path: str | None = None) -> PolicyProblem:
            origin = self.origin(floor_path or path)
            said = f"{path}: {has} is wider than the floor's {may} ({origin})"
            return places.problem(path, "wider_than_floor", said)

        for path, value, ceiling in self._limits(spec):
            if (value is None or value > ceiling) and places.sure(f"limits.{path}"):
                show = FORMATS[path]
                yield wider(f"limits.{path}", "no limit" if value is None else show(value), show(ceiling))
        yield from self._wider_raises(spec, places, wider)
        yield from self._wider_choices(spec, places, wider)
        for number, mount in enumerate(spec.mounts):
            allowed = self.spec.mounts
            if allowed is not None and not any(paths.within(mount.source, top) for top in allowed):
                may = "mounts beneath " + ", ".join(allowed) if allowed else "none"
                yield wider(f"mounts.{number}", mount.source, may, "mounts")
        for number, artifact in enumerate(spec.artifacts):
            path = f"artifacts.{number}.secrets"
            allows = artifact.secrets == "allow" and self.spec.artifacts.secrets == "deny"
            if allows and places.sure(path):
                yield wider(path, "allow", "deny", "artifacts.secrets")
        yield from self._wider_secrets(spec, places, wider)
        yield from self._wider_network(spec.network, places, wider)
        yield from self._wider_injections(spec.network, places, wider)
        yield from self._wider_ports(spec.expose, places, wider)

    def _wider_choices(
        self, spec: PolicyFile, places: Places, wider: Callable[..., PolicyProblem]
    ) -> Iterator[PolicyProblem]:
        """Values that are one of several, in an order."""
        weakest = self.spec.process.user_namespace
        weaker = _STRENGTH[spec.process.user_namespace] > _STRENGTH[weakest]
        if weaker and places.sure("process.user_namespace"):
            yield wider("process.user_namespace", spec.process.user_namespace, weakest)
        writable = spec.filesystem.root == "overlay" and self.spec.filesystem.root == "read-only"
        if writable and places.sure("filesystem.root"):
            yield wider("filesystem.root", "overlay", "read-only")
        if _KEPT[spec.commit] > _KEPT[self.spec.commit] and places.sure("commit"):
            yield wider("commit", spec.commit, self.spec.commit)
        if spec.isolation == "session" and self.spec.isolation == "call" and places.sure("isolation"):
            yield wider("isolation", "session", "call")

    def _wider_secrets(
        self, spec: PolicyFile, places: Places, wider: Callable[..., PolicyProblem]
    ) -> Iterator[PolicyProblem]:
        """Secrets that policies may not grant, or not in that way."""
        may = self.spec.secrets
        for number, secret in enumerate(spec.secrets):
            path = f"secrets.{number}"
            if not places.sure(path):
                continue
            if may.names is not None and secret.name not in may.names:
                yield wider(path, f"secret {secret.name}", ", ".join(may.names) or "none", "secrets.names")
            if may.as_ is not None and secret.as_ not in may.as_:
                has = f"secret {secret.name} as {secret.as_}"
                yield wider(f"{path}.as", has, ", ".join(may.as_) or "none", "secrets.as")

    def _wider_injections(
        self, network: Network | None, places: Places, wider: Callable[..., PolicyProblem]
    ) -> Iterator[PolicyProblem]:
        """Rules that put something into requests, or do so without TLS, where they may not."""
        may = self.spec.inject
        for number, rule in enumerate(() if network is None else network.allow):
            has = "none" if rule.inject is None else "plain" if rule.inject.plain else "tls"
            path = f"network.allow.{number}.inject"
            if _INJECTED[has] > _INJECTED[may] and places.sure(path):
                yield wider(f"{path}.plain" if has == "plain" else path, has, may, "inject")

    def _wider_raises(
        self, spec: PolicyFile, places: Places, wider: Callable[..., PolicyProblem]
    ) -> Iterator[PolicyProblem]:
        """Limits that a retry raises above those of the floor."""
        ceilings = {path: ceiling for path, _, ceiling in self._limits(spec)}
        for cause in OWN_CAUSES:
            own = None if spec.retry is None else spec.retry.of(cause)
            for name, (limited, show) in RAISES.items():
                value = None if own is None else getattr(own.raise_, name)
                path = f"retry.{cause}.raise.{name}"
                if value is not None and value > ceilings.get(limited, value) and places.sure(path):
                    yield wider(path, show(value), show(ceilings[limited]), f"limits.{limited}")

    def _wider_network(
        self, network: Network | None, places: Places, wider: Callable[..., PolicyProblem]
    ) -> Iterator[PolicyProblem]:
        most = self.spec.network
        if network is None or network.reaches_nothing or not places.sure("network"):
            return
        if most is None or most.reaches_nothing:
            yield wider("network", "a network", "none")
        elif most.mode == "host":
            return  # all that there is
        elif network.mode == "host":
            yield wider("network.mode", "host", most.mode, "network")
        else:
            yield from self._wider_rules(network, most, places, wider)

    def _wider_ports(
        self, ports: tuple[int, ...], places: Places, wider: Callable[..., PolicyProblem]
    ) -> Iterator[PolicyProblem]:
        allowed = self.spec.expose
        for number, port in enumerate(ports):
            path = f"expose.{number}"
            if allowed is not None and port not in allowed and places.sure(path):
                yield wider(path, f"port {port}", ", ".join(map(str, allowed)) or "none", "expose")

    def _wider_rules(
        self, network: Network, most: Network, places: Places, wider: Callable[..., PolicyProblem]
    ) -> Iterator[PolicyProblem]:
        """Rules that no rule of the floor covers whole, and budgets above those of the floor."""
        for number, rule in enumerate(network.allow):
            path = f"network.allow.{number}"
            if places.sure(path) and not any(other.covers(rule) for other in most.allow):
                yield wider(path, f"{rule.host or rule.cidr} at {list(rule.ports)}", "rules", "network.allow")
        limits = {} if network.budget is None else network.budget.limits()
        for name, ceiling in ({} if most.budget is None else most.budget.limits()).items():
            value = limits.get(name)
            if (value is None or value > ceiling) and places.sure("network.budget"):
                yield wider(f"network.budget.{name}", "none" if value is None else str(value), str(ceiling))

    def _limits(self, spec: PolicyFile) -> Iterator[tuple[str, int | None, int]]:
        """Every limit that the floor sets: its path, the policy's value, the floor's."""
        for path in FORMATS:
            ceiling = limit(self.spec.limits, path) if _written(self.spec.limits, path) else None
            if ceiling is not None:
                yield path, limit(spec.limits, path), ceiling


def make_floor(tree: MappingNode, file: str) -> tuple[Floor | None, list[PolicyProblem]]:
    """The floor of a tree, or what is wrong with it."""
    spec, problems = validate(FloorFile, tree)
    if spec is None:
        return None, problems
    floor = Floor(file, spec, tree)
    places = Places(file, tree)
    problems += check_syscalls((), spec.syscalls.deny, places)
    if spec.network is not None:
        problems += check_network(spec.network, places, host=True)  # as a bound, which gives nobody anything
    return (None if problems else floor), problems
