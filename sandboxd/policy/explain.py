"""Every control of a policy as a person reads it, with the file and line that set it.

A test compares the rows with the controls of a receipt.
"""

from __future__ import annotations

import base64
import shlex
from typing import TYPE_CHECKING, Any, Literal, Protocol

from sandboxd import units
from sandboxd.policy.checks import RAISES
from sandboxd.policy.environment import environment, placeholders
from sandboxd.policy.fixed import (
    ALWAYS,
    HOST_NETWORK,
    KEPT_CGROUP,
    KEPT_INIT,
    NAMESPACES_HOST_NETWORK,
    shm_size,
)
from sandboxd.policy.floor import FORMATS, limit
from sandboxd.policy.retry import OWN_CAUSES
from sandboxd.policy.rules import network_rules
from sandboxd.policy.source import BUILT_IN, Origin
from sandboxd.policy.trust import TRUSTED, looks_inside, trust_env

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sandboxd.httprule import HttpRule
    from sandboxd.policy.resolved import Policy
    from sandboxd.reach import Allow, Deny

__all__ = ["explain"]

OF_HTTP = "for rules that look into HTTP"
REQUEST = Origin("(the request)", 0, 0)
MAX_COMMAND = 1000  # characters of a command: it is in the plan as a whole


class Narrowed(Protocol):
    """The limits of a plan: the policy's, lowered by a request. Values as in ``plan.Limits``."""

    @property
    def wall(self) -> int: ...
    @property
    def cpu_time(self) -> int | None: ...
    @property
    def cpus(self) -> int: ...
    @property
    def memory(self) -> int: ...
    @property
    def pids(self) -> int: ...
    @property
    def stdout(self) -> int: ...
    @property
    def stderr(self) -> int: ...


class Commanded(Protocol):
    """The command of a plan. Arguments are ``{"text"}`` or ``{"base64"}``."""

    @property
    def argv(self) -> Sequence[Mapping[str, str]]: ...
    @property
    def env(self) -> Mapping[str, str]: ...


class Planned(Protocol):
    """What is read of a ``plan.Plan``, which this package is below of."""

    @property
    def command(self) -> Commanded: ...
    @property
    def limits(self) -> Narrowed: ...
    @property
    def narrowed_artifacts(self) -> Sequence[str] | None: ...


def _line(control: str, value: str, at: Origin, note: str = "") -> dict[str, Any]:
    if not note and at.line == 0:
        note = "default" if at is BUILT_IN else "set by the request"
    return {"control": control, "value": value, "file": at.file, "line": at.line, "note": note}


def _limits(policy: Policy, plan: Planned | None) -> Iterator[dict[str, Any]]:
    narrowed: dict[str, int | None] = {}
    if plan is not None:
        asked = plan.limits
        narrowed = {
            "wall": asked.wall,
            "cpu_time": asked.cpu_time,
            "cpus": asked.cpus,
            "memory": asked.memory,
            "pids": asked.pids,
            "stdout.size": asked.stdout,
            "stderr.size": asked.stderr,
        }
    for path, show in FORMATS.items():
        value = limit(policy.spec.limits, path)
        now = narrowed.get(path, value)
        text = "no limit" if now is None else show(now)
        note = ""
        if now != value:
            note = f"narrowed by the request from {'no limit' if value is None else show(value)}"
        yield _line(f"limits.{path}", text, _nearest(policy, f"limits.{path}"), note)
    for stream in ("stdout", "stderr"):
        path = f"limits.{stream}.on_limit"
        yield _line(path, on_output(policy), policy.origin(path))


def _nearest(policy: Policy, path: str) -> Origin:
    """The origin of ``limits.stdout.size`` is that of ``limits.stdout`` where it is written in short."""
    at = policy.origin(path)
    if at is BUILT_IN and path.startswith(("limits.stdout.", "limits.stderr.")):
        stream = policy.tree.plain().get("limits", {}).get(path.split(".")[1])
        return at if isinstance(stream, dict) else policy.origin(path.rpartition(".")[0])
    return at


def on_output(policy: Policy) -> Literal["truncate", "kill"]:
    """What happens at the size of an output stream: one answer for both, truncate unless written."""
    limits = policy.spec.limits
    return limits.stdout.on_limit or limits.stderr.on_limit or "truncate"


def _command(plan: Planned) -> dict[str, Any]:
    words = [
        arg["text"] if "text" in arg else base64.b64decode(arg["base64"]).decode(errors="backslashreplace")
        for arg in plan.command.argv
    ]
    text = shlex.join(words)
    return _line("command", text if len(text) <= MAX_COMMAND else text[:MAX_COMMAND] + "…", REQUEST)


def _env(policy: Policy, plan: Planned | None) -> Iterator[dict[str, Any]]:
    given, own = trust_env(policy.spec), policy.spec.process.env
    holding = placeholders(policy.spec)
    asked = {} if plan is None else plan.command.env
    policys = environment(policy.spec)
    for name, value in {**policys, **asked}.items():
        path = f"process.env.{name}"
        if value != policys.get(name):
            yield _line(path, value, REQUEST)
        elif name in given and name not in own:
            yield _line(path, value, policy.origin("network"), OF_HTTP)
        elif name in holding:
            yield _line(
                path, value, policy.origin("secrets"), "in the place of a secret that it does not get"
            )
        else:
            yield _line(path, value, policy.origin(path))


def _process(policy: Policy) -> Iterator[dict[str, Any]]:
    process = policy.spec.process
    yield _line("process.user", str(process.user), policy.origin("process.user"))
    if process.group is None:
        yield _line("process.group", str(process.user), policy.origin("process.user"), "as process.user")
    else:
        yield _line("process.group", str(process.group), policy.origin("process.group"))
    values = {
        "user_namespace": process.user_namespace,
        "umask": f"{process.umask:04o}",
        "hostname": process.hostname,
    }
    for key, value in values.items():
        yield _line(f"process.{key}", value, policy.origin(f"process.{key}"))


def _files(policy: Policy) -> Iterator[dict[str, Any]]:
    root = policy.spec.filesystem
    yield _line("filesystem.root", root.root, policy.origin("filesystem.root"))
    if root.root == "overlay":
        yield _line("filesystem.size", units.format_size(root.size), policy.origin("filesystem.size"))
        yield _line("filesystem.inodes", units.format_count(root.inodes), policy.origin("filesystem.inodes"))
    tmp = policy.spec.limits.tmp
    yield _line("filesystem.shm", shm_size(tmp), policy.origin("limits.tmp"), "as limits.tmp, at most 64MiB")
    if not policy.spec.mounts:
        yield _line("mounts", "none", policy.origin("mounts"))
    for number, mount in enumerate(policy.spec.mounts):
        value = f"{mount.source} at {mount.target}, {mount.mode}"
        yield _line(f"mounts.{number}", value, policy.origin(f"mounts.{number}"))


def _syscalls(policy: Policy) -> Iterator[dict[str, Any]]:
    asked = policy.spec.syscalls
    count = len({rule.name for rule in policy.syscalls if rule.action == "allow"})
    note = f"{count} system calls allowed in all"
    yield _line("syscalls.base", asked.base, policy.origin("syscalls.base"), note)
    for key, names in (("allow", asked.allow), ("deny", asked.deny)):
        for number, name in enumerate(names):
            yield _line(f"syscalls.{key}", name, policy.origin(f"syscalls.{key}.{number}"))


ENV_NOTE = (
    "discouraged: every child process inherits it, /proc/PID/environ shows it, and programs print their "
    "environment when they fail; as: file is not"
)
SECRETS_AS = {
    "env": ("the variable {}", ENV_NOTE),
    "file": ("the file /run/secrets/{}", "in memory, mode 0400, the tool's own"),
    "proxy": ("{}, in requests on their way out", "it never enters the container"),
}


def _secrets(policy: Policy) -> Iterator[dict[str, Any]]:
    if not policy.spec.secrets:
        yield _line("secrets", "none", policy.origin("secrets"))
    for number, secret in enumerate(policy.spec.secrets):
        value, note = SECRETS_AS[secret.as_]
        yield _line(f"secrets.{number}", value.format(secret.name), policy.origin(f"secrets.{number}"), note)


def _artifacts(policy: Policy, plan: Planned | None) -> Iterator[dict[str, Any]]:
    note = ""
    if plan is not None and plan.narrowed_artifacts is not None:
        note = "narrowed by the request to " + (", ".join(plan.narrowed_artifacts) or "none")
    for number, artifact in enumerate(policy.artifacts):
        value = artifact.path
        if artifact.max_size is not None:
            value += f", at most {units.format_size(artifact.max_size)} each"
        if artifact.type:
            value += f", only {', '.join(artifact.type)} by content"
        if artifact.count is not None:
            value += f", at most {artifact.count} files"
        if artifact.secrets == "deny":
            value += ", none that has secrets"
        yield _line(f"artifacts.{number}", value, policy.origin(f"artifacts.{number}"), note)
    if not policy.artifacts:
        yield _line("artifacts", "none", policy.origin("artifacts"))


def _warm(policy: Policy) -> Iterator[dict[str, Any]]:
    warm = policy.spec.warm
    if warm is None:
        yield _line("warm", "none", policy.origin("warm"))
        return
    yield _line("warm.command", warm.command, policy.origin("warm.command"))
    for number, module in enumerate(warm.preload):
        yield _line("warm.preload", module, policy.origin(f"warm.preload.{number}"))


def _network(policy: Policy) -> Iterator[dict[str, Any]]:
    if policy.shares_host_network:
        yield _line("network", "host", policy.origin("network.mode"), f"WARNING: {HOST_NETWORK}")
        return
    rules = network_rules(policy)
    if rules is None:
        yield _line("network", "none", policy.origin("network"))
        return
    yield _line("network", "rules", policy.origin("network"), "everything else is refused and reported")
    kinds: dict[str, Sequence[Allow | Deny]] = {"allow": rules.allow, "deny": rules.deny}
    for kind, listed in kinds.items():
        for number, rule in enumerate(listed):
            ports = ", ".join(map(str, rule.ports)) or "all ports"
            path = f"network.{kind}.{number}"
            inside = "" if rule.http is None else f", {rule.http.said}{_injected(rule.http)}"
            yield _line(path, f"{rule.target} {ports}{inside}", policy.origin(path))
    if looks_inside(policy.spec):
        trusted = f"the daemon's authority, at {TRUSTED} and on the image's bundle"
        yield _line("network.trust", trusted, policy.origin("network"), OF_HTTP)
    for name, value in rules.budget:
        yield _line(f"network.budget.{name}", str(value), policy.origin(f"network.budget.{name}"))


def _injected(rule: HttpRule) -> str:
    """What is put into the requests that a rule allows."""
    inject = rule.inject
    if inject is None:
        return ""
    what = "a signature of AWS" if inject.secret_key else f"the header {inject.header}"
    return f", with {what}{', also without TLS' if inject.plain else ''}"


def _always(policy: Policy) -> dict[str, str]:
    found = ALWAYS | ({"namespaces": NAMESPACES_HOST_NETWORK} if policy.shares_host_network else {})
    if policy.spec.isolation == "session":
        found |= {"init": KEPT_INIT, "cgroup": KEPT_CGROUP}
    return found


def _expose(policy: Policy) -> Iterator[dict[str, Any]]:
    if not policy.spec.expose:
        yield _line("expose", "none", policy.origin("expose"))
    for number, port in enumerate(policy.spec.expose):
        at = policy.origin(f"expose.{number}")
        yield _line("expose", str(port), at, "the caller reaches a server inside")


def _retry(policy: Policy) -> Iterator[dict[str, Any]]:
    retry = policy.spec.retry
    if retry is None:
        yield _line("retry", "none", policy.origin("retry"))
        return
    reaches = policy.spec.network is not None and not policy.spec.network.reaches_nothing
    note = f"for {', '.join(retry.on)}, after {retry.backoff}"
    if reaches and not retry.safe:
        note += "; not once its container has started, since it has a network and retry.safe is not true"
    yield _line("retry.failed", f"{retry.failed} times", _retry_origin(policy, "failed"), note)
    for cause in OWN_CAUSES:
        own = retry.of(cause)
        if own is None:
            continue
        values = ((name, show, getattr(own.raise_, name)) for name, (_, show) in RAISES.items())
        raised = ", ".join(f"{name} {show(value)}" for name, show, value in values if value is not None)
        said = ", ".join(filter(None, [own.said, raised and f"then with {raised}"]))
        yield _line(f"retry.{cause}", f"{own.times} times", _retry_origin(policy, cause), said)


def _retry_origin(policy: Policy, key: str) -> Origin:
    at = policy.origin(f"retry.{key}")
    return policy.origin("retry") if at is BUILT_IN else at


def explain(policy: Policy, plan: Planned | None = None) -> list[dict[str, Any]]:
    """Every control: ``control``, ``value`` for a person, ``file`` and ``line`` of its origin, ``note``.

    With a plan, limits are those of the plan and the note says what the policy would have allowed; its
    command comes first. Line 0 is a built-in default, or what the request says itself.
    """
    return [
        *([_command(plan)] if plan is not None else []),
        _line("image", policy.image, policy.origin("image")),
        *_limits(policy, plan),
        *_process(policy),
        *_env(policy, plan),
        *_files(policy),
        *_syscalls(policy),
        *_network(policy),
        *_secrets(policy),
        *_expose(policy),
        *_artifacts(policy, plan),
        _line("commit", policy.commit, policy.origin("commit")),
        *_retry(policy),
        _line("isolation", policy.spec.isolation, policy.origin("isolation")),
        *_warm(policy),
        *(
            _line(f"isolation.{name}", value, BUILT_IN, "part of every policy")
            for name, value in _always(policy).items()
        ),
    ]
