"""Building a recipe: mmdebstrap installs the packages, then the tree is made the same each time.

mmdebstrap runs in a mount and a PID namespace of its own that die with us (``--pdeathsig``,
``--kill-child``), with its scratch space inside the store's ``tmp``: a build that fails, is killed,
or loses its daemon leaves no process and no mount, and its files go with the ``tmp`` entry.

The same packages give the same digest. What differs between two runs is taken care of here: logs and
caches, backups of dpkg and of the password files, the age of passwords, the machine id, and Python's
bytecode. That is compiled again in one order with ``unchecked-hash``, so that it holds no time, is
the same each time, and is used on the read-only root without a look at its source.
"""

from __future__ import annotations

import collections
import contextlib
import os
import subprocess
import threading
from typing import TYPE_CHECKING

from sandboxd.errors import HostUnsupported, ImageInvalid
from sandboxd.images.rootfs import Rootfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sandboxd.images.recipe import Recipe

__all__ = ["build_into"]

TIMEOUT = 1800.0
"""Seconds that a build may take."""
_EPOCH = "1"
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "ftp_proxy", "all_proxy")
_VARYING = (
    "/etc/*-",
    "/etc/machine-id",
    "/var/lib/dbus/machine-id",
    "/var/cache/*",
    "/var/log/*",
    "/var/tmp/*",  # noqa: S108  the image's
    "/var/backups/*",
    "/var/lib/apt/lists/*",
    "/var/lib/dpkg/*-old",
    "/var/lib/dpkg/lock*",
    "/var/lib/dpkg/triggers/Lock",
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/catalog/*",
    "/root/.*",
)
_FILES = {
    "/etc/machine-id": "",
    "/etc/hostname": "sandbox\n",
    "/etc/hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    "/etc/resolv.conf": "",
}
_USER = "sandbox:x:1000:1000:sandbox:/tmp:/bin/sh\n"
_GROUP = "sandbox:x:1000:\n"
# The hook's own shell line: quoting is the shell's, nothing of a recipe enters it.
_BYTECODE = (
    'for python in "$1"/usr/bin/python3.[0-9]*; do '
    'case "$python" in *-config|*"[0-9]"*) continue ;; esac; '
    'version="${python##*/python}"; '
    'find "$1/usr/lib/python3" "$1/usr/lib/python$version" -name "*.pyc" -delete; '
    'PYTHONHASHSEED=0 chroot "$1" "/usr/bin/python$version" -m compileall -q -f '
    '--invalidation-mode unchecked-hash /usr/lib/python3 "/usr/lib/python$version" >/dev/null || true; '
    "done"
)


def build_into(recipe: Recipe, work: Path, cache: Path, progress: Callable[[str], None]) -> None:
    """Build ``recipe`` to ``work/rootfs``; ``cache`` keeps downloaded packages between builds.

    Raises ImageInvalid with mmdebstrap's last lines, HostUnsupported where it is missing.
    """
    cache.mkdir(mode=0o700, exist_ok=True)
    scratch = work / "scratch"
    scratch.mkdir(mode=0o755)
    _run(_command(recipe, work, cache), scratch, progress)
    progress("making the tree reproducible")
    _settle(recipe, work / "rootfs")


def _command(recipe: Recipe, work: Path, cache: Path) -> list[str]:
    command = ["setpriv", "--pdeathsig", "KILL", "--"]
    command += ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
    command += ["mmdebstrap", "--mode=root", f"--variant={recipe.variant}", "--format=directory"]
    command += [f"--components={','.join(recipe.components)}"]
    if recipe.packages:
        command.append(f"--include={','.join(recipe.packages)}")
    command.append('--aptopt=APT::Install-Recommends "false"')
    # Includes after excludes: dpkg takes the last pattern that matches.
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in recipe.exclude]
    command += [f"--dpkgopt=path-include={pattern}" for pattern in recipe.keep]
    command += [
        # As mmdebstrap(1) has it for a cache that outlives a build.
        "--skip=essential/unlink",
        '--setup-hook=mkdir -p "$1"/var/cache/apt/archives/',
        f"--setup-hook=sync-in {_quoted(cache)} /var/cache/apt/archives/",
        f"--customize-hook=sync-out /var/cache/apt/archives {_quoted(cache)}",
        f"--customize-hook={_BYTECODE}",
        recipe.suite,
        str(work / "rootfs"),
    ]
    if recipe.mirror is not None:
        command.append(recipe.mirror)
    return command


def _quoted(path: Path) -> str:
    """A path as mmdebstrap's own hooks take it: one word in quotes."""
    text = str(path)
    if "'" in text or "\n" in text:
        raise ImageInvalid(f"mmdebstrap cannot use a state directory named {text!r}")
    return f"'{text}'"


def _run(command: list[str], scratch: Path, progress: Callable[[str], None]) -> None:
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        "TMPDIR": str(scratch),
        "SOURCE_DATE_EPOCH": _EPOCH,
        "PYTHONHASHSEED": "0",
        **{name: os.environ[name] for name in _PROXIES if name in os.environ},
    }
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            umask=0o022,  # whoever starts us may have another, and modes are part of the digest
        )
    except FileNotFoundError:
        raise HostUnsupported("setpriv is missing; install it with `apt-get install util-linux`") from None
    last: collections.deque[str] = collections.deque(maxlen=12)
    with process, _bounded(process) as late:
        assert process.stderr is not None  # noqa: S101  it was asked for
        for line in process.stderr:
            text = line.strip()[:500]
            last.append(text)
            # Its hooks are our own plumbing, and its warnings are about a layout that we chose.
            if text.startswith("I: ") and not text.startswith(("I: running --", "I: running special")):
                progress(text[3:])
        status = process.wait()
    if status == 0:
        return
    if late.is_set():
        raise ImageInvalid(f"mmdebstrap took more than {TIMEOUT:.0f} s")
    said = "\n".join(last)
    if "failed to execute mmdebstrap" in said:
        raise HostUnsupported("mmdebstrap is missing; install it with `apt-get install mmdebstrap`")
    raise ImageInvalid(f"mmdebstrap failed with status {status}:\n{said}")


@contextlib.contextmanager
def _bounded(process: subprocess.Popen[str]) -> Iterator[threading.Event]:
    """Kill the build where it takes too long (the event is set then) or where we fail."""
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(TIMEOUT, end)
    timer.daemon = True
    timer.start()
    try:
        yield late
    except BaseException:
        process.kill()
        raise
    finally:
        timer.cancel()


def _settle(recipe: Recipe, path: Path) -> None:
    """Remove what differs from run to run, write what every image of ours has."""
    with Rootfs(path) as rootfs:
        for pattern in (*_VARYING, *recipe.remove):
            for found in sorted(path.glob(pattern.lstrip("/"))):
                rootfs.remove(str(found.relative_to(path)))
        for name, line in {"etc/passwd": _USER, "etc/group": _GROUP}.items():
            text = rootfs.read(name.encode(), 1 << 20) or b""
            rootfs.write(name, text + line.encode())
        for name in ("etc/shadow", "etc/gshadow"):
            rootfs.remove(name)  # nobody logs in, and it holds the day of the build
        for name, content in {**_FILES, **recipe.files}.items():
            rootfs.write(name, content.encode())
        rootfs.normalise()
