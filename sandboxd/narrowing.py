"""Pure: a request is judged under its policy's shape, and makes the ``Plan`` of its call.

A request may ask for less than the policy allows and never for more: what is wider is refused with both
values, what is malformed with the field that is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sandboxd import canonical, units
from sandboxd.errors import InvalidRequest, RequestTooWide, TooLarge
from sandboxd.models import Bytes
from sandboxd.plan import Command, InputRef, Plan
from sandboxd.policy import paths
from sandboxd.policy.environment import environment
from sandboxd.policy.quantities import MIN_MEMORY

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.models import Input, Narrowing, Request
    from sandboxd.plan import Limits, Shape
    from sandboxd.policy import Policy

__all__ = ["make_plan"]

MAX_COMMAND = 6 * 2**20
"""Bytes of argv and env. No kernel takes more (_STK_LIM / 4 * 3, fs/exec.c); what a kernel takes of
less is its own to say, as E2BIG. Every record of a call repeats its argv."""

MAX_PATTERNS = 8192
"""Characters of all artifact patterns of a request."""


def make_plan(policy: Policy, shape: Shape, request: Request) -> Plan:
    """The plan of a request under its policy's shape.

    Raises RequestTooWide if the request asks for more than the policy allows, InvalidRequest for a
    path, pattern, variable or limit that is malformed.
    """
    for name in shape.granted("env"):
        if name in request.env:
            raise InvalidRequest(
                f"env: {name} is a secret that the policy puts there; leave it out", field=f"env.{name}"
            )
    if shape.kept:
        for name in ("memory", "cpus", "pids"):
            if getattr(request.limits, name) is not None:
                raise InvalidRequest(
                    f"limits.{name} is the container's, which the calls of a session share; leave it out",
                    field=f"limits.{name}",
                )
    inputs = _inputs(request.inputs, shape.limits)
    return Plan(
        shape=shape,
        command=_command(policy, request),
        limits=_narrow(shape.limits, request.limits),
        inputs=inputs,
        tar=None if request.tar is None else canonical.digest_bytes(request.tar.decode()),
        artifacts=tuple(artifact.release() for artifact in policy.artifacts),
        narrowed_artifacts=_patterns(request.artifacts),
        commit=None if request.session is None else policy.commit,
    )


def _narrow(limits: Limits, asked: Narrowing) -> Limits:
    cpus = None
    if asked.cpus is not None:
        try:
            cpus = units.parse_cpus(asked.cpus)
        except ValueError as error:
            raise InvalidRequest(f"limits.cpus: {error}", field="limits.cpus") from None
    if asked.memory is not None and asked.memory < MIN_MEMORY:
        least = units.format_size(MIN_MEMORY)
        raise InvalidRequest(f"limits.memory: no tool starts with less than {least}", field="limits.memory")
    wanted: list[tuple[str, int | None, int | None, Callable[[int], str]]] = [
        ("wall", asked.wall, limits.wall, units.format_duration),
        ("cpu_time", asked.cpu_time, limits.cpu_time, units.format_duration),
        ("cpus", cpus, limits.cpus, units.format_cpus),
        ("memory", asked.memory, limits.memory, units.format_size),
        ("pids", asked.pids, limits.pids, units.format_count),
        ("stdout", asked.stdout, limits.stdout, units.format_size),
        ("stderr", asked.stderr, limits.stderr, units.format_size),
    ]
    lower: dict[str, Any] = {}
    wider: list[dict[str, Any]] = []
    said: list[str] = []
    for name, value, most, show in wanted:
        if value is None:
            continue
        lower[name] = value
        if most is not None and value > most:
            wider.append({"limit": name, "asked": value, "allowed": most})
            said.append(f"limits.{name} {show(value)} is more than the policy's {show(most)}")
    if wider:
        raise RequestTooWide("; ".join(said), **wider[0], wider=wider)
    return replace(limits, **lower) if lower else limits


def _command(policy: Policy, request: Request) -> Command:
    def text(value: str, name: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"{name} is no text that UTF-8 can hold; use base64", field=name) from None
        return value

    argv: list[dict[str, str]] = []
    argv_size = 0
    for number, arg in enumerate(request.argv):
        data = arg.decode() if isinstance(arg, Bytes) else text(arg, f"argv.{number}").encode()
        if b"\0" in data:
            raise InvalidRequest(f"argv.{number} contains a NUL byte", field=f"argv.{number}")
        argv_size += len(data) + 1
        argv.append(Bytes.of(data).model_dump(exclude_none=True))
    if argv[0] == {"text": ""}:
        raise InvalidRequest("argv.0 is empty; it names the program to run", field="argv.0")
    env = environment(policy.spec)
    for name, value in request.env.items():
        if "=" in name or "\0" in name:
            raise InvalidRequest(f"env: {name!r} is not the name of a variable", field="env")
        env[text(name, "env")] = text(value, f"env.{name}")
    _bound_command(argv_size, env)
    try:
        cwd = paths.absolute(request.cwd)
    except ValueError as error:
        raise InvalidRequest(f"cwd: {error}", field="cwd") from None
    if isinstance(request.stdin, str):
        return Command(argv=tuple(argv), env=env, cwd=cwd, stdin=request.stdin)
    digest = canonical.digest_bytes(request.stdin.decode())
    return Command(argv=tuple(argv), env=env, cwd=cwd, stdin="bytes", stdin_digest=digest)


def _bound_command(argv_size: int, env: dict[str, str]) -> None:
    size = argv_size + sum(len(name.encode()) + len(value.encode()) + 2 for name, value in env.items())
    if size > MAX_COMMAND:
        most = units.format_size(MAX_COMMAND)
        raise TooLarge(f"argv and env together have {size} bytes, more than {most}", limit=MAX_COMMAND)


_Tree = dict[str, "_Tree | None"]
"""Names of files (None) and directories."""


def _inputs(inputs: list[Input], limits: Limits) -> tuple[InputRef, ...]:
    found: list[InputRef] = []
    tree: _Tree = {}
    made = 0
    for number, item in enumerate(inputs):
        field = f"inputs.{number}.path"
        try:
            path = paths.relative(item.path)
        except ValueError as error:
            raise InvalidRequest(f"{field}: {error}", field=field) from None
        made += _plant(tree, path, field)
        # counted on the way: thousands of deep paths are millions of directories
        _fit("workspace.inodes", made, limits.workspace_inodes, units.format_count)
        data = item.content.decode()
        found.append(InputRef(path, len(data), canonical.digest_bytes(data), item.mode))
    _fit("workspace.size", sum(item.size for item in found), limits.workspace_size, units.format_size)
    return tuple(found)


def _plant(tree: _Tree, path: str, field: str) -> int:
    """Put a file into the tree of all inputs; returns how many files and directories that makes."""
    *above, name = path.split("/")
    made = 1
    for part in above:
        if part not in tree:
            tree[part] = {}
            made += 1
        beneath = tree[part]
        if beneath is None:
            raise InvalidRequest(f"{field}: {path!r} passes through another input", field=field)
        tree = beneath
    if name in tree:
        what = "given twice" if tree[name] is None else "a file and a directory"
        raise InvalidRequest(f"{field}: {path!r} is {what}", field=field)
    tree[name] = None
    return made


def _fit(limit: str, asked: int, allowed: int, show: Callable[[int], str]) -> None:
    if asked > allowed:
        raise RequestTooWide(
            f"the inputs need {show(asked)} of limits.{limit}, which is {show(allowed)}",
            limit=limit,
            asked=asked,
            allowed=allowed,
        )


def _patterns(patterns: list[str] | None) -> tuple[str, ...] | None:
    if sum(map(len, patterns or ())) > MAX_PATTERNS:  # compiling them takes the event loop's time
        said = f"artifacts: more than {MAX_PATTERNS} characters in all"
        raise TooLarge(said, field="artifacts", limit=MAX_PATTERNS)
    for number, pattern in enumerate(patterns or ()):
        try:
            paths.artifact_pattern(pattern)
        except ValueError as error:
            raise InvalidRequest(f"artifacts.{number}: {error}", field=f"artifacts.{number}") from None
    return None if patterns is None else tuple(patterns)
