"""Images for the Docker Engine: those of the store, imported on first use, and its own, by reference.

A policy's ``image: python`` names an image of the store, as with every engine, and has the same digest. The
first container of it imports its files into the engine, which takes as long as it takes to copy them.
``image: debian:12`` (anything with ``:`` or ``/``) names one of the engine, and is pinned by ``pins.py``.
"""

from __future__ import annotations

import json
import os
import posixpath
import tarfile
import threading
from contextlib import nullcontext
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sandboxd import errors, models
from sandboxd.engine.bundle import INIT_PATH
from sandboxd.engine.docker.endpoint import DockerEndpoint, MissingInEngine
from sandboxd.engine.docker.pins import EngineImage, PinsFile
from sandboxd.engine.docker.podman import IMPORT, is_podman
from sandboxd.images import Image, ImageStore
from sandboxd.images.image import DIGEST, host_architecture

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

__all__ = ["DockerImages", "EngineImage", "is_reference"]

IMPORT_TIMEOUT = 300.0  # seconds until the engine has stored what it was sent
MAX_VARIABLES = 1024
MAX_VOLUMES = 64
CHUNK = 1 << 18


def is_reference(name: str) -> bool:
    """Whether a name is one of the engine's images: no name of the store has ``:`` or ``/``."""
    return DIGEST.fullmatch(name) is None and (":" in name or "/" in name)


class DockerImages(ImageStore):
    """The store of a state directory, and beside it the images of an engine."""

    def __init__(self, state: Path, endpoint: DockerEndpoint, instance: str) -> None:
        """``instance`` names this daemon in the engine."""
        super().__init__(state / "images")
        self._endpoint = endpoint
        self._repository = f"sandboxd-{instance}"
        self._pins = PinsFile(state / "docker-images.json")
        self._importing = threading.Lock()

    def list(self) -> builtins.list[models.ImageInfo]:
        """Those of the store, and the references that are pinned."""
        pins = self._pins.read()
        return super().list() + [
            self._of_engine(pins.images[id_], reference).info()
            for reference, id_ in sorted(pins.references.items())
        ]

    def resolve(self, name_or_digest: str) -> Image:
        """The image of a name or digest of the store, or of a reference that is pinned; asks no engine.

        Raises NotFound, whose message has the command that gets the image, and ImageInvalid.
        """
        pins = self._pins.read()
        if name_or_digest in pins.images:
            return self._of_engine(pins.images[name_or_digest], name_or_digest)
        if not is_reference(name_or_digest):
            return super().resolve(name_or_digest)
        pinned = pins.references.get(name_or_digest)
        if pinned is None:
            raise errors.NotFound(_how_to_get(name_or_digest), image=name_or_digest[:256])
        return self._of_engine(pins.images[pinned], name_or_digest)

    def needs_asking(self, name: str) -> bool:
        """Whether the engine has to be asked what this reference stands for."""
        return is_reference(name) and name not in self._pins.read().references

    def ask(self, reference: str) -> Image:
        """Pin what a reference stands for in the engine now. Blocks.

        Raises NotFound, whose message has the command that gets it, ImageInvalid, EngineFailed.
        """
        try:
            with self._endpoint.asking(f"image {reference}") as client:
                found = _describe(client.inspect_image(reference), reference)
        except MissingInEngine:
            raise errors.NotFound(_how_to_get(reference), image=reference[:256]) from None
        with self._pins.changing() as pins:
            pinned = pins.references.setdefault(reference, found.id)
            pins.images.setdefault(found.id, found)
            found = pins.images[pinned]
        return self._of_engine(found, reference)

    def fetch(self, reference: str, *, update: bool, progress: Callable[[str], None]) -> Image:
        """Have the engine fetch an image and pin it; one that is pinned stays, unless ``update``.

        Raises NotFound where neither the registry nor the engine has it, ImageInvalid, EngineFailed.
        """
        if not is_reference(reference):
            reference += ":latest"
        if not update and not self.needs_asking(reference):
            pinned = self.resolve(reference)
            if self._is_there(pinned.digest):
                return pinned
        with self._endpoint.asking(f"pull {reference}") as client:
            for said in client.pull(reference, stream=True, decode=True):
                if "error" in said:
                    raise errors.ImageInvalid(f"the Docker Engine cannot fetch {reference}: {said['error']}")
                if said.get("status") and "progressDetail" not in said:
                    progress(str(said["status"]))
        with self._pins.changing() as pins:
            pins.references.pop(reference, None)
        return self.ask(reference)

    def hold(self, digest: str) -> AbstractContextManager[None]:
        """Keep an image while containers of it exist. The engine does that for its own."""
        return nullcontext() if digest in self._pins.read().images else super().hold(digest)

    def remove(self, name: str, *, users: Mapping[str, Sequence[str]] | None = None) -> None:
        """Remove an image of the store, or forget what a reference stands for: the engine keeps its image."""
        if not is_reference(name):
            super().remove(name, users=users)
            return
        used_by = sorted((users or {}).get(name, ()))
        if used_by:
            raise errors.ImageInUse(f"{name} is used by {', '.join(used_by)}", image=name, used_by=used_by)
        with self._pins.changing() as pins:
            if pins.references.pop(name, None) is None:
                raise errors.NotFound(f"{name} is not pinned")

    def in_engine(self, image: Image) -> EngineImage:
        """What the engine makes containers of an image from; imports it on first use. Blocks.

        Raises EngineFailed, HostFailed, ImageInvalid.
        """
        pins = self._pins.read()
        if image.digest in pins.images:
            return pins.images[image.digest]
        with self._importing:
            known = self._pins.read().imported.get(image.digest)
            return EngineImage(known or self._import(image))

    def gone(self, image: Image) -> None:
        """The engine no longer has it: import it again next time.

        Raises EngineFailed, whose message has the command that gets it, for one of the engine.
        """
        pins = self._pins.read()
        if image.digest in pins.images:
            names = [name for name, id_ in pins.references.items() if id_ == image.digest]
            name = names[0] if names else image.name
            raise errors.EngineFailed(
                f"the Docker Engine no longer has {name} ({image.digest[:19]}); get it with "
                f"`sandboxd image pull {name}`, or what it stands for now with `sandboxd image pull "
                f"--update {name}`"
            )
        with self._pins.changing() as changed:
            changed.imported.pop(image.digest, None)

    def forget_removed(self) -> None:
        """Remove from the engine what was imported of images that the store no longer has."""
        for digest in self._pins.read().imported:
            try:
                super().resolve(digest)
            except errors.NotFound:
                with self._pins.changing() as pins:
                    id_ = pins.imported.pop(digest, None)
                if id_ is not None:
                    self._remove_from_engine(id_)

    def _remove_from_engine(self, id_: str) -> None:
        try:
            with self._endpoint.asking("remove image") as client:
                client.remove_image(id_)
        except errors.EngineFailed:
            return  # gone already, or somebody made something of it

    def _is_there(self, id_: str) -> bool:
        try:
            with self._endpoint.asking("image") as client:
                client.inspect_image(id_)
        except MissingInEngine:
            return False
        return True

    def _import(self, image: Image) -> str:
        if image.rootfs is None:
            raise errors.EngineFailed(f"image {image.name} has no root file system")
        tag = image.digest.removeprefix("sha256:")[:32]
        with self.hold(image.digest), self._endpoint.asking(f"import image {image.name}") as client:
            path = f"/v{client.api_version}/images/create"
            parameters = {"fromSrc": "-", "repo": self._repository, "tag": tag}
            if is_podman(client.version()):
                path, parameters = IMPORT, {"reference": f"{self._repository}:{tag}"}
            answer = client.post(  # the SDK's own import has no timeout
                client.base_url + path,
                params=parameters,
                headers={"Content-Type": "application/x-tar"},
                data=_tar_of(image.rootfs),
                timeout=IMPORT_TIMEOUT,
            )
            if not answer.ok:
                raise errors.EngineFailed(
                    f"the Docker Engine did not import image {image.name}: {answer.text}"
                )
            lines = [json.loads(line) for line in answer.text.splitlines() if line.strip()]
        wrong = next((line["error"] for line in lines if "error" in line), None)
        last = {} if wrong or not lines else lines[-1]
        id_ = str(last.get("status") or last.get("Id"))  # Docker's word, and Podman's
        if DIGEST.fullmatch(id_) is None:
            raise errors.EngineFailed(
                f"the Docker Engine did not import image {image.name}: {wrong or lines}"
            )
        with self._pins.changing() as pins:
            pins.imported[image.digest] = id_
        return id_

    @staticmethod
    def _of_engine(found: EngineImage, name: str) -> Image:
        return Image(
            name=name,
            digest=found.id,
            rootfs=None,
            size=found.size,
            created=found.created,
            source="the Docker Engine",
            architecture=found.architecture,
        )


def _how_to_get(reference: str) -> str:
    shown = reference[:256]
    return f"the Docker Engine has no image {shown!r}; get it with `sandboxd image pull {shown}`"


def _describe(found: dict[str, Any], reference: str) -> EngineImage:
    """What an answer of the engine says of an image. Raises ImageInvalid."""
    platform = f"{found.get('Os')}/{found.get('Architecture')}"
    if platform != f"linux/{host_architecture()}":
        raise errors.ImageInvalid(f"{reference} is an image for {platform}, not for this host")
    config = found.get("Config") or {}
    names = sorted({entry.partition("=")[0] for entry in config.get("Env") or ()})
    if "" in names:  # no runtime starts that
        raise errors.ImageInvalid(f"{reference} has an environment variable without a name")
    paths = {posixpath.normpath(f"/{path.lstrip('/')}") for path in config.get("Volumes") or ()}
    if len(names) > MAX_VARIABLES or len(paths) > MAX_VOLUMES:
        raise errors.ImageInvalid(
            f"{reference} declares {len(names)} variables and {len(paths)} volumes; at most {MAX_VARIABLES} "
            f"and {MAX_VOLUMES} are taken"
        )
    return EngineImage(
        id=str(found["Id"]),
        environment=tuple(names),
        volumes=tuple(sorted(paths - {INIT_PATH})),
        size=int(found.get("Size") or 0),
        created=_microseconds(str(found.get("Created") or "")),
        architecture=str(found.get("Architecture")),
    )


def _microseconds(text: str) -> int:
    """Of an RFC 3339 time; 0 for none. Its fraction may have nine digits, which Python does not read."""
    try:
        return int(datetime.fromisoformat(f"{text[:19]}+00:00").timestamp()) * 10**6
    except ValueError:
        return 0


def _tar_of(rootfs: Path) -> Iterator[bytes]:
    """The tar of a tree of the store, made by a thread while it is read."""
    reader, writer = os.pipe()
    failed: list[BaseException] = []

    def write() -> None:
        try:
            with (
                os.fdopen(writer, "wb") as file,
                tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT, bufsize=CHUNK) as archive,
            ):
                archive.add(rootfs, arcname=".", filter=_by_number)
        except BaseException as error:  # noqa: BLE001  (raised again below, where the archive is read)
            failed.append(error)

    thread = threading.Thread(target=write, name="tar of an image", daemon=True)
    thread.start()
    with os.fdopen(reader, "rb", buffering=0) as file:
        while data := file.read(CHUNK):
            yield data
    thread.join()
    if failed:
        raise failed[0]


def _by_number(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without names of accounts: those of this host mean nothing there."""
    member.uname = member.gname = ""
    return member
