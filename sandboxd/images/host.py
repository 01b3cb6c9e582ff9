"""``image: host``: this host's own programs, presented read-only in a skeleton of ours.

The rootfs is a small tree with the host's ``/bin``, ``/lib`` and the like as they are there (links
into ``/usr``, or directories to bind), mount points, an ``/etc`` written here, and a target for each
bind. What is presented of the host is ``/usr``, the programs' and libraries' directories, and a few
public files below ``/etc``; never ``/home``, ``/root``, ``/var``, ``/srv``, ``/opt`` or the host's
accounts.

Its digest is of a description: os-release, the package database, the architecture, the binds and the
skeleton. It names the state of the host's packages, not each byte: a file changed by hand in
``/usr/local`` does not show in it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from sandboxd.canonical import digest, digest_bytes
from sandboxd.images.image import HostBind, host_architecture
from sandboxd.images.rootfs import Rootfs
from sandboxd.images.tree import tree_document

__all__ = ["Host", "Skeleton"]

_TOP = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_ETC = (
    "alternatives",
    "ssl/certs",
    "ssl/openssl.cnf",
    "pki/tls/certs",
    "pki/ca-trust/extracted",
    "ca-certificates/extracted",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "mime.types",
    "protocols",
    "services",
)
_DATABASES = (
    "/var/lib/dpkg/status",
    "/usr/lib/sysimage/rpm/rpmdb.sqlite",
    "/var/lib/rpm/rpmdb.sqlite",
    "/lib/apk/db/installed",
)
_FILES = {
    "etc/passwd": "root:x:0:0:root:/tmp:/bin/sh\n"
    "sandbox:x:1000:1000:sandbox:/tmp:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "etc/group": "root:x:0:\nsandbox:x:1000:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n",
    "etc/hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost\n",
    "etc/hostname": "sandbox\n",
    "etc/resolv.conf": "",
    "etc/machine-id": "",
}
_MAX_FILE = 1 << 20


@dataclass(frozen=True)
class Skeleton:
    """What was made: its binds, the digest of the description, and the skeleton's own document."""

    digest: str
    binds: tuple[HostBind, ...]
    document: bytes


class Host:
    """The host as an image; remembers the digests of files that have not changed since."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._seen: dict[str, tuple[tuple[int, int, int], str]] = {}

    def state(self) -> str:
        """A text that changes when the host's packages do; cheap, so that each call can ask."""
        found = {name: self._file_digest(name) for name in ("/etc/os-release", *_DATABASES)}
        links = {name: self._link(name) for name in _TOP}
        return digest({"files": found, "links": links, "binds": [bind.source for bind in self._binds()]})

    def make(self, rootfs: Path) -> Skeleton:
        """Make the skeleton at ``rootfs``, which does not exist yet."""
        rootfs.mkdir(mode=0o755)
        binds = self._binds()
        with Rootfs(rootfs) as tree:
            tree.normalise()
            for name in _TOP:
                if link := self._link(name):
                    (rootfs / name).symlink_to(link)
            for bind in binds:
                self._target(tree, bind)
            for name, text in _FILES.items():
                tree.write(name, text.encode())
            tree.write("etc/os-release", self._content("/etc/os-release"))
            # A link into /usr, so that no time zone file has to be copied.
            if (self._root / "etc/localtime").is_symlink():
                target = str((self._root / "etc/localtime").readlink())
                if target.startswith("/usr/"):
                    (rootfs / "etc/localtime").symlink_to(target)
        document, _ = tree_document(rootfs)
        return Skeleton(self._digest(binds, document), binds, document)

    def _digest(self, binds: tuple[HostBind, ...], document: bytes) -> str:
        return digest(
            {
                "format": "sandboxd-host-v1",
                "architecture": host_architecture(),
                "os_release": self._file_digest("/etc/os-release"),
                "packages": {name: self._file_digest(name) for name in _DATABASES},
                "binds": [bind.target for bind in binds],
                "skeleton": digest_bytes(document),
            }
        )

    def _binds(self) -> tuple[HostBind, ...]:
        paths = ["/usr"]
        paths += [f"/{name}" for name in _TOP if stat.S_ISDIR(self._kind(f"/{name}"))]
        # A link in /etc would lead to who knows where: only what is really there.
        kinds = {f"/etc/{name}": self._kind(f"/etc/{name}") for name in _ETC}
        paths += [path for path, kind in kinds.items() if stat.S_ISDIR(kind) or stat.S_ISREG(kind)]
        return tuple(HostBind(str(self._root / path[1:]), path) for path in paths)

    def _target(self, tree: Rootfs, bind: HostBind) -> None:
        if stat.S_ISDIR(self._kind(bind.target)):
            with tree.directory(os.fsencode(bind.target).strip(b"/"), make=True):
                pass
        else:
            tree.write(bind.target, b"")

    def _kind(self, path: str) -> int:
        try:
            return (self._root / path[1:]).lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def _link(self, name: str) -> str | None:
        path = self._root / name
        return str(path.readlink()) if path.is_symlink() else None

    def _content(self, path: str) -> bytes:
        try:
            with (self._root / path[1:]).open("rb") as file:
                return file.read(_MAX_FILE)
        except FileNotFoundError:
            return b""

    def _file_digest(self, path: str) -> str | None:
        try:
            with (self._root / path[1:]).open("rb") as file:
                status = os.fstat(file.fileno())
                key = (status.st_mtime_ns, status.st_size, status.st_ino)
                if path not in self._seen or self._seen[path][0] != key:
                    hexadecimal = hashlib.file_digest(file, "sha256").hexdigest()
                    self._seen[path] = (key, f"sha256:{hexadecimal}")
                return self._seen[path][1]
        except FileNotFoundError:
            return None
