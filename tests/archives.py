"""Archives made by hand: tars with any header, what ``docker save`` writes, and OCI layouts."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

from sandboxd.images.image import host_architecture

if TYPE_CHECKING:
    from pathlib import Path

SHELL = b"#!/bin/sh\n"


def member(name: str, content: bytes = b"", **changes: Any) -> tuple[tarfile.TarInfo, bytes]:
    """One member; ``changes`` are attributes of its header."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode = 0o644
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


def directory(name: str, mode: int = 0o755) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.DIRTYPE, mode=mode)


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.SYMTYPE, linkname=target)


def hardlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.LNKTYPE, linkname=target)


def tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """The bytes of a tar of these members, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def rootfs_tar() -> bytes:
    """What ``docker export`` writes of a very small container."""
    return tar(
        directory("bin"),
        member("bin/sh", SHELL, mode=0o4755),
        directory("etc"),
        member("etc/passwd", b"root:x:0:0::/:/bin/sh\n"),
        directory("dev"),
        member("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("dev/console"),
    )


def docker_save(*layers: bytes, architecture: str | None = None) -> bytes:
    """What ``docker save`` writes: a manifest, a configuration, and a tar per layer."""
    config = json.dumps(
        {
            "architecture": architecture or host_architecture(),
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer) for layer in layers]},
            "history": [{"created_by": "test"} for _ in layers],
        }
    ).encode()
    name = hashlib.sha256(config).hexdigest() + ".json"
    paths = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = json.dumps([{"Config": name, "RepoTags": ["test:latest"], "Layers": paths}]).encode()
    return tar(
        *(member(path, layer) for path, layer in zip(paths, layers, strict=True)),
        member(name, config),
        member("manifest.json", manifest),
    )


def oci_layout(path: Path, *layers: bytes, architecture: str | None = None) -> Path:
    """An OCI image layout (image-layout.md) with one image of uncompressed layers."""
    blobs = path / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(content: bytes, media: str) -> dict[str, Any]:
        digest = _digest(content)
        (blobs / digest.removeprefix("sha256:")).write_bytes(content)
        return {"mediaType": f"application/vnd.oci.image.{media}", "digest": digest, "size": len(content)}

    config = {
        "architecture": architecture or host_architecture(),
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer) for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(json.dumps(config).encode(), "config.v1+json"),
        "layers": [blob(layer, "layer.v1.tar") for layer in layers],
    }
    index = {"schemaVersion": 2, "manifests": [blob(json.dumps(manifest).encode(), "manifest.v1+json")]}
    (path / "index.json").write_text(json.dumps(index))
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return path


def tar_of(path: Path) -> bytes:
    """A tar of what is in a directory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for entry in sorted(path.iterdir()):
            archive.add(entry, entry.name)
    return buffer.getvalue()


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()
