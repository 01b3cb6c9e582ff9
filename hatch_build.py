"""Compiles the static binaries that go into every container, for wheels and editable installs alike.

One wheel serves x86-64 and arm64: its binaries depend neither on Python nor on the host's libc. Those of the
machine that builds are always made; those of the other where its cross compiler is installed, and then the
wheel is tagged for both. With ``SANDBOXD_ARCHES=all``, as a release is built, they have to be.

Compilers are what ``CC`` and ``CC_MACHINE`` name, with the arguments they hold
(``CC_aarch64="zig cc -target aarch64-linux-musl"``), else ``musl-gcc`` where it is, or ``cc``, and
``MACHINE-linux-gnu-gcc``. Programs of glibc, static ones too, ask an x86-64 processor for its caches before
they begin, by an instruction that a virtual machine has to emulate: to start one takes half a millisecond
there, one of musl's a tenth.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

if TYPE_CHECKING:
    from collections.abc import Callable

# -s and no build id: the same sources and compiler give the same bytes, in whatever directory
FLAGS = ("-O2", "-static", "-s", "-Wl,--build-id=none", "-Wall", "-Wextra", "-Werror", "-std=gnu11")
DIRECTORY = "sandboxd/init"
PROGRAMS = {"init.c": "sandboxd-init", "container.c": "sandboxd-container", "launch.c": "sandboxd-launch"}
MACHINES = {"x86_64": 62, "aarch64": 183}
"""``uname -m`` of what sandboxd runs on, with its ``e_machine`` of elf(5)."""
PACKAGES = {"x86_64": "gcc-x86-64-linux-gnu", "aarch64": "gcc-aarch64-linux-gnu"}
GLIBC = "manylinux_2_17"  # what the oldest Python that sandboxd supports is built for; the binaries need none


def compile_binaries(root: Path, say: Callable[[str], None]) -> list[str]:
    """Compile the sources below ``root``; returns the machines that there are binaries for.

    Raises RuntimeError with a sentence that says what to do.
    """
    here = platform.machine()
    if not sys.platform.startswith("linux"):
        raise RuntimeError("sandboxd runs on Linux only: its containers are made of Linux namespaces")
    if here not in MACHINES:
        raise RuntimeError(f"sandboxd runs on {' and '.join(MACHINES)}, and this machine is {here}")
    asked = os.environ.get("SANDBOXD_ARCHES") or "native"
    if asked not in {"native", "all"}:
        raise RuntimeError(f"SANDBOXD_ARCHES is {asked!r}; it can be 'native' (the default) or 'all'")
    made = []
    for machine in sorted(MACHINES, key=lambda each: each != here):
        compiler = _compiler(machine, native=machine == here)
        if shutil.which(compiler[0]) is not None:
            for source, program in PROGRAMS.items():
                _compile(compiler, machine, root / DIRECTORY / source, root / DIRECTORY / machine / program)
            made.append(machine)
            continue
        if machine == here:
            raise RuntimeError(
                f"no C compiler: {compiler[0]} is not on PATH; install one with the static C library "
                "(Debian, Ubuntu: apt-get install gcc libc6-dev), or name one in CC"
            )
        lacking = (
            f"no compiler for {machine}: {compiler[0]} is not on PATH "
            f"(Debian, Ubuntu: apt-get install {PACKAGES[machine]}; or name one in CC_{machine})"
        )
        if asked == "all":
            raise RuntimeError(lacking)
        shutil.rmtree(root / DIRECTORY / machine, ignore_errors=True)  # of an older source, it may be
        say(f"built for {here} alone; {lacking}")
    return made


def _compiler(machine: str, *, native: bool) -> list[str]:
    if named := os.environ.get("CC" if native else f"CC_{machine}"):
        return shlex.split(named)
    if not native:
        return [f"{machine}-linux-gnu-gcc"]
    if shutil.which("musl-gcc") is None:
        return ["cc"]
    headers = ("/usr/include", f"/usr/include/{machine}-linux-gnu")  # of the kernel: musl has none
    return ["musl-gcc", *(word for directory in headers for word in ("-idirafter", directory))]


def _compile(compiler: list[str], machine: str, source: Path, binary: Path) -> None:
    if not source.is_file():
        raise RuntimeError(f"{DIRECTORY}/{source.name} is missing from the source tree")
    binary.parent.mkdir(exist_ok=True)
    # A running daemon may have the old binary open or mounted, so it is replaced and never rewritten.
    fresh = binary.with_name(f"{binary.name}.{os.getpid()}")
    try:
        built = subprocess.run(
            [*compiler, *FLAGS, "-o", str(fresh), str(source)],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if built.returncode:
            raise RuntimeError(f"{shlex.join(built.args)} failed:\n{built.stdout}{built.stderr}")
        if int.from_bytes(fresh.read_bytes()[18:20], "little") != MACHINES[machine]:
            raise RuntimeError(f"{shlex.join(compiler)} does not compile for {machine}")
        fresh.chmod(0o755)
        # what a daemon reads in a receipt is whether PID 1 is this file
        if not binary.is_file() or binary.read_bytes() != fresh.read_bytes():
            fresh.replace(binary)
    finally:
        fresh.unlink(missing_ok=True)


class BinariesHook(BuildHookInterface[Any]):
    """Runs before hatchling collects the files of a wheel, editable or not."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002  -- hatchling's
        """Compile, and tag the wheel with what it runs on; a source distribution holds the sources."""
        if self.target_name != "wheel":
            return
        made = compile_binaries(Path(self.root), self.app.display_warning)
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + ".".join(sorted(f"{GLIBC}_{machine}" for machine in made))
