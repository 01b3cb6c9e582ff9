"""Every form of archive, through the store; and archives that are wrong."""

from __future__ import annotations

import bz2
import gzip
import lzma
import stat
import subprocess
from pathlib import Path

import pytest
from archives import directory, docker_save, member, oci_layout, rootfs_tar, symlink, tar, tar_of

from sandboxd.errors import ImageInvalid, InvalidRequest, NotFound
from sandboxd.images import ImageStore, ImportLimits

LAYERS = (
    tar(directory("bin"), member("bin/sh", b"#!"), member("etc/old"), member("etc/keep", b"1")),
    tar(member("etc/.wh.old"), member("etc/keep", b"2"), member("etc/new")),
)


def put(tmp_path: Path, content: bytes, name: str = "archive") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def check_layers(rootfs: Path | None) -> None:
    assert rootfs is not None
    assert sorted(path.name for path in (rootfs / "etc").iterdir()) == [
        "hostname",
        "hosts",
        "keep",
        "new",
        "resolv.conf",
    ]
    assert (rootfs / "etc/keep").read_bytes() == b"2"


def test_docker_export(store: ImageStore, tmp_path: Path) -> None:
    image = store.import_(put(tmp_path, rootfs_tar()), name="small")
    assert image == store.resolve("small")
    assert image.rootfs is not None
    assert stat.S_IMODE((image.rootfs / "bin/sh").stat().st_mode) == 0o4755
    for name, mode in {"proc": 0o755, "dev": 0o755, "tmp": 0o1777, "workspace": 0o755}.items():
        assert stat.S_IMODE((image.rootfs / name).lstat().st_mode) == mode
        assert list((image.rootfs / name).iterdir()) == []
    assert store.verify("small") == []


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_docker_save(store: ImageStore, tmp_path: Path, compress: type[bytes]) -> None:
    check_layers(store.import_(put(tmp_path, compress(docker_save(*LAYERS))), name="saved").rootfs)


def test_zstd(store: ImageStore, tmp_path: Path) -> None:
    packed = subprocess.run(["zstd", "-qc"], input=rootfs_tar(), capture_output=True, check=True).stdout
    assert store.import_(put(tmp_path, packed), name="z").size > 0
    with pytest.raises(ImageInvalid):
        store.import_(put(tmp_path, packed[: len(packed) // 2]), name="z")


def test_oci_layout_and_its_tar_are_the_same_image(store: ImageStore, tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "a:b", *LAYERS)  # skopeo would split the path at the colon
    image = store.import_(layout, name="oci")
    check_layers(image.rootfs)
    again = store.import_(put(tmp_path, tar_of(layout)), name="oci2")
    saved = store.import_(put(tmp_path, docker_save(*LAYERS)), name="saved")
    assert image.digest == again.digest == saved.digest


def test_what_umoci_writes(store: ImageStore, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "hello").write_text("hello")
    for command in (
        ["init", "--layout", "layout"],
        ["new", "--image", "layout:x"],
        ["insert", "--image", "layout:x", "tree", "/opt/app"],
    ):
        subprocess.run(["umoci", *command], cwd=tmp_path, check=True, capture_output=True)
    rootfs = store.import_(tmp_path / "layout", name="umoci").rootfs
    assert rootfs is not None
    assert (rootfs / "opt/app/hello").read_text() == "hello"


def test_mount_points_that_are_links_become_directories(store: ImageStore, tmp_path: Path) -> None:
    members = [symlink(name, "/etc") for name in ("proc", "dev", "sys", "tmp", "run", "workspace")]
    archive = tar(directory("etc"), *members, member("dev/sneaked", b"x"))
    rootfs = store.import_(put(tmp_path, archive), name="links").rootfs
    assert rootfs is not None
    for name in ("proc", "dev", "sys", "tmp", "run", "workspace"):
        assert stat.S_ISDIR((rootfs / name).lstat().st_mode)


def test_an_etc_that_is_a_link_cannot_lead_our_writes_out(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    store.import_(put(tmp_path, tar(directory("usr"), symlink("etc", str(tmp_path / "victim")))), name="link")
    assert list((tmp_path / "victim").iterdir()) == []


@pytest.mark.parametrize("make", ["docker", "oci"])
def test_another_architecture_is_refused(store: ImageStore, tmp_path: Path, make: str) -> None:
    other = "s390x"
    source = (
        put(tmp_path, docker_save(*LAYERS, architecture=other))
        if make == "docker"
        else oci_layout(tmp_path / "layout", *LAYERS, architecture=other)
    )
    with pytest.raises(ImageInvalid, match="s390x"):
        store.import_(source, name="other")
    assert [info.name for info in store.list()] == ["host"]


def test_programs_of_another_architecture_are_found_in_a_plain_tree(
    store: ImageStore, tmp_path: Path
) -> None:
    elf = b"\x7fELF\x02\x02\x01" + bytes(11) + (22).to_bytes(2, "big") + bytes(44)
    archive = tar(member("usr/bin/tool", elf, mode=0o755), symlink("bin", "usr/bin"))
    with pytest.raises(ImageInvalid, match="s390x"):
        store.import_(put(tmp_path, archive), name="other")


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    small = ImageStore(tmp_path / "small", limits=ImportLimits(total=8 << 20))
    bomb = tar(directory("etc"), member("etc/zeros", bytes(64 << 20)))
    for number, content in enumerate((gzip.compress(bomb), gzip.compress(docker_save(bomb)))):
        with pytest.raises(ImageInvalid):
            small.import_(put(tmp_path, content, f"bomb{number}"), name="bomb")
    assert list((tmp_path / "small/tmp").iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        bytes(10240),
        gzip.compress(b"hello", mtime=0),  # the name of a test is the same in each process
        gzip.compress(rootfs_tar(), mtime=0)[:100],
        bz2.compress(rootfs_tar())[:60],
        lzma.compress(rootfs_tar())[:60],
        b"BZh91AY" + bytes(100),
        b"\x28\xb5\x2f\xfd" + bytes(100),
        tar(member("manifest.json", b"[]")),
        tar(member("manifest.json", b"{")),
        tar(member("oci-layout", b"{}")),
        tar(member("oci-layout", b"{}"), member("index.json", b"[" * 100_000), directory("blobs")),
    ],
)
def test_what_is_no_image(store: ImageStore, tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ImageInvalid):
        store.import_(put(tmp_path, content), name="bad")
    assert [info.name for info in store.list()] == ["host"]


def test_a_layout_with_a_wrong_digest(store: ImageStore, tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", *LAYERS)
    largest = max((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"x")
    with pytest.raises(ImageInvalid):
        store.import_(layout, name="bad")


def test_a_layout_cannot_point_at_files_of_the_host(store: ImageStore, tmp_path: Path) -> None:
    layout = oci_layout(tmp_path / "layout", *LAYERS)
    (layout / "index.json").rename(tmp_path / "moved.json")
    (layout / "index.json").symlink_to(tmp_path / "moved.json")
    for source in (layout, put(tmp_path, tar_of(layout))):
        with pytest.raises(ImageInvalid, match="no regular file"):
            store.import_(source, name="bad")


def test_sources_and_names_that_cannot_be(store: ImageStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        store.import_(tmp_path / "missing", name="x")
    with pytest.raises(ImageInvalid, match="neither"):
        store.import_(Path("/dev/null"), name="x")
    with pytest.raises(ImageInvalid, match="no OCI image layout"):
        store.import_(tmp_path, name="x")
    for name in ("host", "", "A", "../x", "a/b", "sha256:" + "0" * 64, "x" * 129, "-x"):
        with pytest.raises(InvalidRequest):
            store.import_(put(tmp_path, rootfs_tar()), name=name)


def test_pull_without_a_registry_says_so(store: ImageStore) -> None:
    with pytest.raises(ImageInvalid, match=r"skopeo refused docker://127\.0\.0\.1:9/nothing"):
        store.pull("127.0.0.1:9/nothing:latest")
    for bad in ("--help", "", "a b", "x" * 300):
        with pytest.raises(InvalidRequest):
            store.pull(bad)
