"""What a policy that is well formed can still not say: combinations that make no sense, names of
system calls that do not exist, and controls that this release does not enforce.

Nothing here is enforced half: a policy that declares a control which is not in force is refused at
the line that declares it.
"""

from __future__ import annotations

from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING

from sandboxd import units
from sandboxd.policy import paths
from sandboxd.policy.fixed import DEFAULT_ENV
from sandboxd.policy.retry import OWN_CAUSES
from sandboxd.policy.source import MAX_PROBLEMS
from sandboxd.reach import DNS_PORT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sandboxd.models import PolicyProblem
    from sandboxd.policy.network import Denied, Network, Rule
    from sandboxd.policy.resolved import Places
    from sandboxd.policy.schema import PolicyFile

__all__ = ["UNSUPPORTED", "check", "check_network", "check_syscalls"]

IMPOSSIBLE = "impossible"
UNSUPPORTED = "control_not_supported"
MAX_NAME = 256  # characters of what claims to be the name of a system call


def check(spec: PolicyFile, places: Places, *, host_network: bool) -> dict[str, list[PolicyProblem]]:
    """Every problem of a resolved policy but those of its examples and of the floor, by section.

    What depends on a doubtful value is not judged. ``host_network``: whether the daemon's configuration lets
    policies have the host's.
    """
    syscalls = check_syscalls(spec.syscalls.allow, spec.syscalls.deny, places)
    return {
        "limits": [*_sizes(spec, places), *_streams(spec, places)],
        "process": [*_process(spec, places)],
        "mounts": [*_mounts(spec, places)],
        "network": [*_network(spec, places, host=host_network)],
        "secrets": [*_secrets(spec, places)],
        "syscalls": [*_contradicted(spec, places), *syscalls],
        "others": [*_repeated(spec, places), *_retry(spec, places), *_shared(spec, places)],
    }


def _sizes(spec: PolicyFile, places: Places) -> Iterator[PolicyProblem]:
    limits, root = spec.limits, spec.filesystem
    for key in ("size", "inodes"):
        path = f"filesystem.{key}"
        if root.root == "read-only" and places.tree.find(path) and places.sure("filesystem.root"):
            yield places.problem(path, IMPOSSIBLE, f"{path} needs root: overlay")
    if not places.sure("limits.memory", "limits.workspace.size", "limits.tmp.size", "filesystem"):
        return
    parts = {"limits.workspace.size": limits.workspace.size, "limits.tmp.size": limits.tmp.size}
    if root.root == "overlay":
        parts["filesystem.size"] = root.size
    total = sum(parts.values())
    if total > limits.memory:
        summed = " + ".join(f"{path} {units.format_size(size)}" for path, size in parts.items())
        written = [path for path in ("limits.memory", *parts) if places.is_own(path)]
        yield places.problem(
            written[0] if written else "limits",
            IMPOSSIBLE,
            f"{summed} = {units.format_size(total)} is more than limits.memory "
            f"{units.format_size(limits.memory)}: pages of a tmpfs count against memory",
        )


def _streams(spec: PolicyFile, places: Places) -> Iterator[PolicyProblem]:
    out, err = spec.limits.stdout.on_limit, spec.limits.stderr.on_limit
    if out and err and out != err and places.sure("limits.stdout", "limits.stderr"):
        said = f"stdout has on_limit: {out} and stderr {err}; this release enforces one for both"
        yield places.problem("limits.stderr.on_limit", UNSUPPORTED, said)


def _process(spec: PolicyFile, places: Places) -> Iterator[PolicyProblem]:
    process = spec.process
    if process.user_namespace == "none" and places.sure("process"):
        for key, number in (("user", process.user), ("group", process.group)):
            if number == 0:
                said = f"{key} 0 with user_namespace: none is the host's own root"
                yield places.problem(f"process.{key}", IMPOSSIBLE, said)


def _mounts(spec: PolicyFile, places: Places) -> Iterator[PolicyProblem]:
    for number, mount in enumerate(spec.mounts):
        for before, other in enumerate(spec.mounts[:number]):
            over = paths.within(mount.target, other.target) or paths.within(other.target, mount.target)
            if over and places.stand("mounts", f"mounts.{number}", f"mounts.{before}"):
                said = f"{mount.target!r} and {other.target!r} lie over each other"
                yield places.problem(f"mounts.{number}", IMPOSSIBLE, said)
        if mount.mode == "read-write":
            said = "mode: read-write is not enforced by this release"
            yield places.problem(f"mounts.{number}.mode", UNSUPPORTED, said)


def _network(spec: PolicyFile, places: Places, *, host: bool) -> Iterator[PolicyProblem]:
    network = spec.network
    if network is None or not places.sure("network"):
        return
    yield from check_network(network, places, host=host)
    if network.mode == "host" and spec.expose and places.sure("expose"):
        said = "with network.mode: host the servers inside are on the host's own loopback; leave expose out"
        yield places.problem("expose", IMPOSSIBLE, said)
    strict = spec.syscalls.base == "strict" and "@network-client" not in spec.syscalls.allow
    if not network.reaches_nothing and strict and places.sure("syscalls"):
        said = "a network needs internet sockets: let syscalls allow '@network-client', or take base: default"
        yield places.problem("network", IMPOSSIBLE, said)
    proxied = {secret.name for secret in spec.secrets if secret.as_ == "proxy"}
    for number, rule in enumerate(network.allow):
        for name in rule.inject.secrets() if rule.inject else ():
            if name not in proxied and places.sure("secrets"):
                said = f"the secret {name} is not listed under secrets with as: proxy"
                yield places.problem(f"network.allow.{number}.inject", IMPOSSIBLE, said)


def _secrets(spec: PolicyFile, places: Places) -> Iterator[PolicyProblem]:
    """Secrets that something else of the policy is in the way of."""
    taken = {**DEFAULT_ENV, **spec.process.env}
    for number, secret in enumerate(spec.secrets):
        path = f"secrets.{number}"
        if secret.as_ == "env" and secret.name in taken and places.stand("secrets", path):
            said = f"{secret.name} is a variable already, by process.env or by default: grant it `as: file`"
            yield places.problem(path, IMPOSSIBLE, said)
        if secret.placeholder is not None and secret.as_ != "proxy":
            said = f"a placeholder is for a secret that is granted as: proxy; this one is as: {secret.as_}"
            yield places.problem(f"{path}.placeholder", IMPOSSIBLE, said)
        if secret.placeholder is not None and secret.name in taken and places.stand("secrets", path):
            said = f"{secret.name} is a variable already, by process.env or by default"
            yield places.problem(path, IMPOSSIBLE, said)
    if not any(secret.as_ == "file" for secret in spec.secrets) or not places.sure("secrets"):
        return
    for number, mount in enumerate(spec.mounts):
        over = paths.within(mount.target, paths.SECRETS) or paths.within(paths.SECRETS, mount.target)
        if over and places.stand("mounts", f"mounts.{number}"):
            said = f"{mount.target!r} and {paths.SECRETS}, where secrets are as files, lie over each other"
            yield places.problem(f"mounts.{number}", IMPOSSIBLE, said)


def check_network(network: Network, places: Places, *, host: bool) -> Iterator[PolicyProblem]:
    """What a network section says that makes no sense, or that is not enforced; ``host`` allows mode host."""
    if network.mode == "host" and not host:
        said = (
            "mode: host gives the tool the host's own network; the daemon's configuration does not allow it, "
            "by its key `network: {host: true}`"
        )
        yield places.problem("network.mode", UNSUPPORTED, said)
    if network.mode != "rules" and (network.allow or network.deny or network.budget):
        said = f"mode: {network.mode} leaves nothing for allow, deny and budget"
        yield places.problem("network.mode", IMPOSSIBLE, said)
    yield from _of_http(network, places)
    yield from _twice(network, places)
    for number, rule in enumerate(network.allow):
        if rule.within and rule.cidr is not None:
            said = "within says where a name may lead: write host, or leave it out"
            yield places.problem(f"network.allow.{number}.within", IMPOSSIBLE, said)
        if DNS_PORT in rule.ports:
            said = f"port {DNS_PORT} of every address is that of the container's own resolver; leave it out"
            yield places.problem(f"network.allow.{number}.ports", IMPOSSIBLE, said)
        for at, deny in enumerate(network.deny):
            whole = not deny.looks_inside and not set(rule.ports) - set(deny.ports or rule.ports)
            if whole and deny.covers_target(rule):
                said = f"{rule.host or rule.cidr} is denied whole at {places.origin(f'network.deny.{at}')}"
                yield places.problem(f"network.allow.{number}", IMPOSSIBLE, said)


def _twice(network: Network, places: Places) -> Iterator[PolicyProblem]:
    """Rules of the file itself that say what another one says already."""
    said: dict[str, dict[int, str]] = {}
    for number, rule in enumerate(network.allow):
        path = f"network.allow.{number}"
        if not places.is_own(path):
            continue
        rest = rule.model_dump_json(exclude={"ports"})
        ports = said.setdefault(rest, {})
        for port in rule.ports:
            if port in ports:
                where = places.origin(ports[port])
                problem = f"port {port} of {rule.host or rule.cidr} is allowed in the same words at {where}"
                yield places.problem(path, IMPOSSIBLE, problem)
                break
            ports[port] = path


def _of_http(network: Network, places: Places) -> Iterator[PolicyProblem]:
    listed: dict[str, tuple[Rule | Denied, ...]] = {"allow": network.allow, "deny": network.deny}
    inside = [
        (f"network.{kind}.{number}", rule)
        for kind, rules in listed.items()
        for number, rule in enumerate(rules)
        if rule.looks_inside
    ]
    for path, rule in inside:
        if rule.cidr is not None:
            said = "HTTP is looked into by the name of its host: write host, or leave out what is of HTTP"
            yield places.problem(path, IMPOSSIBLE, said)
    limits = {} if network.budget is None else network.budget.limits()
    for name in ("requests", "session.requests"):
        if name in limits and not inside:
            said = (
                "requests are counted only where a rule looks into HTTP, as with methods or paths; none does"
            )
            yield places.problem(f"network.budget.{name}", IMPOSSIBLE, said)


def _repeated(spec: PolicyFile, places: Places) -> Iterator[PolicyProblem]:
    names: dict[str, list[str]] = {
        "secrets": [secret.name for secret in spec.secrets],
        "artifacts": [artifact.path for artifact in spec.artifacts],
        "expose": [str(port) for port in spec.expose],
    }
    exited, signalled = (None, None) if spec.retry is None else (spec.retry.exited, spec.retry.signalled)
    if exited is not None:
        names["retry.exited.codes"] = [str(code) for code in exited.codes]
    if signalled is not None:
        names["retry.signalled.signals"] = list(signalled.signals or ())
    for section, listed in names.items():
        for number, name in enumerate(listed):
            items = (f"{section}.{number}", f"{section}.{listed.index(name)}")
            if name in listed[:number] and places.stand(section, *items):
                said = f"{name} is listed before; `!remove` an inherited item to replace it"
                yield places.problem(f"{section}.{number}", IMPOSSIBLE, said)


def _contradicted(spec: PolicyFile, places: Places) -> Iterator[PolicyProblem]:
    for number, name in enumerate(spec.syscalls.allow):
        if name not in spec.syscalls.deny:
            continue
        allowed, denied = f"syscalls.allow.{number}", f"syscalls.deny.{spec.syscalls.deny.index(name)}"
        if places.stand("syscalls", allowed, denied):
            said = f"{name} is allowed here and denied at {places.origin(denied)}; deny wins"
            yield places.problem(allowed, IMPOSSIBLE, said)


def _retry(spec: PolicyFile, places: Places) -> Iterator[PolicyProblem]:
    """Raises that raise nothing, and retries that there will never be."""
    retry = spec.retry
    if retry is None:
        return
    reaches = spec.network is not None and not spec.network.reaches_nothing
    for cause in OWN_CAUSES:
        own = retry.of(cause)
        if own is None:
            continue
        if reaches and not retry.safe and places.sure("network", "retry"):
            said = (
                f"a call with a network that ended by {cause} has run, and is run again only with safe: "
                "true, which says that this does no harm"
            )
            yield places.problem(f"retry.{cause}", IMPOSSIBLE, said)
        for name, (path, show) in RAISES.items():
            value, limit = getattr(own.raise_, name), attrgetter(path)(spec.limits)
            if value is None or not places.sure(f"limits.{path}", "retry"):
                continue
            if limit is None or value <= limit:
                has = "there is no such limit" if limit is None else f"the limit is {show(limit)} already"
                said = f"raise: {name} {show(value)} raises nothing: {has}"
                yield places.problem(f"retry.{cause}.raise.{name}", IMPOSSIBLE, said)
    kills = "kill" in {spec.limits.stdout.on_limit, spec.limits.stderr.on_limit}
    if retry.output is not None and not kills and places.sure("limits.stdout", "limits.stderr", "retry"):
        said = "output beyond a limit ends no call here, it is cut: write on_limit: kill, or leave this out"
        yield places.problem("retry.output", IMPOSSIBLE, said)


RAISES: dict[str, tuple[str, Callable[[int], str]]] = {
    "memory": ("memory", units.format_size),
    "wall": ("wall", units.format_duration),
    "cpu_time": ("cpu_time", units.format_duration),
    "stdout": ("stdout.size", units.format_size),
    "stderr": ("stderr.size", units.format_size),
}
"""Limits that a retry may raise: the path of each under ``limits``, and how a person reads it."""


def _shared(spec: PolicyFile, places: Places) -> Iterator[PolicyProblem]:
    """What a call cannot have for itself in a container that others were in before."""
    if spec.isolation != "session":
        return
    for number, secret in enumerate(spec.secrets):
        if secret.as_ != "proxy":
            said = (
                f"`as: {secret.as_}` gives it to the container, and with `isolation: session` what earlier "
                "calls left running would have it too; use `as: proxy`"
            )
            yield places.problem(f"secrets.{number}.as", IMPOSSIBLE, said)


@lru_cache(maxsize=4096)
def _objection(key: str, name: str) -> tuple[str, str] | None:
    """Code and message of what is wrong with allowing or denying a name, whatever the base."""
    from sandboxd.policy import seccomp  # noqa: PLC0415, its tables are large: load when first asked

    try:
        seccomp.resolve("default", [name] if key == "allow" else [], [name] if key == "deny" else [])
    except seccomp.UnknownSyscall as error:
        return "unknown_syscall", str(error)
    except (seccomp.NeverAllowed, seccomp.RequiredSyscall) as error:
        return IMPOSSIBLE, str(error)
    return None


def check_syscalls(allow: Sequence[str], deny: Sequence[str], places: Places) -> list[PolicyProblem]:
    """Unknown system calls and groups, and those that cannot be allowed or denied, each at its own line."""
    found: list[PolicyProblem] = []
    for key, names in (("allow", allow), ("deny", deny)):
        for number, name in enumerate(names):
            if len(found) >= MAX_PROBLEMS:
                return found
            objection = _objection(key, name[:MAX_NAME])
            if objection is not None:
                found.append(places.problem(f"syscalls.{key}.{number}", *objection))
    return found
