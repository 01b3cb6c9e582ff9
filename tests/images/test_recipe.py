"""Recipes: the shipped ones load; wrong ones say where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sandboxd.errors import ImageInvalid, NotFound
from sandboxd.images import Recipe, shipped_recipes

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", ["base", "python", "build"])
def test_the_shipped_ones(name: str) -> None:
    recipe = Recipe.load(shipped_recipes() / f"{name}.yaml")
    assert recipe.name == name
    assert recipe.mirror is None
    assert recipe.packages


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ":1:1: a recipe is a mapping"),
        ("- a", ":1:1: a recipe is a mapping"),
        ("name: a", "'description' is missing"),
        ("description: a", "'name' is missing"),
        ("name: a\ndescription: b\npackage: [x]", ":3:1: unknown key 'package'; did you mean 'packages'"),
        ("name: a\nname: b\ndescription: c", ":2:1: "),
        ("name: a\ndescription: b\npackages: x", ":3:1: packages is a list"),
        ("name: a\ndescription: b\npackages: [1]", ":3:1: packages is a list"),
        ("name: a\ndescription: b\npackages: ['--hook=x']", "'--hook=x' is no name"),
        ("name: a\ndescription: b\nsuite: 'x y'", "'x y' is no name"),
        ("name: a\ndescription: b\nremove: [../x]", "'../x' is not an absolute path"),
        ("name: a\ndescription: b\nremove: [/a/../../x]", "is not an absolute path"),
        ("name: a\ndescription: b\nfiles: {etc/x: y}", "'etc/x' is not an absolute path"),
        ("name: a\ndescription: b\nfiles: [x]", "files maps"),
        ("name: 1\ndescription: b", ":1:1: name is a text"),
        ("name: a\ndescription: [", ":2:15"),
        ("name: !!python/object:os.system a\ndescription: b", "text"),
        ("\x00", "recipe.yaml"),
    ],
)
def test_wrong_ones(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ImageInvalid) as caught:
        Recipe.load(path)
    assert said in str(caught.value)


def test_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="base, build, python"):
        Recipe.load(tmp_path / "missing.yaml")
    with pytest.raises(ImageInvalid, match="directory"):
        Recipe.load(tmp_path)
    (tmp_path / "huge.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(ImageInvalid, match="over"):
        Recipe.load(tmp_path / "huge.yaml")
