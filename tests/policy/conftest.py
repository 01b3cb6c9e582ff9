"""A directory of policy files that tests write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sandboxd.policy import PolicySet, load_policies

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HEAD = "version: 1\nname: {name}\n"


class Folder:
    """A directory of policies; a text without a version gets the two lines that every file has."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, text: str = "") -> Path:
        path = self.path / f"{name}.yaml"
        head = "version: 1\n" if name == "floor" else HEAD.format(name=name)
        path.write_text(text if text.startswith("version") else head + text)
        return path

    def load(self) -> PolicySet:
        return load_policies([self.path])

    def codes(self) -> list[tuple[str, int]]:
        return [(problem.code, problem.line) for problem in self.load().problems]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def problem_of(folder: Folder) -> Callable[[str], tuple[str, int, str]]:
    """The only problem of a policy whose text begins on line 3."""

    def find(text: str) -> tuple[str, int, str]:
        folder.write("p", text)
        (problem,) = folder.load().problems
        return problem.code, problem.line, problem.message

    return find
