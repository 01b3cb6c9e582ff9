"""The lock file: what a reference stood for when it was first used, and what an image of the store became.

A reference such as ``debian:12`` names another image tomorrow; the id of an image (the digest of its
configuration, which has the digests of its layers) does not. ``sandboxd image pull --update`` moves a pin.
Only an id that is written here is ever used: a tag of the engine can be anybody's.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.images.remembered import Remembered

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["EngineImage", "Pins", "PinsFile"]

VERSION = 1


@dataclass(frozen=True)
class EngineImage:
    """An image of the engine, and what its configuration would add to a container."""

    id: str
    environment: tuple[str, ...] = ()
    """Names of variables."""
    volumes: tuple[str, ...] = ()
    size: int = 0
    created: int = 0
    """Microseconds since the epoch."""
    architecture: str = ""


@dataclass
class Pins:
    """The content of the file."""

    references: dict[str, str] = field(default_factory=dict)
    """References to ids."""
    images: dict[str, EngineImage] = field(default_factory=dict)
    """By id, all that a reference stood for."""
    imported: dict[str, str] = field(default_factory=dict)
    """Digests of the store to ids of the engine."""


class PinsFile:
    """The file of one state directory; several processes may use it. Methods block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._remembered = Remembered(_read)

    def read(self) -> Pins:
        """The content, not to be changed. Raises ImageInvalid where it is damaged, HostFailed."""
        try:
            return self._remembered.get(self.path)
        except FileNotFoundError:
            return Pins()
        except OSError as error:
            raise errors.HostFailed(f"{self.path} cannot be read: {error.strerror}") from error

    @contextmanager
    def changing(self) -> Iterator[Pins]:
        """The content, to be changed within the block; nobody else changes it meanwhile.

        Raises HostFailed, ImageInvalid.
        """
        try:
            self.path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                found = _read(self.path) if self.path.exists() else Pins()
                yield found
                self._write(found)
            finally:
                os.close(lock)
        except OSError as error:
            raise errors.HostFailed(f"{self.path} cannot be written: {error.strerror}") from error

    def _write(self, pins: Pins) -> None:
        data = json.dumps({"version": VERSION, **asdict(pins)}, indent=1, sort_keys=True)
        fd, name = tempfile.mkstemp(prefix=f"{self.path.name}.", dir=self.path.parent)
        try:
            with os.fdopen(fd, "w") as file:
                file.write(data + "\n")
                file.flush()
                os.fsync(fd)
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink()
            raise


def _read(path: Path) -> Pins:
    text = path.read_text()
    try:
        document = json.loads(text)
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']} is not {VERSION}")
        images = {
            key: EngineImage(
                **{**value, "environment": tuple(value["environment"]), "volumes": tuple(value["volumes"])}
            )
            for key, value in document["images"].items()
        }
        return Pins(dict(document["references"]), images, dict(document["imported"]))
    except (ValueError, KeyError, TypeError) as error:
        raise errors.ImageInvalid(
            f"{path} is damaged ({error}); without it every reference is resolved anew"
        ) from error
