"""Compiles the static binaries that go into every container, for wheels and editable installs alike.

The wheel is tagged with the platform: it holds machine code, but none that depends on Python or on the
host's libc. The compiler is what ``CC`` names, with the arguments it holds, else ``musl-gcc`` where it is,
else ``cc``. Programs of glibc, static ones too, ask the processor for its caches before they begin, by an
instruction that a virtual machine has to emulate: starting one takes half a millisecond there, one of
musl's a tenth.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ("-O2", "-static", "-Wall", "-Wextra", "-Werror", "-std=gnu11")
KERNEL_HEADERS = ("/usr/include", f"/usr/include/{sysconfig.get_config_var('MULTIARCH') or ''}")  # not musl's
BINARIES = {
    "sandboxd/init/init.c": "sandboxd/init/sandboxd-init",
    "sandboxd/init/container.c": "sandboxd/init/sandboxd-container",
    "sandboxd/init/launch.c": "sandboxd/init/sandboxd-launch",
}


def compile_binaries(root: Path) -> None:
    """Compile each source below ``root``. Raises RuntimeError with a sentence that says what to do."""
    if not sys.platform.startswith("linux"):
        raise RuntimeError("sandboxd runs on Linux only: its containers are made of Linux namespaces")
    compiler = shlex.split(os.environ.get("CC") or ("musl-gcc" if shutil.which("musl-gcc") else "cc"))
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(
            f"no C compiler: {compiler[0]} is not on PATH; install one with the static C library "
            "(Debian, Ubuntu: apt-get install gcc libc6-dev), or name one in CC"
        )
    headers = [word for directory in KERNEL_HEADERS for word in ("-idirafter", directory)]
    for source, binary in BINARIES.items():
        if not (root / source).is_file():
            raise RuntimeError(f"{source} is missing from the source tree")
        # A running daemon may have the old binary open or mounted, so it is replaced and never rewritten.
        fresh = root / f"{binary}.{os.getpid()}"
        try:
            built = subprocess.run(
                [*compiler, *FLAGS, *headers, "-o", str(fresh), str(root / source)],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                stdin=subprocess.DEVNULL,
            )
            if built.returncode:
                raise RuntimeError(f"{shlex.join(built.args)} failed:\n{built.stdout}{built.stderr}")
            fresh.chmod(0o755)
            fresh.replace(root / binary)
        finally:
            fresh.unlink(missing_ok=True)


class BinariesHook(BuildHookInterface[Any]):
    """Runs before hatchling collects the files of a wheel, editable or not."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002  -- hatchling's
        """Compile, and tag the wheel with the platform; a source distribution holds the sources."""
        if self.target_name != "wheel":
            return
        compile_binaries(Path(self.root))
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
