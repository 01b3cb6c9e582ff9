"""The examples of a policy, judged by the rules that are enforced.

A ``syscall`` is judged by running the compiled filter, the very bytes that are installed; ``read`` and
``write`` by the mounts of the container; ``connect`` and ``request`` by the compiled rules of the network.
Modes of files and what is in the image are not part of a policy, so a path is judged by whether its mount
lets it be reached, read or written at all.
"""

from __future__ import annotations

import ipaddress
import re
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sandboxd.httprule import HttpRequest
from sandboxd.policy import paths
from sandboxd.policy.filesystem import mount_table, mounted_at
from sandboxd.policy.inherit import nearest
from sandboxd.policy.rules import network_rules
from sandboxd.reach import Reach

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.models import PolicyProblem
    from sandboxd.policy.resolved import Places, Policy
    from sandboxd.reach import Decision

    Verdict = Callable[[Policy], tuple[bool, str]]

__all__ = ["ExampleError", "check_examples", "judge"]

_MOUNTS = ("filesystem", "mounts", "process.user")
KINDS = {
    "syscall": ("syscalls",),
    "read": _MOUNTS,
    "write": _MOUNTS,
    "connect": ("network",),
    "request": ("network",),
}
"""The kinds of examples, and what of a policy each is judged by."""
DEFAULT_PORTS = {"http": 80, "https": 443}
_NUMBER = re.compile(r"0x[0-9a-fA-F]{1,16}|[0-9]{1,20}")
_OWN = re.compile(r"(/proc/(self|thread-self|[0-9]+)|/dev/(fd|stdin|stdout|stderr))(/|$)")
_ENDPOINT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):([0-9]{1,5})")
MAX_ARGS = 6


class ExampleError(ValueError):
    """Raised when an example cannot be judged; the message says why."""


def _syscall(name: str, words: list[str]) -> Verdict:
    from sandboxd.policy import abi, seccomp  # noqa: PLC0415, their tables are large: load when first asked

    if name not in seccomp.known_syscalls():
        raise ExampleError(f"unknown system call {name!r}{nearest(name, sorted(seccomp.known_syscalls()))}")
    if len(words) > MAX_ARGS or not all(_NUMBER.fullmatch(word) for word in words):
        raise ExampleError(f"write at most {MAX_ARGS} numbers after the name, such as 'syscall socket 2 1 0'")
    args = tuple(int(word, 0) if word.startswith("0x") else int(word) for word in words)
    if any(arg >= 2**64 for arg in args):
        raise ExampleError("an argument of a system call has 64 bits")

    machine = abi.machine_with(name)

    def verdict(policy: Policy) -> tuple[bool, str]:
        answer = seccomp.compile_filter(policy.syscalls, machine).judge(name, args or None)
        return answer == "allow", f"the filter answers {answer}"

    return verdict


def _file(kind: str, path: str) -> Verdict:
    try:
        paths.absolute(path)
    except ValueError as error:
        raise ExampleError(str(error)) from None
    if kind == "write" and _OWN.match(path):
        raise ExampleError(f"{path} is about the process itself; no policy speaks of it")

    def verdict(policy: Policy) -> tuple[bool, str]:
        mounted = mounted_at(mount_table(policy.spec), path)
        answer = mounted.writable if kind == "write" else mounted.readable
        state = "writable" if mounted.writable else "read-only" if mounted.readable else "masked"
        return answer, f"{mounted.target} is {state}"

    return verdict


def _connect(endpoint: str) -> Verdict:
    found = _ENDPOINT.fullmatch(endpoint)
    if found is None or not 1 <= int(found[2]) <= 65535:
        raise ExampleError("write connect HOST:PORT, such as 'connect example.org:443'")
    host, port = found[1].strip("[]").lower().removesuffix("."), int(found[2])
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None

    def decide(reach: Reach) -> Decision:
        return reach.at(host, port) if address is None else reach.address(address, port)

    return partial(_of_network, decide)


def _request(words: list[str]) -> Verdict:
    method, url = words if len(words) == 2 else ("", "")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").removesuffix("."), parts.port
    except ValueError:
        host, port = "", None
    if not host or parts.scheme not in DEFAULT_PORTS or parts.username is not None or not method.isupper():
        raise ExampleError("write request METHOD URL, such as 'request GET https://example.org/path'")
    target = f"{parts.path or '/'}{'?' * bool(parts.query)}{parts.query}".encode()
    port = DEFAULT_PORTS[parts.scheme] if port is None else port

    def decide(reach: Reach) -> Decision:
        decision = reach.at(host, port)
        if decision.allowed and reach.looks_inside(host, port):
            decision = reach.request(host, port, HttpRequest(method, target, ()))
        return decision

    return partial(_of_network, decide)


def _of_network(decide: Callable[[Reach], Decision], policy: Policy) -> tuple[bool, str]:
    if policy.shares_host_network:
        return True, "the policy has the host's network, where nothing is refused"
    rules = network_rules(policy)
    if rules is None:
        return False, "the policy has no network"
    decision = decide(Reach(rules))
    return decision.allowed, decision.why


def _read(example: str) -> tuple[str, Verdict]:
    """The kind of an example, and what judges it. Raises ExampleError if it cannot be judged."""
    kind, *words = example.split()[: MAX_ARGS + 3] or [""]
    if kind not in KINDS:
        raise ExampleError(f"{kind!r} is no kind of example{nearest(kind, list(KINDS))}")
    if not words:
        raise ExampleError(f"write what {kind} is about after it")
    if kind == "syscall":
        return kind, _syscall(words[0], words[1:])
    if kind == "request":
        return kind, _request(words)
    subject = example.split(maxsplit=1)[1].strip()
    return kind, _connect(subject) if kind == "connect" else _file(kind, subject)


def judge(policy: Policy, example: str) -> tuple[bool, str]:
    """Whether the policy lets the example happen, and why. Raises ExampleError if it cannot be judged."""
    _, verdict = _read(example)
    return verdict(policy)


def check_examples(policy: Policy, places: Places) -> Iterator[PolicyProblem]:
    """A problem for every example that is wrong or cannot be judged, at its line.

    One whose answer depends on a doubtful value is only read.
    """
    for key, wanted in (("allows", True), ("denies", False)):
        for number, example in enumerate(getattr(policy.spec.examples, key)):
            path = f"examples.{key}.{number}"
            try:
                kind, verdict = _read(example)
            except ExampleError as error:
                yield places.problem(path, "bad_value", f"example {example!r}: {error}")
                continue
            if not places.sure(*KINDS[kind]):
                continue
            allowed, why = verdict(policy)
            if allowed != wanted:
                answer = "allowed" if allowed else "denied"
                said = f"example {example!r} is {answer}, and stands under {key}: {why}"
                yield places.problem(path, "wrong_example", said)
