"""An OCI runtime that takes a control away: edits the bundle, runs the real runtime, meddles after it.

A test makes a script that calls ``main`` and is named after the real runtime, writes what to take away
into a file, and makes a call. The environment is the daemon's; nothing here is imported by it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from withheld_init import VARIANTS

from sandboxd.engine.bundle import INIT_PATH

if TYPE_CHECKING:
    from collections.abc import Callable

Config = dict[str, Any]
OTHER_IDS = 4_000_000_000  # the first of a range that no daemon of the tests gives to a container
ROOT_DIRECTORIES = ("dev", "proc", "tmp", "workspace", "usr", "etc", "data")


def main(real: str, directory: Path) -> None:
    """Be the runtime ``real``, less what ``directory/withhold`` names."""
    wanted = (directory / "withhold").read_text()
    bundle = Path(sys.argv[sys.argv.index("--bundle") + 1])
    file = bundle / "config.json"
    config = json.loads(file.read_text())
    before = BEFORE.get(wanted)
    if before is not None:
        before(config, directory)
    file.write_text(json.dumps(config))
    after = AFTER.get(wanted)
    if after is None:
        os.execv(real, [real, *sys.argv[1:]])
    # 3 is the control connection
    status = subprocess.run([real, *sys.argv[1:]], check=False, pass_fds=[3]).returncode
    if status == 0:
        after(int((bundle / "pid").read_text()), sys.argv[-1])
    sys.exit(status)


def _mount(config: Config, target: str) -> Config:
    found: Config = next(mount for mount in config["mounts"] if mount["destination"] == target)
    return found


def _add(config: Config, target: str, source: str, *options: str) -> None:
    mount = {"destination": target, "type": "bind", "source": source, "options": ["bind", *options]}
    config["mounts"].append(mount)


def _without_namespace(kind: str) -> Callable[[Config, Path], None]:
    def edit(config: Config, _: Path) -> None:
        linux = config["linux"]
        linux["namespaces"] = [entry for entry in linux["namespaces"] if entry["type"] != kind]
        if kind == "user":
            linux.pop("uidMappings")
            linux.pop("gidMappings")
        if kind == "uts":
            config.pop("hostname")

    return edit


def _other_map(*which: str) -> Callable[[Config, Path], None]:
    """A user namespace of the runtime's own, over other host ids."""

    def edit(config: Config, _: Path) -> None:
        for entry in config["linux"]["namespaces"]:
            if entry["type"] == "user":
                entry.pop("path")
        for kind in which:
            config["linux"][kind] = [{"containerID": 0, "hostID": OTHER_IDS, "size": 65_536}]

    return edit


def _shared_namespace(kind: str) -> Callable[[Config, Path], None]:
    """One that some other process, and not the container, has made."""

    def edit(config: Config, directory: Path) -> None:
        for entry in config["linux"]["namespaces"]:
            if entry["type"] == kind:
                entry["path"] = (directory / kind).read_text()

    return edit


def other_root(directory: Path) -> Path:
    """A root with every mount point and no program."""
    root = directory / "root"
    for name in ROOT_DIRECTORIES:
        (root / name).mkdir(parents=True, exist_ok=True)
    return root


def _other_root(*, read_only: bool) -> Callable[[Config, Path], None]:
    def edit(config: Config, directory: Path) -> None:
        config["root"] = {"path": str(other_root(directory)), "readonly": read_only}

    return edit


def _option(target: str, old: str, new: str | None) -> Callable[[Config, Path], None]:
    """An option of a mount that begins with ``old``, replaced or dropped."""

    def edit(config: Config, _: Path) -> None:
        mount = _mount(config, target)
        assert any(option.startswith(old) for option in mount["options"])
        kept = [option for option in mount["options"] if not option.startswith(old)]
        mount["options"] = [*kept, *([new] if new else [])]

    return edit


def _drop_mount(target: str) -> Callable[[Config, Path], None]:
    return lambda config, _: config["mounts"].remove(_mount(config, target))


def _bound(target: str, source: str, *options: str) -> Callable[[Config, Path], None]:
    return lambda config, _: _add(config, target, source, *options)


def _other_workspace(config: Config, directory: Path) -> None:
    (directory / "other").mkdir(exist_ok=True)
    _mount(config, "/workspace")["source"] = str(directory / "other")


def _same_workspace(config: Config, _: Path) -> None:
    """A tmpfs that looks like the workspace in everything but its identity."""
    config["mounts"][:] = [mount for mount in config["mounts"] if mount["destination"] != "/workspace"]
    options = ["nosuid", "nodev", "mode=0755", "size=16777216", "nr_inodes=4000"]
    mount = {"destination": "/workspace", "type": "tmpfs", "source": "none", "options": options}
    config["mounts"].append(mount)


def _host_proc(config: Config, _: Path) -> None:
    _drop_mount("/proc")(config, _)
    config["linux"]["maskedPaths"], config["linux"]["readonlyPaths"] = [], []
    mount = {
        "destination": "/proc",
        "type": "bind",
        "source": "/proc",
        "options": ["rbind", "nosuid", "nodev"],
    }
    config["mounts"].insert(0, mount)


def _no_masks(config: Config, _: Path) -> None:
    config["linux"]["maskedPaths"] = []


def _no_read_only_paths(config: Config, _: Path) -> None:
    config["linux"]["readonlyPaths"] = []


def _false_mask(config: Config, _: Path) -> None:
    config["linux"]["maskedPaths"].remove("/proc/acpi")
    _add(config, "/proc/acpi", "/etc", "ro", "nosuid", "nodev")


def _other_lent(config: Config, directory: Path) -> None:
    (directory / "other").mkdir(exist_ok=True)
    _mount(config, "/data")["source"] = str(directory / "other")


def _writable_lent(config: Config, directory: Path) -> None:
    _other_lent(config, directory)
    _option("/data", "ro", "rw")(config, directory)


def _all_capabilities(config: Config, _: Path) -> None:
    every = ["CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SETPCAP", "CAP_SETUID", "CAP_SETGID", "CAP_KILL"]
    sets = ("bounding", "effective", "permitted", "inheritable", "ambient")
    config["process"]["capabilities"] = dict.fromkeys(sets, every)


def _no_new_privs(config: Config, _: Path) -> None:
    config["process"]["noNewPrivileges"] = False


def _writable_root(config: Config, _: Path) -> None:
    config["root"]["readonly"] = False


def _init(variant: str) -> Callable[[Config, Path], None]:
    """PID 1 replaced by one that speaks the protocol and leaves something out."""

    def edit(config: Config, directory: Path) -> None:
        _mount(config, INIT_PATH)["source"] = str(directory / f"init-without-{variant}")
        if variant in {"no_new_privs", "capabilities"}:
            _all_capabilities(config, directory)
            _no_new_privs(config, directory)

    return edit


def _other_program(config: Config, _: Path) -> None:
    _mount(config, INIT_PATH)["source"] = "/bin/sleep"
    config["process"]["args"] = [INIT_PATH, "2"]


def _cgroups(name: str) -> list[Path]:
    """A container's cgroup in every hierarchy that has it."""
    return [Path(path) for path, _, _ in os.walk("/sys/fs/cgroup") if path.endswith(f"/{name}")]


def leave(cgroup: Path, pid: int) -> None:
    """To the nearest cgroup above that takes it: of version 2, one that passes controllers down does not."""
    for above in cgroup.parents:
        with suppress(OSError):
            (above / "cgroup.procs").write_text(str(pid))
            return
    raise AssertionError(f"{pid} stays in {cgroup}")


def _leave_every_cgroup(pid: int, name: str) -> None:
    for path in _cgroups(name):
        leave(path, pid)


def _leave_one_cgroup(pid: int, name: str) -> None:
    """Only the one that limits processes, where hierarchies are many."""
    paths = [path for path in _cgroups(name) if (path / "pids.max").exists()]
    assert len(paths) == 1
    leave(paths[0], pid)


def _interface(pid: int, _: str) -> None:
    command = ["nsenter", "-t", str(pid), "-n", "ip", "link", "add", "veth0", "type", "veth"]
    subprocess.run([*command, "peer", "name", "veth1"], check=True)


def _extra_process(_: int, name: str) -> None:
    paths = _cgroups(name)
    child = os.fork()
    if child == 0:
        for path in paths:
            (path / "cgroup.procs").write_text("0")
        os.execv("/bin/sleep", ["/bin/sleep", "20"])
    while not all(str(child) in (path / "cgroup.procs").read_text().split() for path in paths):
        time.sleep(0.001)


def _hidden_parent(pid: int, name: str) -> None:
    """The tool process has another parent than PID 1, and that is kept out of sight, in another cgroup."""
    parents: dict[int, int] = {}
    until = time.monotonic() + 10
    while not (hidden := [one for one, above in parents.items() if above == pid and one in parents.values()]):
        assert time.monotonic() < until, parents
        parents = {one: _parent(one) for one in _processes(name)}
        time.sleep(0.001)
    for path in _cgroups(name):
        leave(path, hidden[0])


def _processes(name: str) -> set[int]:
    return {int(one) for path in _cgroups(name) for one in (path / "cgroup.procs").read_text().split()}


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:  # of those that a runtime needs for a moment
        return 0


BEFORE: dict[str, Callable[[Config, Path], None]] = {
    **{f"{kind}_namespace": _without_namespace(kind) for kind in ("user", "pid", "ipc", "uts", "cgroup")},
    "net_namespace": _without_namespace("network"),
    "mnt_namespace": _without_namespace("mount"),
    "shared_net": _shared_namespace("network"),
    "shared_ipc": _shared_namespace("ipc"),
    "other_map": _other_map("uidMappings", "gidMappings"),
    "other_gid_map": _other_map("gidMappings"),
    "other_root": _other_root(read_only=True),
    "other_writable_root": _other_root(read_only=False),
    "writable_root": _writable_root,
    "config_capabilities": _all_capabilities,
    "config_no_new_privs": _no_new_privs,
    "tmp_size": _option("/tmp", "size=", "size=1g"),
    "tmp_inodes": _option("/tmp", "nr_inodes=", None),
    "tmp_absent": _drop_mount("/tmp"),
    "tmp_nosuid": _option("/tmp", "nosuid", "suid"),
    "tmp_nodev": _option("/tmp", "nodev", "dev"),
    "shm_size": _option("/dev/shm", "size=", "size=1g"),
    "shm_inodes": _option("/dev/shm", "nr_inodes=", None),
    "workspace_other": _other_workspace,
    "workspace_same_looks": _same_workspace,
    "lent_other": _other_lent,
    "lent_writable": _writable_lent,
    "host_root": _bound("/mnt", "/", "rbind", "ro", "nosuid", "nodev"),
    "host_over_tmp": _bound("/tmp", "/etc", "ro", "nosuid", "nodev"),
    "host_device": _bound("/dev/kmsg", "/dev/kmsg", "nosuid"),
    "host_proc": _host_proc,
    "proc_shows_all": _option("/proc", "hidepid=", None),
    "masked_paths": _no_masks,
    "read_only_paths": _no_read_only_paths,
    "false_mask": _false_mask,
    "init_other": _other_program,
    **{f"init_{variant}": _init(variant) for variant in VARIANTS},
}

AFTER: dict[str, Callable[[int, str], None]] = {
    "every_cgroup": _leave_every_cgroup,
    "one_cgroup": _leave_one_cgroup,
    "interface": _interface,
    "extra_process": _extra_process,
    "init_parent": _hidden_parent,
}
