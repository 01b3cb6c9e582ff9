"""Archives made by hand: tars with any header, what ``docker save`` writes, and OCI layouts."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from sandboxd.images.image import host_architecture

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


def program(name: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    """A program of this host and the libraries that it is linked with, as members of a root file system."""
    path = shutil.which(name)
    assert path is not None, name
    found = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"(/\S+)", found)
    files = {f"usr/bin/{name}": path, **{library.lstrip("/"): library for library in libraries}}
    return [member(at, Path(source).read_bytes(), mode=0o755) for at, source in files.items()]


def shell_tar(*more: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """A root file system with a shell and a few commands, and then ``more``."""
    commands: dict[str, tuple[tarfile.TarInfo, bytes]] = {}
    for name in ("dash", "cat", "ls", "stat", "id", "env", "sleep", "true"):
        commands |= {info.name: (info, data) for info, data in program(name)}
    links = [symlink("bin", "usr/bin"), symlink("usr/bin/sh", "dash")]
    return tar(*commands.values(), *links, *more)


def docker_save(
    *layers: bytes,
    architecture: str | None = None,
    tag: str = "test:latest",
    settings: dict[str, Any] | None = None,
) -> bytes:
    """What ``docker save`` writes: a manifest, a configuration, and a tar per layer."""
    config = json.dumps(
        {
            "architecture": architecture or host_architecture(),
            "os": "linux",
            "config": settings or {},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer) for layer in layers]},
            "history": [{"created_by": "test"} for _ in layers],
        }
    ).encode()
    name = hashlib.sha256(config).hexdigest() + ".json"
    paths = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = json.dumps([{"Config": name, "RepoTags": [tag], "Layers": paths}]).encode()
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
