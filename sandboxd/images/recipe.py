"""A recipe: the packages and files that an image of ours is built of, as YAML.

Strict, as policies are: an unknown or duplicate key, a wrong type or an unsafe path is ImageInvalid
with file, line and column.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from sandboxd.errors import ImageInvalid, NotFound
from sandboxd.images.image import check_name

__all__ = ["Recipe", "shipped_recipes"]

MAX_RECIPE = 1 << 20
_WORD = re.compile(r"[a-z0-9][a-zA-Z0-9.+-]*")
_LISTS = ("components", "packages", "exclude", "keep", "remove")


@dataclass(frozen=True)
class Recipe:
    """What ``sandboxd image build`` reads.

    ``exclude`` and ``keep`` are patterns of dpkg.cfg(5)'s ``path-exclude`` and ``path-include``;
    ``remove`` are globs below the root, removed when all is installed; ``files`` maps paths to text.
    ``mirror`` is for a private one: without it mmdebstrap takes the suite's own.
    """

    name: str
    description: str
    suite: str = "bookworm"
    variant: str = "essential"
    components: tuple[str, ...] = ("main",)
    packages: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    mirror: str | None = None

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a recipe. Raises NotFound, or ImageInvalid for a recipe that is wrong."""
        try:
            with path.open("rb") as file:
                text = file.read(MAX_RECIPE + 1)
        except FileNotFoundError:
            known = ", ".join(sorted(found.stem for found in shipped_recipes().glob("*.yaml")))
            raise NotFound(f"there is no recipe {path}; the shipped ones are {known}") from None
        except IsADirectoryError:
            raise ImageInvalid(f"{path} is a directory, not a recipe") from None
        if len(text) > MAX_RECIPE:
            raise ImageInvalid(f"{path} is over {MAX_RECIPE} bytes")
        try:
            document = YAML(typ="rt").load(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark
            where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
            raise ImageInvalid(f"{where}: {error.problem}") from None
        except (YAMLError, RecursionError, ValueError) as error:
            raise ImageInvalid(f"{path}: {error}") from None
        if not isinstance(document, CommentedMap):
            raise ImageInvalid(f"{path}:1:1: a recipe is a mapping with name, description and packages")
        return _Reader(path, document).recipe()


class _Reader:
    """Checks one document; every complaint has its place."""

    def __init__(self, path: Path, document: CommentedMap) -> None:
        self._path = path
        self._document = document

    def _fail(self, key: str, message: str) -> NoReturn:
        line, column = self._document.lc.key(key) if key in self._document else (0, 0)
        raise ImageInvalid(f"{self._path}:{line + 1}:{column + 1}: {message}")

    def recipe(self) -> Recipe:
        known = [each.name for each in fields(Recipe)]
        for key in self._document:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; the keys are {', '.join(known)}"
                self._fail(key, f"unknown key {key!r}{hint}")
        values: dict[str, Any] = {key: self._value(key) for key in self._document}
        for key in ("name", "description"):
            if key not in values:
                self._fail(key, f"{key!r} is missing")
        check_name(values["name"])
        return Recipe(**values)

    def _value(self, key: str) -> object:
        value = self._document[key]
        if key in _LISTS:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                self._fail(key, f"{key} is a list of texts")
            for item in value:
                self._item(key, item)
            return tuple(str(item) for item in value)
        if key == "files":
            if not isinstance(value, dict) or not all(
                isinstance(name, str) and isinstance(text, str) for name, text in value.items()
            ):
                self._fail(key, "files maps paths to texts")
            for name in value:
                self._item(key, name)
            return {str(name): str(text) for name, text in value.items()}
        if not isinstance(value, str) or not value:
            self._fail(key, f"{key} is a text")
        if key in {"suite", "variant"}:
            self._item(key, value)
        return str(value)

    def _item(self, key: str, item: str) -> None:
        if key in {"packages", "components", "suite", "variant"}:
            if _WORD.fullmatch(item) is None:
                self._fail(key, f"{item!r} is no name for one of {key}")
        elif not item.startswith("/") or ".." in PurePosixPath(item).parts or "\n" in item:
            self._fail(key, f"{item!r} is not an absolute path without '..'")


def shipped_recipes() -> Path:
    """The directory of the recipes that come with sandboxd."""
    package = Path(__file__).resolve().parent.parent
    shipped = package / "_shipped" / "images"
    return shipped if shipped.is_dir() else package.parent / "images"
