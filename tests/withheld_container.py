"""What ``withholding.py`` is for an OCI runtime, for the built-in one: a program in the place of its own.

It starts the real one, or one that leaves something out (as ``withheld_init.py`` makes them), with other
arguments, and stays between it and the daemon to hand over another plan.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from withheld_init import IS, VARIANTS, compiled, write_variants
from withholding import AFTER, OTHER_IDS, other_root

from sandboxd.engine.bundle import INIT_PATH
from sandboxd.init import CONTAINER, LAUNCH, SOURCES
from sandboxd.kernel import mounts

if TYPE_CHECKING:
    from collections.abc import Callable

RANGE = 65_536
WHILE_PARKED = "init_parent"  # it needs the tool process, and what it meddles with keeps the daemon waiting
KEPT = "    keep_four_capabilities();"
UNSHARED = ("CLONE_NEWNS", "CLONE_NEWPID", "network", "CLONE_NEWIPC", "CLONE_NEWUTS", "CLONE_NEWCGROUP")
NAMES = (
    "mnt_namespace",
    "pid_namespace",
    "net_namespace",
    "ipc_namespace",
    "uts_namespace",
    "cgroup_namespace",
)
FLAGS = " | ".join(f'(IS("{name}") ? 0 : {flag})' for name, flag in zip(NAMES, UNSHARED, strict=True))
EDITS = (
    (f"unshare({' | '.join(UNSHARED)})", f"unshare({FLAGS})"),
    ("    if (own_network)\n", '    if (own_network && !IS("net_namespace"))\n'),
    ("must(sethostname(", 'must(IS("uts_namespace") ? 0 : sethostname('),
    (KEPT, f'if (!IS("privileged"))\n{KEPT}'),
)


def build_container(directory: Path) -> Path:
    """Make the program and those that it starts; returns it."""
    program = compiled(SOURCES / "container.c", EDITS, "static _Noreturn void fail", IS)
    write_variants(program, directory, "container", [*NAMES, "privileged"])
    shutil.copy(CONTAINER, directory / "container-without-nothing")
    file = directory / "container"
    file.write_text(
        f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\nsys.path.insert(0, "
        f"{str(Path(__file__).parent)!r})\nimport withheld_container\n"
        f"withheld_container.main(Path({os.fspath(directory)!r}))\n"
    )
    file.chmod(0o755)
    return file


@dataclass
class Step:
    """A word of the plan, what follows it, and the mount that goes with it."""

    word: str
    arguments: list[str] = field(default_factory=list)
    mount: int | None = None

    @property
    def target(self) -> str:
        return "/" if self.word == "root" else (self.arguments or [""])[0]


def read_plan(data: bytes, fds: list[int]) -> list[Step]:
    """The steps of ``engine/builtin.py``'s ``container_plan``."""
    words, rest, steps = data.decode().split("\0")[:-1], list(fds), []
    while words:
        step = Step(words.pop(0))
        if step.word in {"hostname", "prepared", "mount", "tmpfs"}:
            step.arguments.append(words.pop(0))
        if step.word == "tmpfs":
            end = words.index("")
            step.arguments += words[:end]
            del words[: end + 1]
        if step.word in {"root", "mount"}:
            step.mount = rest.pop(0)
        steps.append(step)
    return steps


def write_plan(steps: list[Step]) -> tuple[bytes, list[int]]:
    """The same, to be sent."""
    words: list[str] = []
    for step in steps:
        words += [step.word, *step.arguments, *([""] if step.word == "tmpfs" else [])]
    data = b"".join(word.encode() + b"\0" for word in words)
    return data, [step.mount for step in steps if step.mount is not None]


@dataclass
class Place:
    """What an edit may use beside the plan."""

    directory: Path
    """Of the test."""
    namespace: int
    """The slot's user namespace."""


def _at(steps: list[Step], target: str) -> Step:
    return next(step for step in steps if step.target == target)


def _instead(target: str, source: str, *, read_only: bool = True) -> Callable[[list[Step], Place], None]:
    """Another directory, or file, of the test's."""

    def edit(steps: list[Step], place: Place) -> None:
        path = place.directory / source
        if not path.is_file():
            path.mkdir(exist_ok=True)
        mount = mounts.clone_tree(path)
        mounts.set_attributes(mount, read_only=read_only, userns=place.namespace)
        _at(steps, target).mount = mount

    return edit


def _other_root(*, read_only: bool) -> Callable[[list[Step], Place], None]:
    def edit(steps: list[Step], place: Place) -> None:
        mount = mounts.clone_tree(other_root(place.directory))
        mounts.set_attributes(mount, read_only=read_only, userns=place.namespace)
        _at(steps, "/").mount = mount
        if not read_only:
            _unsealed(steps, place)

    return edit


def _unsealed(steps: list[Step], _: Place) -> None:
    steps[:] = [step for step in steps if step.word != "sealed"]


def _added(target: str, source: str) -> Callable[[list[Step], Place], None]:
    """A path of the host."""

    def edit(steps: list[Step], _: Place) -> None:
        mount = mounts.clone_tree(Path(source))
        mounts.set_attributes(mount, read_only=True, userns=None)
        at = next((n for n, step in enumerate(steps) if step.word == "sealed"), len(steps))
        steps.insert(at, Step("mount", [target], mount))

    return edit


def _option(target: str, old: str, new: str | None) -> Callable[[list[Step], Place], None]:
    def edit(steps: list[Step], _: Place) -> None:
        step = _at(steps, target)
        kept = [option for option in step.arguments if not option.startswith(old)]
        assert len(kept) < len(step.arguments)
        step.arguments = [*kept, *([new] if new else [])]

    return edit


def _dropped(target: str) -> Callable[[list[Step], Place], None]:
    return lambda steps, _: steps.remove(_at(steps, target))


def _loose(attribute: int) -> Callable[[list[Step], Place], None]:
    """``/tmp`` without an attribute, for the program gives it to each tmpfs that it makes."""

    def edit(steps: list[Step], _: Place) -> None:
        step = _at(steps, "/tmp")
        options = dict(option.split("=") for option in step.arguments[1:])
        mount = mounts.new_mount("tmpfs", options)
        packed = b"".join(number.to_bytes(8, sys.byteorder) for number in (0, attribute, 0, 0))
        empty = mounts.AT_EMPTY_PATH
        mounts._call("mount_setattr", mounts.SYS_MOUNT_SETATTR, mount, b"", empty, packed, len(packed))
        step.word, step.arguments, step.mount = "mount", ["/tmp"], mount

    return edit


def _same_workspace(steps: list[Step], _: Place) -> None:
    """A tmpfs that looks like the workspace in everything but its identity."""
    _at(steps, "/workspace").mount = mounts.new_mount("tmpfs", {"size": "16777216", "nr_inodes": "4000"})


def _init(variant: str) -> Callable[[list[Step], Place], None]:
    return _instead(INIT_PATH, f"init-without-{variant}")


def _other_program(steps: list[Step], _: Place) -> None:
    _at(steps, INIT_PATH).mount = mounts.clone_tree(Path("/bin/sleep"))


def _as_it_is(_steps: list[Step], _place: Place) -> None:
    """Nothing is left out of the plan."""


def _let_be(_pid: int, _name: str) -> None:
    """Nothing is done to the process."""


PLANS: dict[str, Callable[[list[Step], Place], None]] = {
    "other_root": _other_root(read_only=True),
    "other_writable_root": _other_root(read_only=False),
    "writable_root": _unsealed,
    "tmp_size": _option("/tmp", "size=", "size=1g"),
    "tmp_inodes": _option("/tmp", "nr_inodes=", None),
    "tmp_absent": _dropped("/tmp"),
    "tmp_nosuid": _loose(mounts.MOUNT_ATTR_NOSUID),
    "tmp_nodev": _loose(mounts.MOUNT_ATTR_NODEV),
    "shm_size": _option("/dev/shm", "size=", "size=1g"),
    "shm_inodes": _option("/dev/shm", "nr_inodes=", None),
    "workspace_other": _instead("/workspace", "other", read_only=False),
    "workspace_same_looks": _same_workspace,
    "lent_other": _instead("/data", "other"),
    "lent_writable": _instead("/data", "other", read_only=False),
    "host_root": _added("/mnt", "/"),
    "host_over_tmp": _added("/tmp", "/etc"),
    "host_device": _added("/dev/kmsg", "/dev/kmsg"),
    "host_proc": _added("/proc", "/proc"),
    "false_mask": _added("/proc/acpi", "/etc"),
    "init_other": _other_program,
    **{f"init_{variant}": _init(variant) for variant in VARIANTS},
}

# the program that is started; the real one for all else
PROGRAMS = {
    **{name: name for name in NAMES},
    "config_capabilities": "privileged",
    "config_no_new_privs": "privileged",
    "init_capabilities": "privileged",
    "init_no_new_privs": "privileged",
}


def _user_namespace(uids: int, gids: int) -> int:
    """One of the same kind as the slot's, over ids from these on."""
    with subprocess.Popen(
        [LAUNCH, "userns", str(uids)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as helper:
        assert helper.stdin is not None
        assert helper.stdout is not None
        helper.stdout.read(1)
        for kind, base in (("uid_map", uids), ("gid_map", gids)):
            Path(f"/proc/{helper.pid}/{kind}").write_text(f"0 {base} {RANGE}\n")
        helper.stdin.write(b"\n")
        helper.stdout.read(1)
        namespace = os.open(f"/proc/{helper.pid}/ns/user", os.O_RDONLY)
        helper.stdin.close()
    return namespace


def _namespace_for(wanted: str, given: int) -> int:
    """The user namespace to make the container in."""
    if wanted not in {"user_namespace", "other_map", "other_gid_map"}:
        return given
    enter = ["nsenter", f"--user=/proc/self/fd/{given}", "cat", "/proc/self/uid_map"]
    text = subprocess.run(enter, check=True, stdout=subprocess.PIPE, pass_fds=[given]).stdout
    base = int(text.split()[1])
    return _user_namespace(
        OTHER_IDS if wanted == "other_map" else base, base if wanted == "user_namespace" else OTHER_IDS
    )


def _arguments(wanted: str, given: list[str]) -> list[str]:
    """The program's arguments from the directory on, with other masks."""
    ends = [number for number, word in enumerate(given) if word == "--"]
    places, masked, read_only, name = (
        given[start:end] for start, end in zip([0, *(n + 1 for n in ends)], [*ends, None], strict=True)
    )
    if wanted == "masked_paths":
        masked = []
    if wanted == "read_only_paths":
        read_only = []
    if wanted == "false_mask":
        masked.remove("/proc/acpi")
    return [*places, "--", *masked, "--", *read_only, "--", *name]


def main(directory: Path) -> None:
    """Be the built-in runtime, less what ``directory/withhold`` names."""
    wanted = (directory / "withhold").read_text()
    plan, control, given = (int(word) for word in sys.argv[1:4])
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    daemon = socket.socket(fileno=plan)
    namespace = _namespace_for(wanted, given)
    passed = [theirs.fileno(), control, namespace]
    program = directory / f"container-without-{PROGRAMS.get(wanted, 'nothing')}"
    status = subprocess.run(
        [program, *map(str, passed), *_arguments(wanted, sys.argv[4:])], check=False, pass_fds=passed
    ).returncode
    theirs.close()
    os.close(control)
    if status != 0 or os.fork() != 0:
        os._exit(status)
    said, fds, _, _ = socket.recv_fds(ours, 64, 1)
    socket.send_fds(daemon, [said], fds)
    data, fds, _, _ = socket.recv_fds(daemon, 1 << 17, 128)
    if data:
        steps, place = read_plan(data, fds), Place(directory, given)
        PLANS.get(wanted, _as_it_is)(steps, place)
        data, fds = write_plan(steps)
        meddle, pid = AFTER.get(wanted, _let_be), int.from_bytes(said, sys.byteorder)
        if wanted != WHILE_PARKED:  # else the daemon may have done before we have: it waits for nobody
            meddle(pid, sys.argv[-1])
        socket.send_fds(ours, [data], fds)
        if wanted == WHILE_PARKED:
            meddle(pid, sys.argv[-1])
    os._exit(0)
