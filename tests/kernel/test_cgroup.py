"""Cgroups on the kernel that runs the tests; the text forms of the other version from its documents."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import PATIENCE, until

from sandboxd import errors
from sandboxd.kernel import cgroup_v2, cgroupfs
from sandboxd.kernel.cgroup import Cgroup, CgroupLimits
from sandboxd.kernel.cgroup_tree import CgroupTree

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
LIMITS = CgroupLimits(memory=64 * MIB, pids=20, cpus=500)


@pytest.fixture
def tree() -> Iterator[CgroupTree]:
    tree = CgroupTree.open(f"test-{uuid.uuid4().hex[:12]}")
    yield tree
    # a tree leaves out what it made itself; one of the same name does not
    for cgroup in CgroupTree.open(tree.name).leftovers():
        cgroup.kill()
        cgroup.remove()
    tree.close()


@pytest.fixture
def cgroup(tree: CgroupTree) -> Iterator[Cgroup]:
    cgroup = tree.create("slot", LIMITS)
    yield cgroup
    cgroup.kill()
    cgroup.remove()


@contextlib.contextmanager
def inside(cgroup: Cgroup, code: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process that joined the cgroup before it ran anything of ``code``."""
    join = "".join(f"open({path!r}, 'w').write('0')\n" for path in cgroup.procs_files)
    with subprocess.Popen(
        [sys.executable, "-S", "-c", f"{join}print('in', flush=True)\n{code}"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        try:
            yield process
        finally:
            process.kill()


def test_limits_are_read_back(cgroup: Cgroup) -> None:
    limits = cgroup.read_limits()
    assert limits["memory"][0] == str(64 * MIB)
    assert limits["swap"][0] == "0"
    assert limits["pids"][0] == "20"
    assert limits["cpu"][0] == "500"
    for value, file in limits.values():
        assert value
        assert "{" in file or Path(file).exists()


def test_limits_move_both_ways(cgroup: Cgroup) -> None:
    for memory, cpus in ((32 * MIB, 100), (128 * MIB, 2000), (128 * MIB, 10)):
        cgroup.set(CgroupLimits(memory=memory, pids=5, cpus=cpus))
        limits = cgroup.read_limits()
        assert (limits["memory"][0], limits["swap"][0], limits["cpu"][0]) == (str(memory), "0", str(cpus))
    cgroup.set(CgroupLimits(memory=None, pids=None, cpus=None))
    assert {cgroup.read_limits()[name][0] for name in ("memory", "swap", "pids", "cpu")} == {"max"}


def test_io_limits_are_read_back(tree: CgroupTree) -> None:
    if not tree.controllers & {"io", "blkio"}:
        pytest.skip("this host has no io controller")
    disk = Path("/").stat().st_dev
    major, minor = os.major(disk), os.minor(disk)
    if major == 0:
        pytest.skip("the root file system is on no block device")
    cgroup = tree.create("io", CgroupLimits(None, None, None, io=((major, minor, 10 * MIB, 5 * MIB),)))
    try:
        assert cgroup.read_limits()["io"][0] == f"{major}:{minor} rbps={10 * MIB} wbps={5 * MIB}"
    finally:
        cgroup.remove()


def test_a_limit_that_the_kernel_refuses_names_the_control(tree: CgroupTree) -> None:
    with pytest.raises(errors.ControlNotEnforced) as caught:
        tree.create("bad", CgroupLimits(memory=None, pids=None, cpus=1))
    assert caught.value.details["control"] == "cpus"
    assert tree.leftovers() == []


def test_a_slot_name_is_used_once(tree: CgroupTree, cgroup: Cgroup) -> None:
    with pytest.raises(errors.HostFailed, match="File exists"):
        tree.create("slot", LIMITS)
    assert cgroup.read_limits()["pids"][0] == "20"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a\n", "é", "a" * 200])
def test_a_name_is_one_plain_component(tree: CgroupTree, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a cgroup"):
        tree.create(name, LIMITS)
    with pytest.raises(ValueError, match="cannot name a cgroup"):
        CgroupTree.open(name)


def test_membership(cgroup: Cgroup) -> None:
    with inside(cgroup, "import time; time.sleep(60)") as process:
        assert cgroup.contains(process.pid)
        assert not cgroup.contains(os.getpid())
        assert cgroup.processes() == [process.pid]
    assert not cgroup.contains(process.pid)
    assert cgroup.processes() == []


def test_usage_counts_cpu_and_memory(cgroup: Cgroup) -> None:
    with inside(cgroup, "x = b'x' * (20 << 20)\nn = 0\nwhile n < 3_000_000: n += 1") as process:
        process.wait()
    usage = cgroup.usage()
    assert usage.cpu_total_us > 20_000
    assert usage.cpu_user_us > 0
    assert cgroup.cpu_total() >= usage.cpu_total_us
    assert 20 * MIB <= usage.memory_peak <= 64 * MIB
    assert usage.pids_peak is None or usage.pids_peak >= 1
    cgroup.reset_peak()
    if cgroup.peak_is_resettable:
        assert cgroup.usage().memory_peak < 20 * MIB


def test_io_is_counted(cgroup: Cgroup, tmp_path: Path) -> None:
    file = tmp_path / "data"
    file_stat = tmp_path.stat().st_dev
    if os.major(file_stat) == 0:
        pytest.skip("the temporary directory is on no block device")
    flags = "os.O_CREAT | os.O_WRONLY | os.O_SYNC"
    code = f"import os\nos.write(os.open({str(file)!r}, {flags}), b'x' * 65536)"
    with inside(cgroup, code) as process:
        process.wait()
    assert cgroup.usage().io_written >= 65536


def test_an_oom_kill_is_counted(cgroup: Cgroup) -> None:
    assert (cgroup.oom_kills(), cgroup.memory_limit_hits()) == (0, 0)
    with inside(cgroup, "x = bytearray(256 << 20)") as process:
        assert process.wait() == -signal.SIGKILL
    assert cgroup.oom_kills() == 1
    assert cgroup.memory_limit_hits() > 0


def test_denied_forks_are_counted(cgroup: Cgroup) -> None:
    cgroup.set(CgroupLimits(memory=64 * MIB, pids=1, cpus=None))
    assert cgroup.pids_denied() == 0
    with inside(cgroup, "import os\ntry: os.fork()\nexcept BlockingIOError: raise SystemExit(7)") as process:
        assert process.wait() == 7
    assert cgroup.pids_denied() >= 1


def test_all_but_one_are_ended(cgroup: Cgroup) -> None:
    """Also when the others fork."""
    code = "import os, time\nif os.fork() == 0:\n while True:\n  try: os.fork()\n  except OSError: pass\n"
    with inside(cgroup, f"{code}time.sleep(60)") as process:
        until = time.monotonic() + 10
        while len(cgroup.processes()) < 10:
            assert time.monotonic() < until
        cgroup.kill(spare=process.pid)
        assert cgroup.processes() == [process.pid]
        assert process.poll() is None


def test_the_cgroup_that_somebody_else_made(tree: CgroupTree, cgroup: Cgroup) -> None:
    with inside(cgroup, "import time; time.sleep(60)") as process:
        found = tree.of_process("theirs", process.pid)
        assert found.processes() == [process.pid]
        assert found.contains(process.pid)
        assert found.read_limits() == cgroup.read_limits()
        found.set(CgroupLimits(memory=32 * MIB, pids=9, cpus=250))
        assert cgroup.read_limits()["memory"][0] == str(32 * MIB)
    with pytest.raises(errors.HostFailed):
        tree.of_process("the root", 2)  # kthreadd
    with pytest.raises(errors.HostFailed):
        tree.of_process("nobody", process.pid)


def test_a_fork_bomb_ends(tree: CgroupTree) -> None:
    cgroup = tree.create("bomb", CgroupLimits(memory=256 * MIB, pids=60, cpus=100))
    code = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
    with inside(cgroup, code):
        time.sleep(0.3)
        started = time.monotonic()
        cgroup.kill()
        assert time.monotonic() - started < 10 * PATIENCE
        assert cgroup.processes() == []
    cgroup.remove()


def test_a_stopped_or_frozen_process_ends(tree: CgroupTree, cgroup: Cgroup) -> None:
    with inside(cgroup, "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)") as process:
        freezer = next((path for path in cgroup.procs_files if "freezer" in path), cgroup.procs_files[0])
        if tree.version == 1:
            Path(freezer).with_name("freezer.state").write_text("FROZEN")
        else:
            Path(freezer).with_name("cgroup.freeze").write_text("1")
        cgroup.kill()
        assert process.wait(timeout=5 * PATIENCE) == -signal.SIGKILL


def test_the_cpu_limit_holds(cgroup: Cgroup) -> None:
    cgroup.set(CgroupLimits(memory=64 * MIB, pids=5, cpus=100))
    with inside(cgroup, "while True: pass"):
        before, start = cgroup.cpu_total(), time.monotonic()
        time.sleep(0.5)
        share = (cgroup.cpu_total() - before) / 1e6 / (time.monotonic() - start)
        assert share < 0.3
        cgroup.thaw_and_unthrottle()
        assert cgroup.read_limits()["cpu"][0] == "max"


def test_whoever_is_killed_gets_no_more_cpu(cgroup: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    thaw = cgroup.thaw_and_unthrottle

    def long_before_all_else() -> None:
        thaw()
        time.sleep(0.5)

    monkeypatch.setattr(cgroup, "thaw_and_unthrottle", long_before_all_else)
    cgroup.set(CgroupLimits(memory=64 * MIB, pids=20, cpus=20))
    with inside(cgroup, "import os\nfor _ in range(3): os.fork()\nwhile True: pass"):
        time.sleep(0.5)
        before = cgroup.cpu_total()
        cgroup.kill()
        assert cgroup.cpu_total() - before < 100_000


def test_remove_says_what_is_in_the_way_and_may_be_called_twice(cgroup: Cgroup) -> None:
    with inside(cgroup, "import time; time.sleep(60)") as process:
        with pytest.raises(errors.HostFailed, match="is busy") as caught:
            cgroup.remove()
        assert caught.value.details["processes"] == [process.pid]
    cgroup.kill()
    cgroup.remove()
    cgroup.remove()
    cgroup.kill()
    with pytest.raises(errors.HostFailed):
        cgroup.usage()


def test_leftovers_of_an_earlier_daemon_are_found_and_removed(tree: CgroupTree) -> None:
    left = tree.create("left", LIMITS)
    with inside(left, "import time; time.sleep(60)") as process:
        assert tree.leftovers() == []
        later = CgroupTree.open(tree.name)
        (found,) = later.leftovers()
        assert found.name == "left"
        assert found.contains(process.pid)
        found.kill()
        found.remove()
        assert process.wait(timeout=5 * PATIENCE) == -signal.SIGKILL
        assert later.leftovers() == []


def test_a_stray_tree_elsewhere_is_found_and_removed(tree: CgroupTree) -> None:
    mount = cgroupfs.detect().used[0].mount
    stray = Path(mount, f"test-elsewhere-{uuid.uuid4().hex[:8]}")
    top = stray / f"sandboxd-{tree.name}"
    (top / "lost").mkdir(parents=True)
    (found,) = tree.leftovers()
    assert found.name == "lost"
    found.kill()
    found.remove()
    tree.close()
    assert not top.exists()
    stray.rmdir()


def test_close_leaves_no_directory() -> None:
    tree = CgroupTree.open(f"test-{uuid.uuid4().hex[:12]}")
    top = Path(tree.place, f"sandboxd-{tree.name}")
    assert top.is_dir()
    tree.create("slot", LIMITS).remove()
    tree.close()
    tree.close()
    assert not top.exists()


def test_no_descriptor_is_left_open(tree: CgroupTree) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    cgroup = tree.create("fds", LIMITS)
    cgroup.reset_peak()
    cgroup.usage()
    cgroup.read_limits()
    cgroup.kill()
    cgroup.remove()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


MOUNTINFO_HYBRID = r"""
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /docker/x /sys/fs/cgroup/me\040mory ro,relatime - cgroup cgroup rw,memory
36 31 0:36 / /sys/fs/cgroup/pids rw,relatime shared:3 master:1 - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
garbage
"""
SELF_HYBRID = "5:pids:/\n4:memory:/docker/x/y\n2:cpu,cpuacct:/\n1:name=systemd:/a:b\n0::/\nnonsense\n"


def test_a_hybrid_host_is_v1() -> None:
    host = cgroupfs.detect(MOUNTINFO_HYBRID, SELF_HYBRID)
    assert host.version == 1
    assert host.controllers == {"cpu", "cpuacct", "memory", "pids"}
    memory = next(h for h in host.used if "memory" in h.controllers)
    assert memory.path_of(memory.own) == "/sys/fs/cgroup/me mory/y"
    assert memory.name_of("/sys/fs/cgroup/me mory/y/z") == "/docker/x/y/z"
    assert not memory.writable
    assert memory.path_of("/elsewhere") == memory.mount
    assert memory.path_of("/docker/x/../y") == memory.mount
    assert len([h for h in host.used if "cpu" in h.controllers]) == 1
    assert cgroupfs.parse_self_cgroup(SELF_HYBRID)["name=systemd"] == "/a:b"


def test_a_v2_host_is_v2(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory hugetlb pids\n")
    line = f"30 23 0:26 / {tmp_path} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
    host = cgroupfs.detect(line, "0::/system.slice/sandboxd.service\n")
    assert host.version == 2
    assert host.controllers == {"cpu", "io", "memory", "pids"}
    assert host.used[0].path_of(host.used[0].own) == f"{tmp_path}/system.slice/sandboxd.service"


def test_a_host_without_controllers_is_refused() -> None:
    with pytest.raises(errors.HostUnsupported, match="pids, cpu, cpuacct"):
        cgroupfs.detect("35 31 0:32 / /m rw - cgroup cgroup rw,memory\n", "4:memory:/\n")
    with pytest.raises(errors.HostUnsupported):
        cgroupfs.detect("", "")


def test_the_forms_of_v2_files() -> None:
    assert cgroup_v2.parse_cpu_max("max 100000\n") == "max"
    assert cgroup_v2.parse_cpu_max("50000 100000\n") == "500"
    text = "8:16 rbytes=1459200 wbytes=314773504 rios=192\n8:0 rbytes=90430464 wbytes=1 dbytes=50331648\n"
    assert cgroup_v2.parse_io_stat(text) == (91889664, 314773505)
    assert cgroup_v2.parse_io_stat("8:16 \n") == (0, 0)
    assert cgroupfs.keyed("low 0\nmax 7\noom_kill 2\n8:0 rbytes=1\n") == {"low": 0, "max": 7, "oom_kill": 2}


def test_a_tree_forgets_what_was_removed(tree: CgroupTree) -> None:
    for number in range(3):
        tree.create(f"slot{number}", CgroupLimits(memory=None, pids=None, cpus=None)).remove()
    assert tree._made == set()


FORKS = "import os, time\nfor _ in range(3):\n    os.fork()\nprint('forked', flush=True)\ntime.sleep(1000)"
COUNTS = "import time\nn = 0\nwhile True:\n    n += 1\n    print(n, flush=True)\n    time.sleep(0.001)"


def test_nothing_runs_while_a_cgroup_is_frozen(cgroup: Cgroup) -> None:
    with inside(cgroup, COUNTS) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        with cgroup.frozen():
            while process.stdout.read(1 << 16):
                pass
            time.sleep(0.1)
            assert not process.stdout.read(1 << 16)
        until(lambda: process.stdout is not None and process.stdout.read(1 << 16), "it goes on")


def test_a_part_ends_what_joined_it_and_what_that_forked_and_nothing_else(cgroup: Cgroup) -> None:
    with inside(cgroup, COUNTS) as other, inside(cgroup, FORKS) as process:
        part = cgroup.part("one")
        part.join(process.pid)
        assert process.pid in part.processes()
        assert other.pid not in part.processes()
        assert process.pid in cgroup.processes()  # those of its parts are its own
        assert cgroup.contains(process.pid)
        assert not part.remove()  # somebody is in it
        part.kill()
        assert part.processes() == []
        assert process.wait(10) == -signal.SIGKILL
        assert other.poll() is None
        assert part.remove()


def test_a_part_that_forks_as_fast_as_it_can_ends_too(cgroup: Cgroup) -> None:
    code = "import os, time\ntime.sleep(1)\n"
    code += "while True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    with inside(cgroup, code) as process:
        part = cgroup.part("bomb")
        part.join(process.pid)
        until(lambda: len(part.processes()) > 5, "it forks")
        part.kill()
        assert part.processes() == []
        assert part.remove()


def test_a_cgroup_goes_with_its_parts(tree: CgroupTree) -> None:
    cgroup = tree.create("whole", LIMITS)
    with inside(cgroup, COUNTS) as process:
        cgroup.part("left").join(process.pid)
        cgroup.part("empty")
        cgroup.kill()
        process.wait(10)
        cgroup.remove()
    assert not any(Path(path).parent.exists() for path in cgroup.procs_files)


def test_a_part_of_a_name_that_is_there_is_refused(cgroup: Cgroup) -> None:
    cgroup.part("one")
    with pytest.raises(errors.HostFailed, match="cannot make cgroup"):
        cgroup.part("one")
