"""The shipped filters on the real kernel: every number of it, other ABIs, and everyday programs."""

from __future__ import annotations

import array
import errno
import os
import platform
import shutil
import socket
import struct
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import PATIENCE

from sandboxd.kernel.notify import DeniedCall, Listener, NotifyServer
from sandboxd.policy import abi, seccomp
from sandboxd.policy.seccomp import Program, compile_filter, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

NATIVE = Path(__file__).parents[1] / "native"
NOBODY = 65534
NATIVE_ARCH = abi.native()
BASES = ("strict", "default", "build")


def base(name: str) -> Program:
    return compile_filter(resolve(name, [], []))


@pytest.fixture(scope="module")
def native() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for program in ("filtered", "sweep"):
            subprocess.run(
                ["gcc", "-O1", "-static", "-o", folder / program, NATIVE / f"{program}.c"], check=True
            )
        yield folder


class Run:
    """A program under a filter: its output, and what was denied."""

    def __init__(self, process: subprocess.Popen[bytes], listener: Listener, install_ns: int) -> None:
        self.process, self.listener, self.install_ns = process, listener, install_ns

    @property
    def denied(self) -> list[str]:
        return [seccomp.describe(call.arch, call.nr, call.args)[1] for call in self.listener.counts()]


@contextmanager
def filtered(native: Path, program: Program, argv: list[str], *, cwd: Path | None = None) -> Iterator[Run]:
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.NamedTemporaryFile() as file, NotifyServer() as server:
        file.write(program.bpf)
        file.flush()
        process = subprocess.Popen(
            [native / "filtered", file.name, str(theirs.fileno()), str(NOBODY), *argv],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env={"PATH": "/usr/bin:/bin", "HOME": str(cwd or "/"), "LC_ALL": "C"},
        )
        with process:
            theirs.close()
            try:
                data, [(_, _, raw)], _, _ = ours.recvmsg(8, socket.CMSG_SPACE(4))
                [fd] = array.array("i", raw)
                listener = server.add(fd, answer=seccomp.answer)
                ours.send(b"g")
                yield Run(process, listener, struct.unpack("Q", data)[0])
            finally:
                process.kill()


def finish(run: Run) -> tuple[int, str, str]:
    out, err = run.process.communicate(timeout=90)
    return run.process.returncode, out.decode(errors="replace"), err.decode(errors="replace")


def sweep(native: Path, program: Program, *argv: str) -> tuple[dict[int, str], list[DeniedCall]]:
    with filtered(native, program, [str(native / "sweep"), *argv]) as run:
        status, out, err = finish(run)
        assert (status, err) == (0, "")
        results = dict(line.split() for line in out.splitlines())
        return {int(number): result for number, result in results.items()}, run.listener.counts()


@pytest.mark.parametrize("arg", [0, 2**64 - 1])
@pytest.mark.parametrize("name", BASES)
def test_every_number_is_judged_as_the_kernel_does(native: Path, name: str, arg: int) -> None:
    program = base(name)
    results, counts = sweep(native, program, "0", "480", hex(arg))
    assert set(results) == set(range(481))
    denied = {call.nr: call for call in counts}
    exempt = {NATIVE_ARCH.numbers.get(name) for name in abi.UNFILTERED} - denied.keys()
    assert {results[number] for number in exempt if number is not None} <= {"gone", str(errno.ENXIO)}
    for number, result in results.items():
        if number in exempt:
            continue
        verdict = program.judge(number, (arg,) * 6)
        assert (number in denied) == (verdict == "denied"), (number, result, verdict)
        if verdict == "denied":
            assert int(result) == seccomp.errno_for(number, NATIVE_ARCH.audit), number
            assert denied[number].args == (arg,) * 6
        elif verdict == "enosys":
            assert int(result) == errno.ENOSYS


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 alone has these ABIs")
def test_other_abis_are_closed_and_reported(native: Path) -> None:
    results, counts = sweep(native, base("build"), "0x40000000", "0x40000022", "0")
    assert set(results.values()) == {str(errno.ENOSYS)}
    assert {seccomp.describe(c.arch, c.nr, c.args)[0].partition(":")[0] for c in counts} == {"x32"}
    assert len(counts) == 0x23
    results, counts = sweep(native, base("build"), "1", "30", "0", "int80")
    if set(results.values()) != {"gone"}:  # a kernel without 32-bit emulation faults instead
        assert set(results.values()) == {str(errno.ENOSYS)}
        assert {call.arch for call in counts} == {0x40000003}
        assert len(counts) == 30


def test_installing_takes_little(native: Path) -> None:
    times = []
    for _ in range(5):
        with filtered(native, base("default"), ["true"]) as run:
            assert finish(run)[0] == 0
            times.append(run.install_ns)
    assert min(times) < 3_000_000 * PATIENCE, times


ATTACK = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    assert libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a) for a in args)) == -1
    print(ctypes.get_errno(), end=" ", flush=True)
master, slave = os.openpty()
text = ctypes.addressof(ctypes.create_string_buffer(b"x"))
"""
ATTACKS = {
    "call(NR['socket'], 17, 3, 768)": "socket(AF_PACKET, SOCK_RAW, 768)",
    "call(NR['socket'], 2, 3, 1)": "socket(AF_INET, SOCK_RAW, 1)",
    "call(NR['socket'], 1 << 32 | 40, 1, 0)": "socket(AF_VSOCK, SOCK_STREAM)",
    "call(NR['socket'], 38, 5, 0)": "socket(AF_ALG, SOCK_SEQPACKET)",
    "call(NR['ioctl'], slave, 0x5412, text)": "ioctl(TIOCSTI)",
    "call(NR['ioctl'], slave, 1 << 32 | 0x5412, text)": "ioctl(TIOCSTI)",
    "call(NR['clone'], 0x10000011, 0, 0, 0, 0)": "clone(CLONE_NEWUSER)",
    "call(NR['unshare'], 0x10000000)": "unshare(CLONE_NEWUSER)",
    "call(NR['personality'], 0x0040000)": "personality(0x40000)",
    "call(NR['prctl'], 35, 1, 0, 0, 0)": "prctl(PR_SET_MM)",
    "call(NR['mknodat'], 0, text, 0x2180, 0x103)": "mknodat(S_IFCHR)",
    "call(NR['seccomp'], 1, 8, 0)": "seccomp(1, 8)",
    "call(NR['ptrace'], 0, 0, 0, 0)": "ptrace(0, 0)",
    "call(NR['keyctl'], 0, 0, 0, 0, 0)": "keyctl(0, 0)",
    "call(NR['io_uring_setup'], 1, text)": "io_uring_setup",
    "call(NR['userfaultfd'], 1)": "userfaultfd",
}


@pytest.mark.parametrize("name", BASES)
def test_attacks_by_argument_are_denied_and_named(native: Path, name: str) -> None:
    for attack, detail in ATTACKS.items():
        code = f"NR = {NATIVE_ARCH.numbers!r}{ATTACK}{attack}"
        with filtered(native, base(name), ["python3", "-c", code]) as run:
            status, out, err = finish(run)
            assert (status, out, err, run.denied) == (0, f"{errno.EPERM} ", "", [detail])


PYTHON = """
import threading, subprocess, sqlite3, tempfile, os, socket, asyncio, time, resource
threads = [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert subprocess.run(["sh", "-c", "echo hi | cat"], capture_output=True).stdout == b"hi\\n"
with tempfile.TemporaryDirectory() as d:
    db = sqlite3.connect(d + "/x.db"); db.execute("pragma journal_mode=wal"); db.execute("create table t(x)")
    db.executemany("insert into t values(?)", [(i,) for i in range(100)]); db.commit(); db.close()
a, b = socket.socketpair(); a.send(b"x"); b.recv(1)
async def main():
    await asyncio.sleep(0.01)
    p = await asyncio.create_subprocess_exec("true"); await p.wait()
asyncio.run(main())
resource.getrlimit(resource.RLIMIT_NOFILE); os.cpu_count(); os.urandom(8)
"""
MORE_PYTHON = """
import multiprocessing as m, socket, os, shutil
with m.get_context("fork").Pool(2) as p: assert p.map(abs, [-1, 2]) == [1, 2]
q = m.get_context("fork").Queue(); q.put(1); assert q.get() == 1
s = socket.create_server(("127.0.0.1", 0)); c = socket.create_connection(s.getsockname())
s.accept()[0].send(b"x"); assert c.recv(1) == b"x"
socket.getaddrinfo("localhost", 80); socket.if_nameindex()
os.mkfifo("fifo"); os.sync(); shutil.copytree("/usr/share/common-licenses", "copy")
"""
BASH = """
diff <(seq 3) <(seq 3) && sleep 0.01 & wait
x=$(date); test -n "$x"
"""
SHELL = """
ls -la /usr/bin | sort -k5 -n | tail -3 | wc -l
cat <<HERE
x
HERE
cp -r /usr/share/common-licenses d; mv d e; rm -r e; df . >/dev/null; id; uname -a; nproc; sleep 0.01
"""
FILES = """
set -e
cp -a /usr/share/common-licenses d; mkfifo f; ls -la d; find . -newer f; stat d; du -s .; ln -s d l
chmod 700 d; sync d
"""
TAR = "tar czf x.tgz -C /usr/share common-licenses && mkdir o && tar xzf x.tgz -C o && gzip -l x.tgz"
GIT = """
set -e
git init -q .; echo x > x; git add x
git -c user.name=x -c user.email=x@x commit -qm x
git log --oneline; git gc -q; git status
"""
GCC = """
set -e
printf '#include <stdio.h>\\nint main(void) { puts("hi"); }\\n' > a.c
gcc -O2 -pipe -o a a.c; ./a; gcc -g -c a.c -o b.o; ar rc l.a b.o
printf 'all:\\n\\tgcc -o c a.c\\n' > Makefile; make -j2 all
"""
PERL = "print `echo x`; my $p = fork // die; exit 0 if !$p; wait;"
GETPID = str(NATIVE_ARCH.numbers["getpid"])
EVERYDAY = {
    "static C": ("strict", ["{native}/sweep", GETPID, GETPID, "0"]),
    "sh": ("strict", ["sh", "-c", SHELL]),
    "bash": ("strict", ["bash", "-c", BASH]),
    "python": ("strict", ["python3", "-c", PYTHON]),
    "more python": ("default", ["python3", "-c", MORE_PYTHON]),
    "files": ("default", ["sh", "-c", FILES]),
    "tar": ("default", ["sh", "-c", TAR]),
    "git": ("default", ["sh", "-c", GIT]),
    "perl": ("default", ["perl", "-e", PERL]),
    "gcc": ("build", ["sh", "-c", GCC]),
}


@pytest.mark.parametrize("what", list(EVERYDAY))
def test_everyday_programs_run_and_nothing_of_theirs_is_denied(native: Path, what: str) -> None:
    name, argv = EVERYDAY[what]
    argv = [word.replace("{native}", str(native)) for word in argv]
    assert shutil.which(argv[0]), f"{argv[0]} is not installed"
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, NOBODY)
        with filtered(native, base(name), argv, cwd=Path(folder)) as run:
            status, out, err = finish(run)
            assert (status, err, run.denied) == (0, "", []), out
