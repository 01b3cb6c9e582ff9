"""What an image is, and the ``image.json`` that describes one in the store."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandboxd import models
from sandboxd.errors import ImageInvalid, InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DIGEST", "HostBind", "Image", "check_name", "directory_name", "host_architecture"]

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_MACHINES = {
    "x86_64": "amd64",
    "amd64": "amd64",
    "aarch64": "arm64",
    "arm64": "arm64",
    "armv7l": "arm",
    "i686": "386",
    "i386": "386",
    "ppc64le": "ppc64le",
    "riscv64": "riscv64",
    "s390x": "s390x",
}


@dataclass(frozen=True)
class HostBind:
    """A path of this host that ``image: host`` presents read-only; ``target`` exists in the rootfs."""

    source: str
    target: str


@dataclass(frozen=True)
class Image:
    """A root file system with a digest.

    ``size`` is the bytes of its files, ``created`` microseconds since the epoch, ``architecture`` as
    the OCI image specification names it (``amd64``). ``binds`` is empty but for ``host``, whose
    digest names the state of the host's packages, not each byte that is presented.
    """

    name: str
    digest: str
    rootfs: Path | None
    size: int
    created: int
    source: str
    architecture: str
    binds: tuple[HostBind, ...] = ()

    def info(self) -> models.ImageInfo:
        """What is told of it."""
        return models.ImageInfo(
            name=self.name,
            digest=self.digest,
            size=self.size,
            created=self.created,
            source=self.source,
            architecture=self.architecture,
        )


def host_architecture() -> str:
    """This host's architecture in OCI's (Go's) naming."""
    machine = platform.machine()
    return _MACHINES.get(machine, machine)


def check_name(name: str) -> str:
    """Return ``name`` if an image may be stored under it. Raises InvalidRequest."""
    if name == "host" or _NAME.fullmatch(name) is None:
        raise InvalidRequest(
            f"{name!r} is not a name for an image: use up to 128 of a-z 0-9 . _ -, and not 'host'",
            field="name",
        )
    return name


def directory_name(digest: str) -> str:
    """``sha256-<hex>``, the directory of an image. Raises InvalidRequest."""
    if DIGEST.fullmatch(digest) is None:
        raise InvalidRequest(f"{digest!r} is not a digest: write sha256: and 64 hex digits", field="digest")
    return digest.replace(":", "-")


def write_description(directory: Path, image: Image) -> None:
    """Write ``image.json``; the name is not in it, since names come and go."""
    document = {
        "version": 1,
        "digest": image.digest,
        "size": image.size,
        "created": image.created,
        "source": image.source,
        "architecture": image.architecture,
        "binds": [[bind.source, bind.target] for bind in image.binds],
    }
    (directory / "image.json").write_text(json.dumps(document, indent=1) + "\n")


def read_description(directory: Path, name: str) -> Image:
    """Read ``image.json``. Raises ImageInvalid where it is damaged, FileNotFoundError where it is not."""
    text = (directory / "image.json").read_text()
    try:
        document = json.loads(text)
        return Image(
            name=name,
            digest=str(document["digest"]),
            rootfs=directory / "rootfs",
            size=int(document["size"]),
            created=int(document["created"]),
            source=str(document["source"]),
            architecture=str(document["architecture"]),
            binds=tuple(HostBind(str(source), str(target)) for source, target in document["binds"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ImageInvalid(f"{directory}/image.json is damaged: {error}", image=name) from None
