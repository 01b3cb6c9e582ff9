"""What a disk may hold when the power goes: rebuilt from the record of ``faultfs``, at any point of it.

Theory of operation.  A file has what was synced, and writes since then, of which the disk may have each, or
not, or a part. A directory has the names that were synced, and changes since then, of which it may have the
first ones: names are journaled in order. A file's sync says nothing of its name, nor a directory's of what
is in its files. That is less than most file systems promise, and all that POSIX does. A rename from one
directory to another loses the file in neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import random
    from pathlib import Path

__all__ = ["How", "Replay"]

How = Literal["nothing", "everything", "some"]
"""How much reached the disk of what was not synced."""
SECTOR = 512
LEFT_OUT = "-shm"  # SQLite makes it anew, and the kernel writes it whenever it likes


@dataclass(eq=False)
class _File:
    synced: bytearray = field(default_factory=bytearray)
    since: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Offset and bytes that were written there; None: a new size."""

    def sync(self) -> None:
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


@dataclass(eq=False)
class _Directory:
    names: dict[str, _File | _Directory] = field(default_factory=dict)
    """As whoever looks now sees them."""
    synced: dict[str, _File | _Directory] = field(default_factory=dict)
    since: list[_Change] = field(default_factory=list)

    def change(self, change: _Change) -> _Change:
        _name(self.names, change)
        self.since.append(change)
        return change

    def sync(self) -> None:
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
        self._root = _Directory()
        self._files: dict[int, _File] = {}

    def _parent(self, path: str) -> tuple[_Directory, str]:
        found: Any = self._root
        for name in PurePosixPath(path).parts[1:-1]:
            found = found.names[name]
        return found, PurePosixPath(path).name

    def _node(self, path: str) -> Any:
        directory, name = self._parent(path)
        return directory.names[name] if name else self._root

    def step(self, operation: str, *what: Any) -> None:
        """Do one thing again."""
        match operation, what:
            case "create", (path, number):
                self._files[number] = _File()
                self._name(path, self._files[number])
            case "mkdir", (path,):
                self._name(path, _Directory())
            case "write", (number, offset, data):
                self._files[number].since.append((offset, data))
            case "truncate", (number, size):
                self._files[number].since.append((size, None))
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

    def _name(self, path: str, node: _File | _Directory | None) -> None:
        directory, name = self._parent(path)
        directory.change(_Change(name, node))

    def _rename(self, old: str, new: str) -> None:
        (source, old_name), (target, new_name) = self._parent(old), self._parent(new)
        there = target.change(_Change(new_name, source.names[old_name]))
        source.change(_Change(old_name, None, after=there))

    def leave(self, directory: Path, how: How, chance: random.Random) -> None:
        """Write to a directory what the disk may hold if the power goes now."""
        happened: set[_Change] = set()
        for node in _all(self._root):
            number = {"nothing": 0, "everything": len(node.since)}.get(how)
            kept = chance.randint(0, len(node.since)) if number is None else number
            happened.update(node.since[:kept])
        left = [(self._root, directory)]
        while left:
            node, at = left.pop()
            at.mkdir(exist_ok=True)
            for name, child in node.found(happened).items():
                if isinstance(child, _Directory):
                    left.append((child, at / name))
                elif not name.endswith(LEFT_OUT):
                    (at / name).write_bytes(child.found(how, chance))


def _all(root: _Directory) -> list[_Directory]:
    """Every directory that is, was, or may be there."""
    found, left = {root}, [root]
    while left:
        node = left.pop()
        nodes = [*node.synced.values(), *node.names.values(), *(change.node for change in node.since)]
        new = {child for child in nodes if isinstance(child, _Directory)} - found
        found |= new
        left += new
    return sorted(found, key=id)
