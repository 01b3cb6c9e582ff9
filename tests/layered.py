"""Stacks of layers that a real overlay made, and what the kernel shows of a stack."""

# ruff: noqa: PTH103, PTH108, PTH115, PTH120, PTH123, PTH208  -- a Path cannot hold names that are no text

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from sandboxd.kernel import mounts
from sandboxd.workspace.view import View

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Shown = dict[bytes, tuple[object, ...]]
"""What is at each path: kind, mode, ids, content or target."""

NAMES = st.sampled_from([b"a", b"b", b"c", b"a.txt", b"\xff", b"%41", b"d e"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(b"/".join)
OPERATIONS = st.one_of(
    st.tuples(st.just("write"), PATHS, st.binary(max_size=6)),
    st.tuples(st.just("mkdir"), PATHS, st.sampled_from([b"\1", b"\2"])),
    st.tuples(st.just("remove"), PATHS, st.just(b"")),
    st.tuples(st.just("empty"), PATHS, st.just(b"")),
    st.tuples(st.just("symlink"), PATHS, PATHS),
    st.tuples(st.just("chmod"), PATHS, st.sampled_from([b"\1", b"\2"])),
    st.tuples(st.just("chown"), PATHS, st.just(b"")),
    st.tuples(st.just("rename"), PATHS, PATHS),
    st.tuples(st.just("link"), PATHS, PATHS),
    st.tuples(st.just("fifo"), PATHS, st.just(b"")),
)
HISTORIES = st.lists(st.lists(OPERATIONS, max_size=8), min_size=1, max_size=5)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A directory as a descriptor."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def mounted(layers: Sequence[Path], upper: Path | None = None) -> Iterator[int]:
    """An overlay of the layers, the uppermost first, as a descriptor of its root; it is at no path."""
    lower = list(layers)
    with contextlib.ExitStack() as stack:
        if upper is None and len(lower) < 2:  # one layer alone is no overlay
            empty = (layers[0].parent if layers else Path("/nowhere")) / "nothing"
            empty.mkdir(exist_ok=True)
            lower.append(empty)
        options: dict[str, str | None] = {}
        for path in lower:
            fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
            stack.callback(os.close, fd)
            options["lowerdir"] = ":".join(filter(None, (options.get("lowerdir"), f"/proc/self/fd/{fd}")))
        if upper is not None:
            work = upper.parent / f"{upper.name}.work"
            work.mkdir()
            stack.callback(shutil.rmtree, work)
            options |= {"upperdir": str(upper), "workdir": str(work)}
        mount = mounts.new_mount("overlay", options)
        try:
            root = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=mount)
        finally:
            os.close(mount)
        try:
            yield root
        finally:
            os.close(root)


@dataclass
class Stacked:
    """Layers in a directory; each is what one turn of changes left in the upper layer of an overlay."""

    directory: Path
    layers: list[Path] = field(default_factory=list)
    """The uppermost first."""

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.layers:
            bottom = self.directory / "layer0"
            bottom.mkdir()
            self.layers.append(bottom)

    @contextlib.contextmanager
    def change(self) -> Iterator[int]:
        """A new layer: what is done to the descriptor's directory meanwhile."""
        upper = self.directory / f"layer{len(self.layers)}"
        upper.mkdir()
        below = self.layers[0].stat()
        os.chown(upper, below.st_uid, below.st_gid)
        upper.chmod(stat.S_IMODE(below.st_mode))
        with mounted(self.layers, upper) as root:
            yield root
        self.layers.insert(0, upper)

    def turn(self, operations: Sequence[tuple[str, bytes, bytes]]) -> None:
        """A new layer made by operations; those that the kernel refuses have no effect."""
        with self.change() as root:
            for name, path, detail in operations:
                with contextlib.suppress(OSError):
                    operate(root, name, path, detail)


def operate(root: int, name: str, path: bytes, detail: bytes) -> None:  # noqa: C901, PLR0912  one case each
    """One change to a tree. Raises OSError."""
    here = f"/proc/self/fd/{root}/".encode()
    if name in {"write", "mkdir", "symlink", "fifo"}:
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(here + path))
    match name:
        case "write":
            fd = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=root
            )
            os.write(fd, detail)
            os.close(fd)
        case "mkdir":
            os.mkdir(path, 0o700 + detail[0], dir_fd=root)
        case "symlink":
            os.symlink(detail, path, dir_fd=root)
        case "fifo":
            os.mkfifo(path, dir_fd=root)
        case "chmod":
            if not stat.S_ISLNK(os.lstat(here + path).st_mode):
                os.chmod(path, 0o600 + detail[0], dir_fd=root)
        case "chown":
            os.chown(path, 1000, 1001, dir_fd=root, follow_symlinks=False)
        case "rename":
            os.rename(path, detail, src_dir_fd=root, dst_dir_fd=root)
        case "link":
            os.link(path, detail, src_dir_fd=root, dst_dir_fd=root, follow_symlinks=False)
        case "remove":
            remove(here + path)
        case "empty":
            for one in os.listdir(here + path):
                remove(here + path + b"/" + one)


def remove(path: bytes) -> None:
    """Remove a file or tree."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def shown_by_kernel(root: int) -> Shown:
    """Every file beneath a directory, as the kernel tells it; the root has an empty path."""
    here = f"/proc/self/fd/{root}".encode()
    found: Shown = {}
    pending = [b""]
    while pending:
        path = pending.pop()
        place = here + b"/" + path
        status = os.lstat(place) if path else os.fstat(root)
        ids = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
        if stat.S_ISDIR(status.st_mode):
            found[path] = ("directory", *ids)
            pending += [path + b"/" + name if path else name for name in os.listdir(place)]
        elif stat.S_ISREG(status.st_mode):
            with open(place, "rb") as file:
                found[path] = ("file", *ids, file.read())
        elif stat.S_ISLNK(status.st_mode):
            found[path] = ("symlink", *ids, os.readlink(place))
        else:
            found[path] = (stat.S_IFMT(status.st_mode), *ids)
    return found


def shown(layers: Sequence[Path]) -> Shown:
    """What the kernel shows of a stack."""
    with mounted(layers) as root:
        return shown_by_kernel(root)


def viewed(layers: Sequence[Path]) -> Shown:
    """What ``View`` shows of a stack, in the same form."""
    formats = {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "device": stat.S_IFCHR}
    found: Shown = {}
    with View(layers) as view:
        for entry in [view.root(), *view.walk()]:
            ids = (entry.mode, entry.uid, entry.gid)
            match entry.kind:
                case "file":
                    found[entry.path] = ("file", *ids, b"".join(view.content(entry)))
                case "symlink":
                    found[entry.path] = ("symlink", *ids, view.target(entry))
                case "directory":
                    found[entry.path] = ("directory", *ids)
                case kind:
                    found[entry.path] = (formats[kind], *ids)
    return found
