"""Archives that others made, brought into a root file system.

Four forms are told apart by content, never by name, each compressed or not: what ``docker save``
writes, an OCI image layout as a directory or a tar, and a plain tar of a root file system, as
``docker export`` writes. ``skopeo`` brings the first three into one OCI layout of ours and checks
every digest on the way; it runs with no network (a layer may name a URL), a largest file size, a
deadline, and dies with us. The layers of that layout, or the plain tar, go through ``unpack``.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
from typing import TYPE_CHECKING, Any

from sandboxd.errors import HostUnsupported, ImageInvalid
from sandboxd.images.compression import decompressed, is_compressed
from sandboxd.images.image import DIGEST, host_architecture
from sandboxd.images.machine import tree_architecture
from sandboxd.images.rootfs import Rootfs
from sandboxd.images.tarstream import Budget, ImportLimits, TarStream
from sandboxd.images.unpack import Unpacker

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["import_into", "pull_into"]

MAX_DOCUMENT = 4 << 20
TIMEOUT = 900.0
"""Seconds that one run of skopeo may take."""
_ROOTS = {b"bin", b"sbin", b"lib", b"lib64", b"usr", b"etc", b"var", b"dev", b"proc", b"root", b"opt"}
_DEFAULTS = {
    "etc/hosts": b"127.0.0.1\tlocalhost\n::1\tlocalhost\n",
    "etc/resolv.conf": b"",
    "etc/hostname": b"sandbox\n",
}


def import_into(source: Path, work: Path, limits: ImportLimits) -> str:
    """Unpack ``source`` to ``work/rootfs`` and return its architecture.

    Raises ImageInvalid for an archive that is of none of the forms, damaged, hostile, over the
    limits or for another architecture; HostUnsupported where skopeo is missing and needed.
    """
    budget = Budget(limits)
    kind = _kind(source, limits)
    if kind == "rootfs":
        with _fresh(work / "rootfs") as rootfs:
            with decompressed(source) as stream:
                Unpacker(rootfs, budget).apply(stream, whiteouts=False)
            return _finish(rootfs, None)
    if kind == "oci-archive":
        with _fresh(work / "archive") as archive, decompressed(source) as stream:
            Unpacker(archive, Budget(limits)).apply(stream, whiteouts=False)
        source, kind = work / "archive", "oci"
    if kind == "oci":
        _check_layout(source)
    elif is_compressed(source):
        # skopeo would decompress it too, with no bound of ours on what comes out.
        source = _expand(source, work / "archive.tar", Budget(limits))
    # skopeo splits its references at colons, which a path of the caller's may hold.
    (work / "source").symlink_to(source.resolve())
    confined = ["unshare", "--net", "--", "prlimit", f"--fsize={limits.total}", "--"]
    _skopeo(work, [f"{kind}:source"], ["--insecure-policy"], confined)
    return _unpack_layout(work, budget)


def pull_into(reference: str, work: Path, limits: ImportLimits) -> str:
    """Fetch ``reference`` with skopeo to ``work/rootfs`` and return its architecture.

    The host's /etc/containers/policy.json says which signatures are needed. Raises ImageInvalid
    with skopeo's last line, where no registry answers among others.
    """
    _skopeo(work, [f"docker://{reference}"], [], ["prlimit", f"--fsize={limits.total}", "--"])
    return _unpack_layout(work, Budget(limits))


def _expand(source: Path, target: Path, budget: Budget) -> Path:
    with decompressed(source) as stream, target.open("xb") as file:
        while chunk := stream.read(1 << 20):
            budget.spend(len(chunk))
            file.write(chunk)
    return target


def _fresh(path: Path) -> Rootfs:
    path.mkdir(mode=0o755)
    return Rootfs(path)


def _kind(source: Path, limits: ImportLimits) -> str:
    if source.is_dir():
        if all((source / name).exists() for name in ("index.json", "oci-layout", "blobs")):
            return "oci"
        raise ImageInvalid(
            f"{source} is a directory but no OCI image layout: index.json, oci-layout or blobs is missing"
        )
    if not source.is_file():
        raise ImageInvalid(f"{source} is neither a file nor a directory")
    with decompressed(source) as stream:
        empty = True
        for entry in TarStream(stream, Budget(limits)):
            empty = False
            path = entry.path.removeprefix(b"./").strip(b"/")
            if path == b"manifest.json":
                return "docker-archive"
            if path == b"oci-layout":
                return "oci-archive"
            if path.split(b"/", 1)[0] in _ROOTS:
                return "rootfs"
    if empty:
        raise ImageInvalid(f"{source} is empty")
    return "rootfs"


def _check_layout(layout: Path) -> None:
    """Refuse what would make skopeo read another file of this host than the layout's own, or wait."""
    for name in ("oci-layout", "index.json", "blobs"):
        if not (layout / name).exists():
            raise ImageInvalid(f"the OCI layout has no {name}")
    for path in [layout / "oci-layout", layout / "index.json", *layout.glob("blobs/*/*")]:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ImageInvalid(f"{path.name} of the OCI layout is no regular file")
    for path in [layout / "blobs", *layout.glob("blobs/*")]:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise ImageInvalid(f"{path.name} of the OCI layout is no directory")


def _skopeo(work: Path, source: Sequence[str], options: Sequence[str], confined: Sequence[str]) -> None:
    (work / "scratch").mkdir()
    command = [
        "setpriv", "--pdeathsig", "KILL", "--", *confined,
        "skopeo", *options, "--override-os", "linux", "--override-arch", host_architecture(),
        "--tmpdir", str(work / "scratch"),
        "copy", "--quiet", "--dest-oci-accept-uncompressed-layers", *source, "oci:layout:image",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, cwd=work, capture_output=True, timeout=TIMEOUT, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise HostUnsupported("setpriv is missing; install it with `apt-get install util-linux`") from None
    except subprocess.TimeoutExpired:
        raise ImageInvalid(f"skopeo took more than {TIMEOUT:.0f} s with {source[0]}") from None
    if done.returncode == 0:
        return
    said = done.stderr[-4000:].decode("utf-8", "replace").strip()
    if done.returncode == 127 or "failed to execute skopeo" in said:
        raise HostUnsupported("skopeo is missing; install it with `apt-get install skopeo`")
    raise ImageInvalid(f"skopeo refused {source[0]}: {said.rpartition('level=fatal msg=')[2] or said}")


def _unpack_layout(work: Path, budget: Budget) -> str:
    layout = work / "layout"
    index = _document(layout / "index.json")
    manifests = _sequence(index, "manifests")
    if len(manifests) != 1:
        raise ImageInvalid(f"the archive holds {len(manifests)} images; write one with one")
    manifest = _document(_blob(layout, manifests[0]))
    architecture = _document(_blob(layout, manifest.get("config"))).get("architecture")
    if not isinstance(architecture, str):
        raise ImageInvalid("the image does not say its architecture")
    _check_architecture(architecture)  # before its layers take time
    with _fresh(work / "rootfs") as rootfs:
        unpacker = Unpacker(rootfs, budget)
        for layer in _sequence(manifest, "layers"):
            with decompressed(_blob(layout, layer)) as stream:
                unpacker.apply(stream, whiteouts=True)
        return _finish(rootfs, architecture)


def _finish(rootfs: Rootfs, declared: str | None) -> str:
    """Complete the tree and check that its programs are for this host."""
    rootfs.normalise()
    rootfs.provide(_DEFAULTS)
    architecture = tree_architecture(rootfs) or declared or host_architecture()
    _check_architecture(architecture)
    return architecture


def _check_architecture(architecture: str) -> None:
    if architecture != host_architecture():
        raise ImageInvalid(
            f"the image is for {architecture}, and this host is {host_architecture()}",
            architecture=architecture,
        )


def _document(path: Path) -> dict[str, Any]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ImageInvalid(f"the image lacks {path.name}: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        text = file.read(MAX_DOCUMENT + 1)
    try:
        value = json.loads(text) if len(text) <= MAX_DOCUMENT else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ImageInvalid(f"{path.name} of the image is no JSON object of up to {MAX_DOCUMENT} bytes")
    return value


def _sequence(document: dict[str, Any], key: str) -> list[Any]:
    value = document.get(key)
    if not isinstance(value, list):
        raise ImageInvalid(f"the image's {key} are no list")
    return value


def _blob(layout: Path, descriptor: Any) -> Path:
    digest = descriptor.get("digest") if isinstance(descriptor, dict) else None
    if not isinstance(digest, str) or DIGEST.fullmatch(digest) is None:
        raise ImageInvalid("the image names a blob without a SHA-256 digest")
    return layout / "blobs" / "sha256" / digest.removeprefix("sha256:")
