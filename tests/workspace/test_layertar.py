"""Layers as tars of the OCI format: out and in again, and what is hostile."""

from __future__ import annotations

import io
import os
import random
import stat
import subprocess
import tarfile
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layered import HISTORIES, Shown, Stacked, shown, viewed

from sandboxd import errors
from sandboxd.images.tarstream import ImportLimits
from sandboxd.workspace.layerimport import Imported, import_layer
from sandboxd.workspace.layertar import Export, export_diff, export_stack
from sandboxd.workspace.tree import remove_tree
from sandboxd.workspace.view import View

if TYPE_CHECKING:
    from collections.abc import Sequence

Histories = list[list[tuple[str, bytes, bytes]]]
OWNER = (1000, 1000)


def whole(layers: Sequence[Path], *, times: bool = False) -> bytes:
    with View(layers) as view:
        return b"".join(export_stack(view, times=times).chunks)


def between(old: Sequence[Path], new: Sequence[Path]) -> bytes:
    with View(old) as before, View(new) as after:
        return b"".join(export_diff(before, after).chunks)


def bring(
    data: bytes, into: Path, below: Sequence[Path] = (), limits: ImportLimits | None = None
) -> Imported:
    into.mkdir()
    fd = os.open(into, os.O_RDONLY)
    try:
        with View(below) as view:
            return import_layer(io.BytesIO(data), fd, view, owner=OWNER, limits=limits)
    finally:
        os.close(fd)


def beneath(files: Shown) -> Shown:
    return {path: what for path, what in files.items() if path}


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", uid: int = 0
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.uid, info.mode = kind, link, len(data), uid, 0o755
    return info, data


def made(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@given(HISTORIES)
def test_a_stack_goes_out_and_in_again(histories: Histories) -> None:
    with tempfile.TemporaryDirectory(prefix="sandboxd-tar") as text:
        place = Path(text)
        stacked = Stacked(place / "stack")
        for operations in histories:
            stacked.turn(operations)
        data = whole(stacked.layers)
        bring(data, place / "one")
        assert beneath(shown([place / "one"])) == beneath(shown(stacked.layers))
        assert whole([place / "one"]) == data


@given(HISTORIES, HISTORIES)
def test_a_diff_makes_the_newer_of_the_older(first: Histories, second: Histories) -> None:
    with tempfile.TemporaryDirectory(prefix="sandboxd-tar") as text:
        place = Path(text)
        line = Stacked(place / "line")
        for operations in first:
            line.turn(operations)
        fork = Stacked(place / "fork", line.layers[-1:])
        for operations in second:
            fork.turn(operations)
        bring(between(line.layers, fork.layers), place / "step", line.layers)
        layers = [place / "step", *line.layers]
        assert beneath(shown(layers)) == beneath(viewed(layers)) == beneath(shown(fork.layers))


MEMBERS = st.lists(
    st.tuples(
        st.lists(st.sampled_from(["a", "b", "c", ".wh.a", ".wh.b", ".wh..wh..opq"]), min_size=1, max_size=3),
        st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]),
        st.sampled_from(["a", "b", "a/b", "c/c"]),
    ),
    max_size=10,
)


def applied(  # noqa: C901  the specification in one place
    files: dict[str, str], members: list[tuple[list[str], bytes, str]]
) -> dict[str, str] | None:
    """A model of the specification: what files there are after a layer; None for a layer that is refused."""
    own: dict[str, str] = {}
    lower = dict(files)

    def clear(tree: dict[str, str], path: str, *, itself: bool = True) -> None:
        for one in list(tree):
            if (itself and one == path) or one.startswith(f"{path}/") or (not path and not itself):
                del tree[one]

    for parts, kind, link in members:
        *above, name = parts
        if any(part.startswith(".wh.") for part in above):
            return None
        directory = "/".join(above)
        path = "/".join(parts)
        hides = name.startswith(".wh.")
        target = "/".join([*above, name[4:]]) if hides else path
        if hides and name != ".wh..wh..opq" and target not in lower:
            continue
        for depth in range(1, len(parts)):
            at = "/".join(parts[:depth])
            if own.get(at, lower.get(at, "directory")) != "directory":
                return None
            own.setdefault(at, "directory")
        if name == ".wh..wh..opq":
            clear(lower, directory, itself=False)
        elif hides:
            clear(lower, target)
        elif kind == tarfile.LNKTYPE:
            if path == link or own.get(link) in {None, "directory"}:
                return None
            clear(lower, path)
            kept = own[link]
            clear(own, path)
            own[path] = kept
        elif kind == tarfile.DIRTYPE:
            if own.get(path, "directory") != "directory" or lower.get(path, "directory") != "directory":
                clear(own, path)
                clear(lower, path)
            own[path] = "directory"
        else:
            clear(own, path)
            clear(lower, path)
            own[path] = "file" if kind == tarfile.REGTYPE else "symlink"
    return lower | own


@given(HISTORIES, MEMBERS)
def test_any_layer_is_what_the_specification_says(
    histories: Histories, members: list[tuple[list[str], bytes, str]]
) -> None:
    with tempfile.TemporaryDirectory(prefix="sandboxd-tar") as text:
        place = Path(text)
        stacked = Stacked(place / "stack")
        for operations in histories:
            stacked.turn(operations)
        before = {os.fsdecode(path): str(what[0]) for path, what in beneath(shown(stacked.layers)).items()}
        expected = applied(before, members)
        data = made(
            *(
                member("/".join(parts), kind=tarfile.REGTYPE if ".wh." in parts[-1] else kind, link=link)
                for parts, kind, link in members
            )
        )
        try:
            bring(data, place / "new", stacked.layers)
        except errors.InvalidRequest:
            assert expected is None
            return
        layers = [place / "new", *stacked.layers]
        now = shown(layers)
        assert {os.fsdecode(path): str(what[0]) for path, what in beneath(now).items()} == expected
        assert viewed(layers) == now


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    """Whatever layers they are in, in whatever order they were made, and when."""
    operations = [("write", b"d/%d" % number, b"%d" % number) for number in range(20)]
    operations += [("symlink", b"link", b"d/1"), ("fifo", b"fifo", b""), ("link", b"d/1", b"e")]
    one = Stacked(tmp_path / "one")
    one.turn(operations)
    shuffled = list(operations[:-1])
    random.Random(1).shuffle(shuffled)
    other = Stacked(tmp_path / "other")
    for turn in (shuffled[:7], shuffled[7:15], shuffled[15:]):
        other.turn(turn)
    other.turn([("write", b"d/1", b"1"), operations[-1]])  # a link breaks when its file is copied up
    os.utime(one.layers[0] / "d" / "3", (5, 5))
    assert shown(one.layers) == shown(other.layers)
    assert whole(one.layers) == whole(other.layers)
    assert whole(one.layers, times=True) != whole(one.layers)


def test_other_programs_read_it(tmp_path: Path) -> None:
    long = b"/".join([b"a-directory-with-a-name"] * 12) + b"/\xff.txt"
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("write", long, b"long"), ("write", b"f", b"file"), ("chown", b"f", b"")])
    stacked.turn([("symlink", b"link", long), ("write", b"old", b""), ("link", b"f", b"g")])
    data = whole(stacked.layers)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-x", "-C", tmp_path / "out"], input=data, check=True)
    assert beneath(viewed([tmp_path / "out"])) == beneath(shown(stacked.layers))
    assert (tmp_path / "out" / "f").stat().st_nlink == 2
    below = list(stacked.layers)
    stacked.turn([("remove", b"old", b""), ("remove", b"a-directory-with-a-name", b"")])
    with tarfile.open(fileobj=io.BytesIO(between(below, stacked.layers))) as archive:
        assert archive.getnames() == [".wh.a-directory-with-a-name", ".wh.old"]


def test_times_are_kept_if_asked_for(tmp_path: Path) -> None:
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("write", b"f", b"")])
    os.utime(stacked.layers[0] / "f", (1_700_000_000, 1_700_000_000))
    bring(whole(stacked.layers, times=True), tmp_path / "kept")
    assert (tmp_path / "kept" / "f").stat().st_mtime == 1_700_000_000
    bring(whole(stacked.layers), tmp_path / "dropped")
    assert (tmp_path / "dropped" / "f").stat().st_mtime == 0


@pytest.mark.parametrize("name", [b".wh.f", b".wh..opq", b".wh..wh..opq", b"d/.wh.", b"d/.wh.x/f"])
def test_a_file_that_would_be_a_whiteout_is_refused_before_a_byte_is_written(
    tmp_path: Path, name: bytes
) -> None:
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("write", b"f", b"kept")])
    below = list(stacked.layers)
    stacked.turn([("write", name, b"")])
    assert name in shown(stacked.layers)
    with View(below) as old, View(stacked.layers) as new:
        with pytest.raises(errors.StateConflict, match=r"\.wh\.") as error:
            export_stack(new)
        assert error.value.details["path"].startswith("'")
        with pytest.raises(errors.StateConflict):
            export_diff(old, new)
    with_it = list(stacked.layers)
    stacked.turn([("remove", name.removesuffix(b"/f"), b"")])
    whole(stacked.layers)
    between(below, stacked.layers)
    with View(with_it) as old, View(stacked.layers) as new:
        # .wh..wh..opq would say that all else in the directory is gone, .wh..wh.f nothing at all
        with pytest.raises(errors.StateConflict, match=r"was removed cannot be exported") as error:
            export_diff(old, new)
        assert error.value.details["path"] == ascii(name.removesuffix(b"/f").decode())


def test_what_goes_with_its_directory_needs_no_whiteout(tmp_path: Path) -> None:
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("write", b"d/.wh.f", b""), ("write", b"d/.wh..opq", b"")])
    below = list(stacked.layers)
    stacked.turn([("remove", b"d", b"")])
    with tarfile.open(fileobj=io.BytesIO(between(below, stacked.layers))) as archive:
        assert archive.getnames() == [".wh.d"]


def test_what_no_layer_holds_is_counted(tmp_path: Path) -> None:
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("write", b"f", b"abc"), ("write", b"d/g", b"")])
    with stacked.change() as root:
        os.mknod("socket", stat.S_IFSOCK, dir_fd=root)
    with View(stacked.layers) as view:
        export: Export = export_stack(view)
        assert (export.members, export.size, export.unfit, export.omitted) == (3, 3, 1, [b"socket"])
        with tarfile.open(fileobj=io.BytesIO(b"".join(export.chunks))) as archive:
            assert archive.getnames() == ["d", "d/g", "f"]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([member("../f")], "'..'"),
        ([member("a/../../f")], "'..'"),
        ([member("x" * 256)], "255"),
        ([member("d", kind=tarfile.CHRTYPE)], "device"),
        ([member("d", kind=tarfile.BLKTYPE)], "device"),
        ([member("f", uid=70_000)], "65535"),
        ([member(".wh.")], "no whiteout"),
        ([member(".wh...")], "no whiteout"),
        ([member(".wh.d/f")], "named as a whiteout"),
        (
            [member("l", kind=tarfile.SYMTYPE, link="/etc"), member("l/passwd")],
            "would have to be a directory",
        ),
        ([member("out/passwd")], "is a symlink in the session"),
        ([member("file/below")], "is a file in the session"),
        ([member("l", kind=tarfile.LNKTYPE, link="../../etc/passwd")], "'..'"),
        ([member("l", kind=tarfile.LNKTYPE, link="/etc/passwd")], "does not have"),
        ([member("l", kind=tarfile.LNKTYPE, link="file")], "does not have"),
        ([member(".wh.file"), member("l", kind=tarfile.LNKTYPE, link="file")], "is no file"),
        ([member("l", kind=tarfile.LNKTYPE, link="l")], "to itself"),
        ([member("e", kind=tarfile.SYMTYPE, link="")], "nothing that can be named"),
    ],
)
def test_hostile_archives(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], words: str) -> None:
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("symlink", b"out", b"/etc"), ("write", b"file", b"")])
    before = {one: one.stat().st_ino for one in Path("/etc").iterdir()}
    with pytest.raises(errors.InvalidRequest) as error:
        bring(made(*members), tmp_path / "new", stacked.layers)
    assert words in str(error.value)
    assert {one: one.stat().st_ino for one in Path("/etc").iterdir()} == before


def test_an_absolute_name_is_beneath_the_layer(tmp_path: Path) -> None:
    bring(made(member("/etc/passwd", b"mine")), tmp_path / "new")
    assert (tmp_path / "new" / "etc" / "passwd").read_text() == "mine"


def test_an_archive_that_was_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = made(member("f", b"x" * 1000), member("d", kind=tarfile.DIRTYPE), member("g" * 200), member("h"))
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for size in [*range(0, end + 1024, 512), end + 1, end + 1023]:
        with pytest.raises(errors.InvalidRequest):
            bring(data[:size], tmp_path / f"cut{size}")
    with pytest.raises(errors.InvalidRequest, match="two blocks of zeros"):
        bring(data[: end + 512] + b"x" * 512, tmp_path / "half")
    bring(data[: end + 1024], tmp_path / "whole")
    assert sorted(shown([tmp_path / "whole"])) == [b"", b"d", b"f", b"g" * 200, b"h"]
    bring(bytes(1024), tmp_path / "zeros")
    assert sorted(shown([tmp_path / "zeros"])) == [b""]


def test_gnu_tar_marks_the_end(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 700)
    command = ["tar", "-C", str(tmp_path), "--blocking-factor=1", "-c", "f"]
    bring(subprocess.run(command, capture_output=True, check=True).stdout, tmp_path / "new")
    assert (tmp_path / "new" / "f").read_bytes() == b"x" * 700


def test_damage_and_bounds(tmp_path: Path) -> None:
    data = made(member("f", b"x" * 4096), member("g"))
    for number, damaged in enumerate((data[:1000], b"no tar" * 1000, b"\x1f\x8b" + data)):
        with pytest.raises(errors.InvalidRequest):
            bring(damaged, tmp_path / f"damaged{number}")
    with pytest.raises(errors.TooLarge) as error:
        bring(data, tmp_path / "large", limits=ImportLimits(total=4096))
    assert error.value.details["limit"] == 4096
    with pytest.raises(errors.TooLarge):
        bring(data, tmp_path / "many", limits=ImportLimits(entries=1))
    deep = made(member("/".join("d" * 2000)))
    with pytest.raises(errors.TooLarge):
        bring(deep, tmp_path / "deep", limits=ImportLimits(entries=1000))
    parent = os.open(tmp_path, os.O_RDONLY)
    remove_tree(parent, b"deep")  # for pytest, whose own way of removing it has an end
    os.close(parent)


def test_zeros_become_holes(tmp_path: Path) -> None:
    bring(made(member("f", bytes(32 << 20))), tmp_path / "new")
    status = (tmp_path / "new" / "f").stat()
    assert status.st_size == 32 << 20
    assert status.st_blocks == 0


def test_the_root_of_a_layer_is_like_that_below(tmp_path: Path) -> None:
    stacked = Stacked(tmp_path / "stack")
    with stacked.change() as root:
        os.fchown(root, 1000, 1001)
        os.fchmod(root, 0o711)
    bring(made(member("f")), tmp_path / "new", stacked.layers)
    assert shown([tmp_path / "new", *stacked.layers])[b""] == ("directory", 0o711, 1000, 1001)
    bring(made(member("f")), tmp_path / "alone")
    assert shown([tmp_path / "alone"])[b""] == ("directory", 0o755, *OWNER)


def test_nothing_is_left_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    stacked = Stacked(tmp_path / "stack")
    stacked.turn([("write", b"a/b/c", b"")])
    with ExitStack() as stack:
        view = stack.enter_context(View(stacked.layers))
        list(view.walk())
        b"".join(export_stack(view).chunks)
    with pytest.raises(errors.InvalidRequest):
        bring(made(member("a/b/d"), member("a/b/c/f")), tmp_path / "new", stacked.layers)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
