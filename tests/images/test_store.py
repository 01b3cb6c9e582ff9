"""The store: names, digests, use, removal, and what survives a crash."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from archives import member, rootfs_tar, tar

from sandboxd.errors import HostFailed, ImageInUse, ImageInvalid, InvalidRequest, NotFound
from sandboxd.images import Image, ImageStore

HELD = """
import sys, time
from pathlib import Path
from sandboxd.images import ImageStore
with ImageStore(Path(sys.argv[1])).hold(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""
HALF = """
import os, sys
from pathlib import Path
from sandboxd.images.shelf import Shelf
with Shelf(Path(sys.argv[1])).scratch() as work:
    (work / "rootfs").mkdir()
    print(work, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "archive.tar"
    path.write_bytes(rootfs_tar())
    return path


@pytest.fixture
def small(store: ImageStore, archive: Path) -> Image:
    return store.import_(archive, name="small")


def start(program: str, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_resolve_by_name_and_by_digest(store: ImageStore, small: Image) -> None:
    assert store.resolve("small") == small
    assert store.resolve(small.digest).rootfs == small.rootfs
    assert small.source == "import archive.tar"
    assert small.binds == ()
    root = small.rootfs
    assert root is not None
    assert stat.S_IMODE(root.stat().st_mode) == 0o755
    assert stat.S_IMODE(root.parent.stat().st_mode) == 0o700


def test_the_umask_does_not_change_the_digest(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "bare.tar").write_bytes(tar(member("usr/lib/x", b"1")))
    first = store.import_(tmp_path / "bare.tar", name="first")
    before = os.umask(0o077)
    try:
        assert store.import_(tmp_path / "bare.tar", name="second").digest == first.digest
    finally:
        os.umask(before)


def test_a_name_that_is_unknown_says_what_to_do(store: ImageStore) -> None:
    with pytest.raises(NotFound, match="sandboxd image build python"):
        store.resolve("python")
    for name in ("other", "../../etc", "sha256:" + "0" * 64, "x" * 10_000, "sha256:../x"):
        with pytest.raises(NotFound, match="sandboxd image import"):
            store.resolve(name)


def test_list_has_the_host_and_images_that_lost_their_name(
    store: ImageStore, small: Image, tmp_path: Path
) -> None:
    (tmp_path / "other.tar").write_bytes(tar(member("etc/x", b"other")))
    other = store.import_(tmp_path / "other.tar", name="small")
    assert [info.name for info in store.list()] == ["small", small.digest, "host"]
    assert store.resolve("small").digest == other.digest
    store.remove(small.digest)
    assert [info.name for info in store.list()] == ["small", "host"]


def test_the_same_content_is_kept_once(
    store: ImageStore, small: Image, archive: Path, tmp_path: Path
) -> None:
    again = store.import_(archive, name="again")
    assert again.digest == small.digest
    store.remove("small")
    assert store.resolve("again").digest == small.digest
    store.remove("again")
    assert list((tmp_path / "images").glob("sha256-*")) == []


def test_verify_names_what_changed(store: ImageStore, small: Image) -> None:
    assert small.rootfs is not None
    (small.rootfs / "etc/passwd").write_text("evil")
    (small.rootfs / "etc/shadow").write_text("new")
    assert store.verify("small") == ["/etc/passwd", "/etc/shadow"]
    (small.rootfs.parent / "tree").write_bytes(b"{}\n")
    assert store.verify("small")[0] == "(tree)"


def test_an_image_in_use_stays(store: ImageStore, small: Image, tmp_path: Path) -> None:
    with pytest.raises(ImageInUse, match="default, python"):
        store.remove("small", users={"small": ["python", "default"]})
    with store.hold(small.digest), store.hold(small.digest), pytest.raises(ImageInUse, match="running"):
        store.remove("small")
    process, line = start(HELD, str(tmp_path / "images"), small.digest)
    with process:
        assert line == "held"
        with pytest.raises(ImageInUse):
            store.remove(small.digest)
        process.kill()
    assert store.resolve("small") == small
    store.remove("small")
    with pytest.raises(NotFound), store.hold(small.digest):
        pass
    with pytest.raises(NotFound):
        store.remove("small")


def test_a_policy_keeps_its_image_under_whatever_name_it_is_removed(
    store: ImageStore, small: Image, archive: Path
) -> None:
    for users in ({"small": ["named"]}, {small.digest: ["pinned"]}):
        for name in ("small", small.digest):
            with pytest.raises(ImageInUse, match="used by"):
                store.remove(name, users=users)
    store.import_(archive, name="again")
    for name in ("again", small.digest):
        with pytest.raises(ImageInUse, match="used by one"):
            store.remove(name, users={"again": ["one"], "other": ["two"]})
    store.remove("again", users={"small": ["named"], small.digest: ["pinned"]})  # both still have it
    assert store.resolve("small").digest == store.resolve(small.digest).digest


def test_what_cannot_be_removed_or_held(store: ImageStore) -> None:
    with pytest.raises(InvalidRequest):
        store.remove("host")
    with pytest.raises(InvalidRequest):
        store.hold("small")


def test_what_a_dead_process_left_goes_and_what_a_living_one_makes_stays(tmp_path: Path) -> None:
    root = tmp_path / "images"
    process, line = start(HALF, str(root))
    with process:
        ImageStore(root)
        assert (Path(line) / "rootfs").is_dir()
        process.kill()
        process.wait()
        ImageStore(root)
        assert list((root / "tmp").iterdir()) == []


def test_names_survive_many_writers(store: ImageStore, archive: Path, tmp_path: Path) -> None:
    stores = [store, ImageStore(tmp_path / "images")]
    threads = [
        threading.Thread(target=stores[number % 2].import_, args=(archive,), kwargs={"name": f"n{number}"})
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads((tmp_path / "images/names.json").read_text())) == 8


def test_damage_is_typed(store: ImageStore, small: Image, tmp_path: Path) -> None:
    assert small.rootfs is not None
    (small.rootfs.parent / "image.json").write_text("{")
    with pytest.raises(ImageInvalid, match="damaged"):
        store.resolve("small")
    (tmp_path / "images/names.json").write_text('{"a": "../../etc"}')
    with pytest.raises(ImageInvalid, match="damaged"):
        store.resolve("small")


def test_a_full_disk_is_the_hosts_fault(archive: Path, tmp_path: Path) -> None:
    place = tmp_path / "full"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True)
    try:
        full = ImageStore(place / "images")
        big = tmp_path / "big.tar"
        big.write_bytes(tar(member("etc/big", os.urandom(1 << 20))))
        with pytest.raises(HostFailed, match="No space"):
            full.import_(big, name="big")
        assert list((place / "images/tmp").iterdir()) == []
    finally:
        subprocess.run(["umount", place], check=True)
