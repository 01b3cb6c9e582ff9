"""A file system for tests: a directory, shown elsewhere, that fails as it is told and keeps a record.

Run as ``faultfs.py DIRECTORY MOUNTPOINT CONTROL``; ``disks.py`` is the other end. ``CONTROL/rules`` is a JSON
list that is read again whenever it changes: ``{"on": [operation…], "path": regex, "do": errno or "short",
"after": N, "times": N}`` lets an operation fail, or a write be short, from the Nth match on and so many
times. ``grow`` is a write beyond the end of its file. All that changes the directory goes, with its bytes and
its time on the monotonic clock, to ``CONTROL/record`` as pickled tuples. The kernel tells no FUSE file system
of syncfs(2): who calls that sets the attribute ``SYNC`` of the root first, which stands for it here.

Nothing but the map of SQLite's shared memory is cached by the kernel, so each read and each write comes here.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import stat
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mfusepy

SHARED_MEMORY = "-shm"
SYNC = "user.faultfs.sync"


class Rules:
    """What shall go wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version: tuple[int, int] | None = None
        self._rules: list[dict[str, Any]] = []
        self._matched: Counter[int] = Counter()

    def of(self, operations: set[str], path: str) -> str | None:
        """What to do now instead of an operation."""
        found = self._path.stat()
        if self._version != (found.st_ino, found.st_mtime_ns):
            self._version = found.st_ino, found.st_mtime_ns
            self._rules = json.loads(self._path.read_text())
            self._matched.clear()
        for number, rule in enumerate(self._rules):
            if operations & set(rule["on"]) and re.search(rule.get("path", ""), path):
                self._matched[number] += 1
                first = rule.get("after", 1)
                last = first + rule.get("times", 1 << 60) - 1
                if first <= self._matched[number] <= last:
                    return str(rule["do"])
        return None


class FaultFS(mfusepy.Operations):  # type: ignore[misc]
    """Operations on the directory. One at a time: the record has an order."""

    use_ns = True

    def __init__(self, root: str, control: Path) -> None:
        self._root = root
        self._rules = Rules(control / "rules")
        self._record = (control / "record").open("ab")
        self._lock = threading.RLock()
        self._ids: dict[int, int] = {}
        self._next = 1

    def _at(self, path: str) -> str:
        return self._root + path

    def _judge(self, path: str, *operations: str) -> str | None:
        found = self._rules.of(set(operations), path)
        if found is None or found == "short":
            return found
        raise mfusepy.FuseOSError(getattr(errno, found))

    def _note(self, *what: object) -> None:
        pickle.dump((time.monotonic_ns(), *what), self._record)

    def _id(self, fd: int) -> int:
        """A number for a file that no later one gets, as inodes do."""
        return self._ids.setdefault(os.fstat(fd).st_ino, 0)

    def _opened(self, path: str, fi: Any, fd: int) -> int:
        fi.fh = fd
        fi.direct_io = not path.endswith(SHARED_MEMORY)
        fi.keep_cache = not fi.direct_io
        return 0

    def init(self, path: str) -> None: ...

    def destroy(self, path: str) -> None:
        self._record.close()

    def getattr(self, path: str, fh: Any = None) -> dict[str, Any]:
        found = os.fstat(fh.fh) if fh is not None else os.lstat(self._at(path))
        names = ("st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
        shown = {name: getattr(found, name) for name in names}
        times = {name: getattr(found, f"{name}_ns") for name in ("st_atime", "st_mtime", "st_ctime")}
        return {**shown, **times}

    def readdir(self, path: str, fh: int) -> Any:
        self._judge(path, "readdir")
        names = [".", "..", *os.listdir(self._at(path))]
        found = {name: os.lstat(f"{self._at(path)}/{name}") for name in names}
        # a name without an inode is shown to nobody
        return [(name, {"st_ino": one.st_ino, "st_mode": one.st_mode}, 0) for name, one in found.items()]

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._at(path))
        names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_namemax")
        return {name: getattr(found, name) for name in names}

    def readlink(self, path: str) -> str:
        return os.readlink(self._at(path))

    def chmod(self, path: str, mode: int) -> int:
        with self._lock:
            os.chmod(self._at(path), mode)
            self._note("chmod", path, mode & 0o7777)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        with self._lock:
            os.lchown(self._at(path), uid, gid)
            self._note("chown", path, uid, gid)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        with self._lock:
            accessed, changed = times or (time.time_ns(), time.time_ns())
            os.utime(self._at(path), ns=(accessed, changed), follow_symlinks=False)
            self._note("utime", path, changed)
        return 0

    def getxattr(self, path: str, name: str, position: int = 0) -> bytes:
        return os.getxattr(self._at(path), name, follow_symlinks=False)

    def listxattr(self, path: str) -> list[str]:
        return os.listxattr(self._at(path), follow_symlinks=False)

    def setxattr(self, path: str, name: str, value: bytes, options: int, position: int = 0) -> int:
        with self._lock:
            if name == SYNC:
                self._judge(path, "syncfs")
                self._note("syncfs")
                return 0
            self._judge(path, "setxattr")
            os.setxattr(self._at(path), name, value, options, follow_symlinks=False)
            self._note("setxattr", path, name, value)
        return 0

    def removexattr(self, path: str, name: str) -> int:
        with self._lock:
            os.removexattr(self._at(path), name, follow_symlinks=False)
            self._note("setxattr", path, name, None)
        return 0

    def open(self, path: str, fi: Any) -> int:
        with self._lock:
            self._judge(path, "open")
            flags = fi.flags & ~(os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_DIRECT | os.O_NOFOLLOW)
            if flags & os.O_ACCMODE == os.O_WRONLY:
                flags = flags & ~os.O_ACCMODE | os.O_RDWR
            fd = os.open(self._at(path), flags)
            if flags & os.O_TRUNC:
                self._note("truncate", self._id(fd), 0)
            return self._opened(path, fi, fd)

    def create(self, path: str, mode: int, fi: Any) -> int:
        with self._lock:
            self._judge(path, "create")
            fd = os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
            self._ids[os.fstat(fd).st_ino] = self._next
            self._note("create", path, self._next, mode & 0o7777)
            self._next += 1
            return self._opened(path, fi, fd)

    def read(self, path: str, size: int, offset: int, fh: Any) -> bytes:
        with self._lock:
            self._judge(path, "read")
            return os.pread(fh.fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: Any) -> int:
        with self._lock:
            grows = offset + len(data) > os.fstat(fh.fh).st_size
            if self._judge(path, "write", *(("grow",) if grows else ())) == "short":
                data = data[: max(1, len(data) // 2)]
            done = os.pwrite(fh.fh, data, offset)
            self._note("write", self._id(fh.fh), offset, data[:done])
            return done

    def truncate(self, path: str, length: int, fh: Any = None) -> int:
        with self._lock:
            self._judge(path, "truncate")
            fd = os.open(self._at(path), os.O_RDWR)
            try:
                os.ftruncate(fd, length)
                self._note("truncate", self._id(fd), length)
            finally:
                os.close(fd)
        return 0

    def fsync(self, path: str, datasync: int, fh: Any) -> int:
        with self._lock:
            self._judge(path, "fsync")
            self._note("fsync", self._id(fh.fh))
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        with self._lock:
            self._judge(path, "fsyncdir")
            self._note("fsyncdir", path)
        return 0

    def flush(self, path: str, fh: Any) -> int:
        return 0

    def release(self, path: str, fh: Any) -> int:
        os.close(fh.fh)
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        with self._lock:
            self._judge(path, "mkdir")
            os.mkdir(self._at(path), mode)
            self._note("mkdir", path, mode & 0o7777)
        return 0

    def rmdir(self, path: str) -> int:
        with self._lock:
            self._judge(path, "rmdir")
            os.rmdir(self._at(path))
            self._note("rmdir", path)
        return 0

    def unlink(self, path: str) -> int:
        with self._lock:
            self._judge(path, "unlink")
            os.unlink(self._at(path))
            self._note("unlink", path)
        return 0

    def rename(self, old: str, new: str) -> int:
        with self._lock:
            self._judge(new, "rename")
            os.rename(self._at(old), self._at(new))
            self._note("rename", old, new)
        return 0

    def link(self, target: str, source: str) -> int:
        """Make ``target``, a further name of ``source``."""
        with self._lock:
            self._judge(target, "link")
            os.link(self._at(source), self._at(target))
            self._note("link", source, target)
        return 0

    def symlink(self, target: str, source: str) -> int:
        with self._lock:
            self._judge(target, "symlink")
            os.symlink(source, self._at(target))
            self._note("node", target, stat.S_IFLNK | 0o777, source)
        return 0

    def mknod(self, path: str, mode: int, dev: int) -> int:
        with self._lock:
            self._judge(path, "create")
            os.mknod(self._at(path), mode, dev)
            self._note("node", path, mode, "")
        return 0


if __name__ == "__main__":
    backing, at, control_directory = sys.argv[1:]
    mfusepy.FUSE(
        FaultFS(backing, Path(control_directory)),
        at,
        raw_fi=True,
        foreground=True,
        default_permissions=True,
        allow_other=True,
        fsname="faultfs",
        hard_remove=True,
        attr_timeout=0,
        entry_timeout=0,
        use_ino=True,
    )
