"""A value is read once for each file, and again when another file takes its place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sandboxd.images.remembered import MOST, Remembered

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_is_read_again_when_it_is_another(tmp_path: Path) -> None:
    read: list[str] = []

    def value(path: Path) -> str:
        read.append(path.read_text())
        return read[-1]

    file, new = tmp_path / "file", tmp_path / "new"
    remembered = Remembered(value)
    with pytest.raises(FileNotFoundError):
        remembered.get(file)
    for text in ("one", "two"):
        new.write_text(text)
        new.rename(file)
        assert [remembered.get(file), remembered.get(file)] == [text, text]
    assert read == ["one", "two"]
    file.unlink()
    with pytest.raises(FileNotFoundError):
        remembered.get(file)


def test_what_cannot_be_read_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("damaged")
    remembered = Remembered(lambda path: int(path.read_text()))
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            remembered.get(tmp_path / "file")


def test_it_does_not_grow_for_ever(tmp_path: Path) -> None:
    count = 0

    def value(_: Path) -> int:
        nonlocal count
        count += 1
        return count

    remembered = Remembered(value)
    for number in range(MOST + 1):
        (tmp_path / str(number)).touch()
        remembered.get(tmp_path / str(number))
    assert remembered.get(tmp_path / str(MOST)) == MOST + 1
    assert remembered.get(tmp_path / "0") == MOST + 2
