"""``image: host``: what is presented of this host, and what never is."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd.images.host import Host

if TYPE_CHECKING:
    from sandboxd.images import ImageStore


def test_the_skeleton_has_a_target_for_each_bind_and_nothing_of_the_hosts(store: ImageStore) -> None:
    image = store.resolve("host")
    root = image.rootfs
    assert root is not None
    assert image.digest.startswith("sha256:")
    targets = [bind.target for bind in image.binds]
    assert targets[0] == "/usr"
    for bind in image.binds:
        assert (root / bind.target[1:]).is_dir() == Path(bind.source).is_dir()
    for name in ("bin", "sbin", "lib", "lib64"):
        host = Path("/", name)
        if host.is_symlink():
            assert (root / name).readlink() == host.readlink()
        elif host.is_dir():
            assert f"/{name}" in targets
    for private in ("home", "root", "var", "srv", "opt", "etc/shadow"):
        assert not (root / private).exists()
        assert not any(target.startswith(f"/{private}") for target in targets)
    assert "sandbox:x:1000:1000::/tmp" in (root / "etc/passwd").read_text().replace(":sandbox:/", "::/")
    assert (root / "etc/resolv.conf").read_bytes() == b""
    assert (root / "etc/os-release").read_bytes() == Path("/etc/os-release").read_bytes()


def test_it_is_found_by_its_digest_and_can_be_held(store: ImageStore) -> None:
    image = store.resolve("host")
    assert store.resolve(image.digest).binds == image.binds
    with store.hold(image.digest):
        assert store.resolve("host") == image
    assert store.verify("host") == []


def test_programs_run_in_it(store: ImageStore, tmp_path: Path) -> None:
    image = store.resolve("host")
    binds = " && ".join(f"mount --rbind {bind.source} {image.rootfs}{bind.target}" for bind in image.binds)
    script = (
        f"{binds} && exec chroot {image.rootfs} /bin/sh -c 'id -un 1000; ls /home /root; python3 -c pass'"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )  # fmt: skip
    assert done.stdout == "sandbox\n"
    assert "/home" in done.stderr


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A host of another make: no merged /usr, and rpm for packages."""
    root = tmp_path / "host"
    for name in ("usr/bin", "bin", "lib", "etc/ssl/certs", "var/lib/rpm", "etc/alternatives"):
        (root / name).mkdir(parents=True)
    (root / "etc/os-release").write_text("ID=other\n")
    (root / "var/lib/rpm/rpmdb.sqlite").write_text("1")
    (root / "etc/ld.so.cache").symlink_to("/home/secret")
    (root / "etc/localtime").symlink_to("/usr/share/zoneinfo/Etc/UTC")
    return root


def test_a_host_without_merged_usr_binds_directories_and_no_links(other: Path, tmp_path: Path) -> None:
    made = Host(other).make(tmp_path / "skeleton")
    assert [bind.target for bind in made.binds] == [
        "/usr",
        "/bin",
        "/lib",
        "/etc/alternatives",
        "/etc/ssl/certs",
    ]
    assert made.binds[1].source == str(other / "bin")
    assert (tmp_path / "skeleton/etc/localtime").readlink() == Path("/usr/share/zoneinfo/Etc/UTC")


def test_the_digest_follows_the_packages(other: Path, tmp_path: Path) -> None:
    host = Host(other)
    state = host.state()
    first = host.make(tmp_path / "a")
    assert host.make(tmp_path / "b").digest == first.digest
    assert host.state() == state
    (other / "var/lib/rpm/rpmdb.sqlite").write_text("22")
    assert host.state() != state
    assert host.make(tmp_path / "c").digest != first.digest
