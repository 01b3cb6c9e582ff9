"""Hostile tars: nothing outside of the tree is touched, and what is refused says why."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from archives import directory, hardlink, member, symlink, tar

from sandboxd.errors import ImageInvalid
from sandboxd.images.rootfs import Rootfs
from sandboxd.images.tarstream import Budget, ImportLimits, TarStream
from sandboxd.images.unpack import Unpacker


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").write_text("untouched")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def unpack(root: Path, *layers: bytes, whiteouts: bool = True, limits: ImportLimits | None = None) -> int:
    with Rootfs(root) as rootfs:
        unpacker = Unpacker(rootfs, Budget(limits or ImportLimits()))
        for layer in layers:
            unpacker.apply(io.BytesIO(layer), whiteouts=whiteouts)
        return unpacker.skipped


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_a_plain_tree_keeps_modes_owners_links_and_times(root: Path) -> None:
    unpack(
        root,
        tar(
            directory("bin", 0o750),
            member("bin/su", b"x", mode=0o4755, uid=7, gid=8, mtime=1000),
            hardlink("bin/su2", "bin/su"),
            symlink("su", "bin/su"),
            member("pipe", type=tarfile.FIFOTYPE, mode=0o600),
        ),
    )
    status = (root / "bin/su").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o4755, 7, 8)
    assert status.st_mtime == 1000
    assert status.st_nlink == 2
    assert (root / "su").readlink() == Path("bin/su")
    assert stat.S_IMODE((root / "bin").stat().st_mode) == 0o750
    assert (root / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "a/.."])
def test_dotdot_is_refused(root: Path, name: str) -> None:
    with pytest.raises(ImageInvalid, match="leads out"):
        unpack(root, tar(member(name, b"!")))
    assert (root.parent / "outside").read_text() == "untouched"


def test_an_absolute_name_is_inside(root: Path) -> None:
    unpack(root, tar(member("/etc/passwd", b"mine")))
    assert (root / "etc/passwd").read_bytes() == b"mine"


@pytest.mark.parametrize("target", ["..", "../..", "/", "/proc/self/root", "../../../../../.."])
def test_a_symlink_as_parent_stays_inside(root: Path, target: str) -> None:
    with_proc = [directory("proc/self/root")] if "proc" in target else []
    unpack(root, tar(*with_proc, symlink("out", target), member("out/outside", b"!")))
    assert (root.parent / "outside").read_text() == "untouched"
    assert not Path("/outside").exists()


def test_a_file_replaces_a_symlink_and_does_not_follow_it(root: Path) -> None:
    unpack(root, tar(symlink("f", str(root.parent / "outside")), member("f", b"new")))
    assert (root / "f").read_bytes() == b"new"
    assert not (root / "f").is_symlink()
    assert (root.parent / "outside").read_text() == "untouched"


def test_a_symlink_replaces_a_directory_and_a_directory_a_symlink(root: Path) -> None:
    unpack(root, tar(directory("a"), member("a/b", b"1"), symlink("a", "/"), directory("a"), member("a/c")))
    assert names(root) == {"a", "a/c"}


def test_a_hard_link_cannot_reach_out(root: Path) -> None:
    for target in ("../outside", "missing"):
        with pytest.raises(ImageInvalid):
            unpack(root, tar(hardlink("h", target)))
    with pytest.raises(ImageInvalid):
        unpack(root, tar(symlink("up", ".."), hardlink("h", "up/outside")))
    unpack(root, tar(symlink("s", str(root.parent / "outside")), hardlink("h", "s"), member("h", b"!")))
    assert (root.parent / "outside").read_text() == "untouched"


def test_a_hard_link_to_a_directory_is_refused(root: Path) -> None:
    with pytest.raises(ImageInvalid, match="hard link to a directory"):
        unpack(root, tar(directory("d"), hardlink("h", "d")))


def test_device_nodes(root: Path) -> None:
    null: dict[str, Any] = {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}
    assert unpack(root, tar(member("dev/null", **null))) == 1
    with pytest.raises(ImageInvalid, match="device node"):
        unpack(root, tar(member("etc/null", **null)))
    with pytest.raises(ImageInvalid, match="device node"):
        unpack(root, tar(symlink("dev3", "etc"), directory("etc"), member("dev3/sda", **null)))


def test_a_device_through_a_linked_dev_is_refused(root: Path) -> None:
    with pytest.raises(ImageInvalid, match="device node"):
        unpack(
            root, tar(directory("etc"), symlink("x/dev", "/etc"), member("x/dev/sda", type=tarfile.BLKTYPE))
        )


def test_duplicates_the_last_one_wins(root: Path) -> None:
    unpack(root, tar(member("f", b"1"), member("f", b"2"), directory("f"), member("f", b"3")))
    assert (root / "f").read_bytes() == b"3"


def test_names_that_are_not_utf8(root: Path) -> None:
    unpack(root, tar(member("caf\udce9", b"1"), form=tarfile.GNU_FORMAT))
    assert [os.fsencode(path.name) for path in root.iterdir()] == [b"caf\xe9"]


def test_whiteouts_hide_lower_layers_alone(root: Path) -> None:
    lower = tar(member("a/old"), member("a/gone/x"), member("b/old"), member("b/sub/old"), member("c"))
    upper = tar(
        member("a/.wh.gone"),
        member("a/.wh..wh.plnk"),
        member("b/new"),
        member("b/sub/new"),
        member("b/.wh..wh..opq"),
        member("b/.wh.new"),
        member(".wh.c"),
        member(".wh.never"),
    )
    unpack(root, lower, upper)
    assert names(root) == {"a", "a/old", "b", "b/new", "b/sub", "b/sub/new"}


def test_a_whiteout_through_a_symlink_stays_inside(root: Path) -> None:
    unpack(root, tar(symlink("up", "..")), tar(member("up/.wh.outside"), member("up/.wh..wh..opq")))
    assert (root.parent / "outside").read_text() == "untouched"
    for name in (".wh.", ".wh...", ".wh.."):
        with pytest.raises(ImageInvalid, match="whiteout"):
            unpack(root, tar(member(name)))


def test_in_a_plain_tree_a_whiteout_is_a_file(root: Path) -> None:
    unpack(root, tar(member(".wh.a")), whiteouts=False)
    assert names(root) == {".wh.a"}


def test_ids_over_the_range_are_refused(root: Path) -> None:
    owners: list[dict[str, Any]] = [{"uid": 65536}, {"gid": 2**31}]
    for changes in owners:
        with pytest.raises(ImageInvalid, match="65535"):
            unpack(root, tar(member("f", **changes)))


def test_limits_on_bytes_and_entries(root: Path) -> None:
    with pytest.raises(ImageInvalid, match="more than 1MiB"):
        unpack(root, tar(member("f", bytes(2 << 20))), limits=ImportLimits(total=1 << 20))
    assert (root / "f").exists() is False
    many = tar(*(member(f"f{number}") for number in range(20)))
    with pytest.raises(ImageInvalid, match="10 entries"):
        unpack(root, many, limits=ImportLimits(entries=10))


def test_a_huge_declared_size_is_refused_at_once(root: Path) -> None:
    info = tarfile.TarInfo("f")
    info.size = 2**50
    with pytest.raises(ImageInvalid, match="16GiB"):
        unpack(root, info.tobuf(tarfile.GNU_FORMAT))


@pytest.mark.parametrize("depth", [300, 2000])
def test_deep_trees_are_refused(root: Path, depth: int) -> None:
    with pytest.raises(ImageInvalid):
        unpack(root, tar(directory("/".join("d" * depth))))


def test_depth_cannot_be_built_of_links(root: Path) -> None:
    steps = [directory("/".join("d" * 200)), symlink("l", "/".join("d" * 200))]
    with pytest.raises(ImageInvalid, match="levels"):
        unpack(root, tar(*steps, directory("l/" + "/".join("e" * 200))))


def test_a_file_is_no_parent_and_loops_end(root: Path) -> None:
    with pytest.raises(ImageInvalid):
        unpack(root, tar(member("f"), member("f/g")))
    with pytest.raises(ImageInvalid):
        unpack(root, tar(symlink("l", "l"), member("l/g")))


def test_extended_attributes_are_dropped(root: Path) -> None:
    info, content = member("f", b"x")
    info.pax_headers = {"SCHILY.xattr.security.capability": "\x01\x00\x00\x02"}
    unpack(root, tar((info, content)))
    assert "security.capability" not in os.listxattr(root / "f")


class TestStream:
    """The reader itself."""

    def entries(self, data: bytes) -> list[bytes]:
        return [entry.path for entry in TarStream(io.BytesIO(data), Budget(ImportLimits()))]

    @pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_long_names_in_every_form(self, form: int) -> None:
        name = "/".join(["d" * 60, "e" * 60, "f" * 60])
        assert self.entries(tar(member(name, b"x" * 700), member("g"), form=form)) == [name.encode(), b"g"]

    def test_damage(self) -> None:
        good = tar(member("f", b"x" * 2000))
        for bad in (b"x" * 1024, good[:300], good[:1000], b"\xff" + good[1:]):
            with pytest.raises(ImageInvalid):
                self.entries(bad)

    def test_a_negative_size(self) -> None:
        header = bytearray(member("f")[0].tobuf(tarfile.GNU_FORMAT)[:512])
        header[124:136] = b"\xff" * 12
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        with pytest.raises(ImageInvalid, match="negative size"):
            self.entries(bytes(header))

    @pytest.mark.parametrize(
        "record", [b"9 path=\n", b"99 path=a\n", b"0 path=a\n", b"-5 path=a\n", b"path=a\n", b"11 path a\n\n"]
    )
    def test_malformed_extended_headers(self, record: bytes) -> None:
        with pytest.raises(ImageInvalid, match="malformed"):
            self.entries(self.extended(record))

    def test_an_extended_header_of_a_gigabyte_is_not_read(self) -> None:
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, 1 << 30
        with pytest.raises(ImageInvalid, match="extended header"):
            self.entries(info.tobuf(tarfile.USTAR_FORMAT))

    @pytest.mark.parametrize("key", [b"GNU.sparse.map", b"GNU.sparse.major"])
    def test_sparse_entries_are_refused_with_advice(self, key: bytes) -> None:
        record = b" " + key + b"=1\n"
        record = b"%d" % (len(record) + 2) + record
        with pytest.raises(ImageInvalid, match="--sparse"):
            self.entries(self.extended(record))

    def test_a_size_in_an_extended_header_counts(self) -> None:
        data = self.extended(b"12 size=512\n") + bytes(512) + tar(member("g"))
        assert self.entries(data) == [b"f", b"g"]

    @staticmethod
    def extended(record: bytes) -> bytes:
        info = tarfile.TarInfo("x")
        info.type, info.size = tarfile.XHDTYPE, len(record)
        return (
            info.tobuf(tarfile.USTAR_FORMAT)
            + record.ljust(512, b"\0")
            + tarfile.TarInfo("f").tobuf(tarfile.USTAR_FORMAT)
        )
