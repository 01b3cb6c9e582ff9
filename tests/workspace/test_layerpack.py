"""Packs: what is made of one is what it was made of, to the digest, whatever a tool has put there."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from layered import opened

from sandboxd import errors
from sandboxd.workspace import layer, layerpack
from sandboxd.workspace.store import LayerStore

if TYPE_CHECKING:
    from collections.abc import Callable

BASE = 1_000_000
NAMES = [b"a", b"b \n", b"\xff\xfe", b".wh.c", b"-rf", b"x" * 255]


@pytest.fixture
def store(tmp_path: Path) -> LayerStore:
    return LayerStore(tmp_path / "store")


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    path = tmp_path / "upper"
    path.mkdir()
    return path


def give(
    path: bytes | Path, ids: tuple[int, int] = (1000, 100), *, mtime: int = 1_234_567_890_123_456_789
) -> None:
    os.chown(path, BASE + ids[0], BASE + ids[1], follow_symlinks=False)
    os.utime(path, ns=(5, mtime), follow_symlinks=False)


def plant(path: bytes, chance: random.Random, depth: int = 0) -> None:
    """A tree of all that is packed, by chance."""
    for name in chance.sample(NAMES, chance.randint(0, 4)):
        at = path + b"/" + name
        match chance.choice(["file", "holes", "link", "whiteout", "directory", "opaque"]):
            case "file":
                Path(os.fsdecode(at)).write_bytes(chance.randbytes(chance.choice([0, 1, 4096, 5000])))
                os.chmod(at, chance.choice([0o644, 0o6755, 0]))  # noqa: PTH101
            case "holes":
                with open(at, "wb") as file:  # noqa: PTH123
                    for _ in range(4):
                        file.seek(chance.choice([0, 4096, 8192]), os.SEEK_CUR)
                        file.write(chance.choice([bytes(4096), b"text"]))
                    file.truncate(file.tell() + chance.choice([0, 10_000]))
            case "link":
                os.symlink(chance.choice([b"../../etc/passwd", b"x" * 300]), at)  # noqa: PTH211
            case "whiteout":
                os.mknod(at, stat.S_IFCHR, os.makedev(0, 0))
            case kind if depth < 4:
                os.mkdir(at, 0o2751)  # noqa: PTH102
                if kind == "opaque":
                    os.setxattr(at, layer.OPAQUE, b"y")
                plant(at, chance, depth + 1)
            case _:
                continue
        if not stat.S_ISCHR(os.lstat(at).st_mode):
            give(at, (chance.randint(0, 65_535), 7), mtime=chance.choice([0, 1, 2_000_000_000_999_999_999]))


@pytest.mark.parametrize("seed", range(40))
def test_what_is_made_of_a_pack_is_what_is_taken(store: LayerStore, upper: Path, seed: int) -> None:
    plant(os.fsencode(upper), random.Random(seed))
    give(upper)
    with opened(upper) as fd:
        taken, expected = store.take(fd, BASE)
        found = store.pack(fd, BASE)
    assert found is not None
    name, pack, figures = found
    assert figures == expected
    assert layerpack.digest_of_pack(pack) == expected.digest
    for _ in range(2):  # also in the place of what a daemon had begun
        store.write(name, pack)
        for one in (taken, name):
            with opened(store.path(one)) as fd:
                assert layer.measure(fd) == expected
    since = store.watch()
    store.sync(since)
    os.close(since)


def named(upper: Path) -> None:
    os.link(upper / "file", upper / "other")


def sparse(upper: Path) -> None:
    os.truncate(upper / "file", layerpack.MOST + 1)


def late(upper: Path) -> None:
    give(upper / "file", mtime=layerpack.LATEST * 10**9)


def early(upper: Path) -> None:
    give(upper / "file", mtime=-1)


def listening(upper: Path) -> None:
    os.mknod(upper / "socket", stat.S_IFSOCK | 0o600)
    give(upper / "socket")


def marked(upper: Path) -> None:
    os.setxattr(upper, "user.colour", b"blue")


def long(upper: Path) -> None:
    (upper / "file").write_bytes(b"x" * layerpack.MOST)
    give(upper / "file")


def many(upper: Path) -> None:
    for number in range(layerpack.MOST // 200):
        (upper / f"{number:0200}").touch()
        give(upper / f"{number:0200}")


@pytest.mark.parametrize("change", [named, sparse, late, early, listening, marked, long, many])
def test_what_is_large_or_not_plain_is_made_as_files_at_once(
    store: LayerStore, upper: Path, change: Callable[[Path], None]
) -> None:
    (upper / "file").write_bytes(b"text")
    give(upper / "file")
    change(upper)
    give(upper)
    with opened(upper) as fd:
        assert store.pack(fd, BASE) is None
        name, figures = store.take(fd, BASE)
    with opened(store.path(name)) as fd:
        assert layer.measure(fd) == figures


@pytest.mark.parametrize(
    "name", [b"..", b".", b"", b"../../outside", b"/etc/outside", b"a/../../outside", b"a\0b"]
)
@pytest.mark.parametrize("kind", [b"e", b"w", b"s", b"b"])
def test_a_damaged_pack_makes_nothing_outside_of_its_layer(
    store: LayerStore, tmp_path: Path, name: bytes, kind: bytes
) -> None:
    data = layerpack._STEP.pack(kind, len(name), 24) + name + bytes(24)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(errors.Corrupt, match="a name that no file has"):
        store.write("0" * 32, data)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ValueError, match="a name that no file has"):
        layerpack.digest_of_pack(data)


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_pack_is_told(store: LayerStore, upper: Path, seed: int) -> None:
    chance = random.Random(seed)
    while not os.listdir(upper):  # noqa: PTH208
        plant(os.fsencode(upper), chance)
    give(upper)
    with opened(upper) as fd:
        found = store.pack(fd, BASE)
    assert found is not None
    _, pack, figures = found
    for _ in range(50):
        data = bytearray(pack)
        if chance.random() < 0.5:
            del data[chance.randrange(len(data)) :]
        else:
            data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
        try:
            digest = layerpack.digest_of_pack(bytes(data))
        except ValueError:
            continue
        assert digest != figures.digest
