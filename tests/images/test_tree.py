"""The digest of a tree: what it sees, what it does not, and that it is canonical."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from sandboxd.canonical import canonical
from sandboxd.errors import ImageInvalid
from sandboxd.images.tree import differences, tree_document


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "d").mkdir(parents=True)
    (root / "d/f").write_bytes(b"content")
    (root / "d/l").symlink_to("f")
    os.mkfifo(root / "p")
    return root


def document(root: Path) -> bytes:
    return tree_document(root)[0]


def test_each_line_is_canonical_and_in_order(tree: Path) -> None:
    (tree / "d.x").write_bytes(b"")
    lines = document(tree).splitlines()
    values = [json.loads(line) for line in lines]
    assert [canonical(value) for value in values] == lines
    assert values[0] == {"format": "sandboxd-tree-v1"}
    assert [value["path"] for value in values[1:]] == ["/", "/d", "/d/f", "/d/l", "/d.x", "/p"]


def test_times_and_links_do_not_count(tree: Path) -> None:
    before = document(tree)
    os.utime(tree / "d/f", (1, 1))
    assert document(tree) == before
    (tree / "g").hardlink_to(tree / "d/f")
    linked, size = tree_document(tree)
    (tree / "g").unlink()
    (tree / "g").write_bytes(b"content")
    copied, copied_size = tree_document(tree)
    assert linked == copied
    assert (size, copied_size) == (7, 14)


def change_content(root: Path) -> None:
    (root / "d/f").write_bytes(b"CONTENT")


def change_mode(root: Path) -> None:
    (root / "d/f").chmod(0o4755)


def change_owner(root: Path) -> None:
    os.chown(root / "d/f", 5, 0)


def change_group(root: Path) -> None:
    os.chown(root / "d/f", 0, 5)


def change_capability(root: Path) -> None:
    value = bytes.fromhex("0000000200200000000000000000000000000000")
    os.setxattr(root / "d/f", "security.capability", value)


@pytest.mark.parametrize(
    "change", [change_content, change_mode, change_owner, change_group, change_capability]
)
def test_what_counts_is_seen_and_named(tree: Path, change: object) -> None:
    before = document(tree)
    assert callable(change)
    change(tree)
    assert differences(tree, before) == ["/d/f"]


def test_more_less_and_another_kind(tree: Path) -> None:
    before = document(tree)
    (tree / "d/l").unlink()
    (tree / "d/l").symlink_to("g")
    (tree / "p").unlink()
    (tree / "new").mkdir()
    assert differences(tree, before) == ["/d/l", "/new", "/p"]


def test_names_have_one_form_each(tree: Path) -> None:
    names = [b"%E9", b"\xe9", b"new\nline", b'quo"te', "é".encode(), b"sp ace"]
    for name in names:
        Path(os.fsdecode(os.fsencode(tree) + b"/" + name)).touch()
    text = document(tree)
    assert len(text.splitlines()) == 6 + len(names)
    for form in (b"/%25E9", b"/%E9", b"/new%0Aline", b"/quo%22te", b"/%C3%A9", b"/sp%20ace"):
        assert b'"path":"%s"' % form in text
    assert differences(tree, text) == []


def test_ids_and_sockets_that_no_image_holds(tree: Path) -> None:
    before = document(tree)
    os.chown(tree / "d/f", 65536, 0)
    with pytest.raises(ImageInvalid, match="65535"):
        document(tree)
    assert differences(tree, before) == ["/d/f"]
    os.chown(tree / "d/f", 65535, 0)
    document(tree)
    here = Path.cwd()
    os.chdir(tree)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("s")
    finally:
        os.chdir(here)
    with pytest.raises(ImageInvalid, match="socket"):
        document(tree)
