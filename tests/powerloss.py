"""What a disk may hold when the power goes: rebuilt from the record of ``faultfs``, at any point of it.

Theory of operation.  A file has what was synced, and writes since then, of which the disk may have each, or
not, or a part. A directory has the names that were synced, and changes since then, of which it may have the
first ones: names are journaled in order. A file's sync says nothing of its name, nor a directory's of what
is in its files. That is less than most file systems promise, and all that POSIX does. A rename from one
directory to another loses the file in neither. The owner, mode, time and attributes of a node are as what is
written to a file: each may be there or not, until it was synced.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["How", "Replay"]

How = Literal["nothing", "everything", "some"]
"""How much reached the disk of what was not synced."""
SECTOR = 512
LEFT_OUT = "-shm"  # SQLite makes it anew, and the kernel writes it whenever it likes


Meta = dict[str, Any]
"""What else is known of a node: ``mode``, ``owner``, ``mtime``, and attributes by their names."""


@dataclass(eq=False, kw_only=True)
class _Node:
    meta: Meta
    changed: list[tuple[str, Any]] = field(default_factory=list)
    """What is not synced yet of that."""

    def sync(self) -> None:
        self.meta.update(self.changed)
        self.changed.clear()

    def dress(self, path: Path, how: How, chance: random.Random) -> None:
        """Give it to what is at a path."""
        meta = dict(self.meta)
        meta.update(
            change
            for change in self.changed
            if how == "everything" or (how == "some" and chance.random() < 0.6)
        )
        if "owner" in meta:
            os.chown(path, *meta["owner"], follow_symlinks=False)
        for name, value in meta.items():
            if "." in name and value is not None:
                os.setxattr(path, name, value, follow_symlinks=False)
        if not path.is_symlink():
            path.chmod(stat.S_IMODE(meta["mode"]))
        if "mtime" in meta:
            os.utime(path, ns=(meta["mtime"], meta["mtime"]), follow_symlinks=False)


@dataclass(eq=False, kw_only=True)
class _File(_Node):
    """A file, or where ``mode`` says so, a link or a device."""

    target: str = ""
    synced: bytearray = field(default_factory=bytearray)
    since: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Offset and bytes that were written there; None: a new size."""

    def sync(self) -> None:
        super().sync()
        for change in self.since:
            _put(self.synced, *change)
        self.since.clear()

    def found(self, how: How, chance: random.Random) -> bytearray:
        data = bytearray(self.synced)
        for offset, written in self.since:
            if how == "everything" or (how == "some" and chance.random() < 0.6):
                part = written
                if written is not None and how == "some" and chance.random() < 0.2:
                    part = written[: chance.randrange(0, len(written) + 1, SECTOR)]
                _put(data, offset, part)
        return data

    def make(self, path: Path, how: How, chance: random.Random) -> None:
        """Make it, at a path where nothing is."""
        kind = stat.S_IFMT(self.meta["mode"])
        if kind == stat.S_IFLNK:
            path.symlink_to(self.target)
        elif kind in {0, stat.S_IFREG}:
            path.write_bytes(self.found(how, chance))
        else:
            os.mknod(path, kind | 0o600, os.makedev(0, 0))
        self.dress(path, how, chance)


def _put(data: bytearray, offset: int, written: bytes | None) -> None:
    if written is None:
        del data[offset:]
        data.extend(bytes(offset - len(data)))
    elif written:
        data.extend(bytes(max(0, offset - len(data))))
        data[offset : offset + len(written)] = written


@dataclass(eq=False)
class _Change:
    """A name in a directory is another node, or with None no more; that only if ``after`` happened."""

    name: str
    node: _File | _Directory | None
    after: _Change | None = None
    synced: bool = False


@dataclass(eq=False, kw_only=True)
class _Directory(_Node):
    names: dict[str, _File | _Directory] = field(default_factory=dict)
    """As whoever looks now sees them."""
    synced: dict[str, _File | _Directory] = field(default_factory=dict)
    since: list[_Change] = field(default_factory=list)

    def change(self, change: _Change) -> _Change:
        _name(self.names, change)
        self.since.append(change)
        return change

    def sync(self) -> None:
        super().sync()
        for change in self.since:
            _name(self.synced, change)
            change.synced = True
        self.since.clear()

    def found(self, happened: set[_Change]) -> dict[str, _File | _Directory]:
        names = dict(self.synced)
        for change in self.since:
            after = change.after
            if change in happened and (after is None or after.synced or after in happened):
                _name(names, change)
        return names


def _name(names: dict[str, _File | _Directory], change: _Change) -> None:
    if change.node is None:
        names.pop(change.name, None)
    else:
        names[change.name] = change.node


class Replay:
    """A disk, empty at first, that does again what was recorded, one ``step`` after the other."""

    def __init__(self) -> None:
        self._root = _Directory(meta={"mode": 0o755})
        self._files: dict[int, _File] = {}

    def _parent(self, path: str) -> tuple[_Directory, str]:
        found: Any = self._root
        for name in PurePosixPath(path).parts[1:-1]:
            found = found.names[name]
        return found, PurePosixPath(path).name

    def _node(self, path: str) -> Any:
        directory, name = self._parent(path)
        return directory.names[name] if name else self._root

    def step(self, operation: str, *what: Any) -> None:  # noqa: C901, PLR0912  (one case for each operation)
        """Do one thing again."""
        match operation, what:
            case "create", (path, number, mode):
                self._files[number] = _File(meta={"mode": mode})
                self._name(path, self._files[number])
            case "mkdir", (path, mode):
                self._name(path, _Directory(meta={"mode": mode}))
            case "node", (path, mode, target):
                self._name(path, _File(meta={"mode": mode}, target=target))
            case "write", (number, offset, data):
                self._files[number].since.append((offset, data))
            case "truncate", (number, size):
                self._files[number].since.append((size, None))
            case "chmod", (path, mode):
                self._node(path).changed.append(("mode", mode))
            case "chown", (path, uid, gid):
                self._own(self._node(path), uid, gid)
            case "utime", (path, at):
                self._node(path).changed.append(("mtime", at))
            case "setxattr", (path, name, value):
                self._node(path).changed.append((name, value))
            case "syncfs", ():
                for node in _all(self._root):
                    node.sync()
            case "fsync", (number,):
                self._files[number].sync()
            case "fsyncdir", (path,):
                self._node(path).sync()
            case "link", (source, target):
                self._name(target, self._node(source))
            case (("unlink" | "rmdir"), (path,)):
                self._name(path, None)
            case "rename", (old, new):
                self._rename(old, new)
            case _:
                raise ValueError(operation)

    @staticmethod
    def _own(node: _Node, uid: int, gid: int) -> None:
        """-1 leaves what is: of what is known now, which a crash may undo one by one."""
        before = {**node.meta, **dict(node.changed)}.get("owner", (0, 0))
        node.changed.append(("owner", (before[0] if uid == -1 else uid, before[1] if gid == -1 else gid)))

    def _name(self, path: str, node: _File | _Directory | None) -> None:
        directory, name = self._parent(path)
        directory.change(_Change(name, node))

    def _rename(self, old: str, new: str) -> None:
        (source, old_name), (target, new_name) = self._parent(old), self._parent(new)
        there = target.change(_Change(new_name, source.names[old_name]))
        source.change(_Change(old_name, None, after=there))

    def losses(
        self, record: Sequence[tuple[Any, ...]], number: int, directory: Path, chance: random.Random
    ) -> Iterator[tuple[Path, int, str]]:
        """What the power left at so many moments of a record, 0: at each: where, when, and which that was."""
        moments = set(chance.sample(range(len(record)), number) if number else range(len(record)))
        for at, (moment, *what) in enumerate(record):
            if at in moments:
                how: How = chance.choice(get_args(How))
                left = directory / f"{at}-{how}"
                self.leave(left, how, chance)
                yield left, moment, f"moment {at} of {len(record)}, {how}"
            self.step(*what)

    def leave(self, directory: Path, how: How, chance: random.Random) -> None:
        """Write to a directory what the disk may hold if the power goes now."""
        happened: set[_Change] = set()
        for node in _all(self._root):
            if not isinstance(node, _Directory):
                continue
            number = {"nothing": 0, "everything": len(node.since)}.get(how)
            kept = chance.randint(0, len(node.since)) if number is None else number
            happened.update(node.since[:kept])
        left, made = [(self._root, directory)], dict[_File, "Path"]()
        directories: list[tuple[_Directory, Path]] = []
        while left:
            node, at = left.pop()
            at.mkdir(exist_ok=True)
            directories.append((node, at))
            for name, child in node.found(happened).items():
                if isinstance(child, _Directory):
                    left.append((child, at / name))
                elif child in made:
                    os.link(made[child], at / name, follow_symlinks=False)
                elif not name.endswith(LEFT_OUT):
                    made[child] = at / name
                    child.make(at / name, how, chance)
        for node, at in reversed(directories):  # what is in them is made: their times are their own
            node.dress(at, how, chance)


def _all(root: _Directory) -> list[_File | _Directory]:
    """Every node that is, was, or may be there."""
    found: dict[_File | _Directory, None] = {root: None}
    left = [root]
    while left:
        node = left.pop()
        nodes = [*node.synced.values(), *node.names.values(), *(change.node for change in node.since)]
        new = [child for child in dict.fromkeys(nodes) if child is not None and child not in found]
        found |= dict.fromkeys(new)
        left += [child for child in new if isinstance(child, _Directory)]
    return list(found)
