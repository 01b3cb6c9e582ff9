"""The store of images: what the command line, the API and the engines call."""

from __future__ import annotations

import fcntl
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from sandboxd.canonical import digest_bytes
from sandboxd.errors import ImageInUse, InvalidRequest, NotFound
from sandboxd.images.build import build_into
from sandboxd.images.host import Host
from sandboxd.images.image import (
    DIGEST,
    Image,
    check_name,
    directory_name,
    host_architecture,
    read_description,
    write_description,
)
from sandboxd.images.importer import import_into, pull_into
from sandboxd.images.recipe import Recipe, shipped_recipes
from sandboxd.images.remembered import Remembered
from sandboxd.images.shelf import Shelf, held, locked
from sandboxd.images.tarstream import ImportLimits
from sandboxd.images.tree import differences, tree_document

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from sandboxd import models

__all__ = ["ImageStore"]

_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}")


class ImageStore:
    """Images under ``root`` (``<state>/images``); several processes may use one directory.

    Methods block: they read, write and run programs. Errors of the disk are HostFailed.
    """

    def __init__(self, root: Path, *, limits: ImportLimits | None = None) -> None:
        self._shelf = Shelf(root.absolute())
        self._root = self._shelf.root
        self._limits = limits or ImportLimits()
        self._host = Host()
        self._descriptions = Remembered(lambda path: read_description(path.parent, path.parent.name))
        self._made: tuple[str, str] | None = None
        self._places: dict[str, tuple[Path, Path]] = {}
        """Where an image of a digest lies: a host's, or any other. Kept: paths are dear to make."""

    def list(self) -> list[models.ImageInfo]:
        """Every image by name, one that lost its name by its digest, and ``host``."""
        names = self._shelf.names()
        nameless = {entry.name.replace("-", ":") for entry in self._root.glob("sha256-*")}
        wanted = [*sorted(names), *sorted(nameless - set(names.values())), "host"]
        infos = []
        for name in wanted:
            try:
                image = self.resolve(name)
            except NotFound:
                continue  # removed while we looked
            infos.append(image.info())
        return infos

    def resolve(self, name_or_digest: str) -> Image:
        """The image of a name, of a digest (``sha256:…``), or ``host``.

        Raises NotFound, whose message has the command that gets the image, and ImageInvalid where
        the store is damaged.
        """
        if name_or_digest == "host":
            return self._resolve_host()
        if DIGEST.fullmatch(name_or_digest):
            directory = self._directory(name_or_digest)
        else:
            digest = self._shelf.digest_of(name_or_digest)
            if digest is None:
                raise NotFound(self._how_to_get(name_or_digest), image=name_or_digest[:256])
            directory = self._directory(digest)
        try:
            return self._described(directory, name_or_digest)
        except FileNotFoundError:
            raise NotFound(self._how_to_get(name_or_digest), image=name_or_digest) from None

    def needs_asking(self, name: str) -> bool:
        """Whether ``ask`` has to find out first what a name stands for: never, of what is in the store."""
        del name
        return False

    def ask(self, reference: str) -> Image:
        """Find out what a reference stands for, for a store that has any. May block. Raises NotFound."""
        return self.resolve(reference)

    def build(self, recipe: Path, *, progress: Callable[[str], None]) -> Image:
        """Build a recipe and give its name to the result; ``progress`` takes lines for people.

        Raises NotFound or ImageInvalid for the recipe, ImageInvalid where mmdebstrap fails,
        HostUnsupported where it is missing.
        """
        loaded = Recipe.load(recipe)
        with self._shelf.scratch() as work:
            build_into(loaded, work, self._root / "cache", progress)
            progress("taking the digest")
            return self._keep(work, loaded.name, f"recipe {loaded.name}", host_architecture())

    def import_(self, source: Path, *, name: str) -> Image:
        """Import an archive or OCI layout, told by its content, under ``name``.

        Raises ImageInvalid for what cannot be trusted or used, HostUnsupported where a program for
        it is missing, InvalidRequest for the name, NotFound where ``source`` does not exist.
        """
        check_name(name)
        if not source.exists():
            raise NotFound(f"there is no file {source}")
        with self._shelf.scratch() as work:
            architecture = import_into(source, work, self._limits)
            return self._keep(work, name, f"import {source.name}", architecture)

    def pull(self, ref: str, *, name: str | None = None) -> Image:
        """Fetch an image from its registry; without ``name`` it gets the last part of ``ref``.

        Raises InvalidRequest for ``ref`` or the name, ImageInvalid with skopeo's reason where no
        registry answers or the image cannot be used.
        """
        reference = ref.removeprefix("docker://")
        if _REFERENCE.fullmatch(reference) is None:
            raise InvalidRequest(f"{ref!r} is no reference such as debian:12", field="ref")
        if name is None:
            name = reference.rpartition("/")[2].partition("@")[0].partition(":")[0].lower()
        check_name(name)
        with self._shelf.scratch() as work:
            architecture = pull_into(reference, work, self._limits)
            return self._keep(work, name, f"pull {reference}", architecture)

    def verify(self, name: str) -> builtins.list[str]:
        """The paths that are not as they were when the image was made; empty if all are.

        ``(tree)`` is among them where the record itself is not what the digest was taken of.
        """
        image = self.resolve(name)
        directory = self._directory(image.digest)
        try:
            document = (directory / "tree").read_bytes()
        except FileNotFoundError:
            return ["(tree)"]
        found = differences(directory / "rootfs", document)
        if not image.binds and digest_bytes(document) != image.digest:
            found.insert(0, "(tree)")
        return found

    def remove(self, name: str, *, users: Mapping[str, Sequence[str]] | None = None) -> None:
        """Remove a name, and its image if no other name has it; or an image by digest, with its names.

        ``users`` are the policies by the name or digest of the image that they need. Raises ImageInUse
        where one of them would lose it, or where a container of the image exists; NotFound;
        InvalidRequest for ``host``.
        """
        if name == "host":
            raise InvalidRequest(
                "the host is no image in the store; there is nothing to remove", field="name"
            )
        image = self.resolve(name)
        directory = self._directory(image.digest)
        with self._shelf.table():
            names = self._shelf.names()
            left = {key: value for key, value in names.items() if key != name}
            if name == image.digest:
                left = {key: value for key, value in names.items() if value != name}
            lost = names.keys() - left.keys()
            if image.digest not in left.values():
                lost |= {image.digest}
            used_by = sorted({user for each in lost for user in (users or {}).get(each, ())})
            if used_by:
                raise ImageInUse(f"{name} is used by {', '.join(used_by)}", image=name, used_by=used_by)
            if image.digest in left.values():
                self._shelf.write_names(left)
                return
            try:
                with locked(directory / "image.json", fcntl.LOCK_EX):
                    self._shelf.write_names(left)
                    self._shelf.discard(directory)
            except BlockingIOError:
                raise ImageInUse(f"a container of {name} is running", image=name) from None
            except FileNotFoundError:
                raise NotFound(f"{name} was removed meanwhile") from None

    def hold(self, digest: str) -> AbstractContextManager[None]:
        """Keep an image while containers of it exist. Entering raises NotFound if it is gone."""
        return held(self._directory(digest), digest)

    def _directory(self, digest: str) -> Path:
        places = self._places.get(digest)
        if places is None:
            name = directory_name(digest)
            places = self._places[digest] = self._root / "host" / name, self._root / name
        skeleton, plain = places
        return skeleton if skeleton.is_dir() else plain

    def _keep(self, work: Path, name: str, source: str, architecture: str) -> Image:
        """Digest what stands in ``work``, publish it, and point ``name`` at it."""
        image = work / "image"
        image.mkdir(mode=0o700)
        (work / "rootfs").rename(image / "rootfs")
        document, size = tree_document(image / "rootfs")
        made = Image(
            name=name,
            digest=digest_bytes(document),
            rootfs=None,
            size=size,
            created=time.time_ns() // 1000,
            source=source,
            architecture=architecture,
        )
        target = self._root / directory_name(made.digest)
        self._write(image, made, document)
        self._shelf.publish(work, target, name)
        return replace(made, rootfs=target / "rootfs")

    @staticmethod
    def _write(directory: Path, image: Image, document: bytes) -> None:
        (directory / "tree").write_bytes(document)
        write_description(directory, image)

    def _described(self, directory: Path, name: str) -> Image:
        """The image of a directory. Raises ImageInvalid, FileNotFoundError."""
        return replace(self._descriptions.get(directory / "image.json"), name=name)

    def _resolve_host(self) -> Image:
        state = self._host.state()
        if self._made is not None and self._made[0] == state:
            try:
                return self._described(self._directory(self._made[1]), "host")
            except FileNotFoundError:
                self._made = None
        with self._shelf.scratch() as work:
            directory = work / "image"
            directory.mkdir(mode=0o700)
            skeleton = self._host.make(directory / "rootfs")
            made = Image(
                name="host",
                digest=skeleton.digest,
                rootfs=None,
                size=0,
                created=time.time_ns() // 1000,
                source="this host",
                architecture=host_architecture(),
                binds=skeleton.binds,
            )
            self._write(directory, made, skeleton.document)
            self._shelf.publish(work, self._root / "host" / directory_name(made.digest))
        self._made = (state, made.digest)
        return self._described(self._directory(made.digest), "host")

    def _how_to_get(self, name: str) -> str:
        shown = repr(name) if len(name) <= 128 else repr(name[:128]) + "…"
        if re.fullmatch(r"[a-z0-9._-]{1,128}", name) and (shipped_recipes() / f"{name}.yaml").is_file():
            return f"there is no image {shown} yet; get it with `sandboxd image build {name}`"
        return (
            f"there is no image {shown}; see `sandboxd image ls`, or get it with "
            "`sandboxd image import FILE --name NAME` or `sandboxd image pull REF`"
        )
