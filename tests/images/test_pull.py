"""``image pull`` from a real registry on this machine, plain HTTP as its own file of registries permits."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from archives import docker_save, member, tar
from registry import running_registry

from sandboxd.errors import ImageInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sandboxd.images import ImageStore


@pytest.fixture
def registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, need: Callable[[object, str], None]
) -> Iterator[str]:
    """Host and port of a registry that holds ``tools/small:1``."""
    need(shutil.which("docker-registry"), "docker-registry")
    with running_registry(tmp_path) as at:
        insecure = tmp_path / ".config/containers/registries.conf"
        insecure.parent.mkdir(parents=True)
        insecure.write_text(f'[[registry]]\nlocation = "{at}"\ninsecure = true\n')
        monkeypatch.setenv("HOME", str(tmp_path))  # where skopeo looks for that file, before /etc
        saved = tmp_path / "saved.tar"
        saved.write_bytes(docker_save(tar(member("bin/sh", b"#!"), member("etc/keep", b"1"))))
        push = ["skopeo", "--insecure-policy", "copy", "--quiet", f"docker-archive:{saved}"]
        subprocess.run([*push, f"docker://{at}/tools/small:1"], check=True, timeout=60)
        yield at


def test_an_image_comes_from_a_registry(store: ImageStore, registry: str) -> None:
    image = store.pull(f"docker://{registry}/tools/small:1", name="small")
    assert image == store.resolve("small")
    assert image.rootfs is not None
    assert (image.rootfs / "etc/keep").read_bytes() == b"1"
    assert store.verify("small") == []
    assert store.pull(f"{registry}/tools/small:1", name="again").digest == image.digest


def test_an_image_that_the_registry_lacks_is_refused_in_its_words(store: ImageStore, registry: str) -> None:
    for wrong in ("tools/small:2", "tools/none:1"):
        with pytest.raises(ImageInvalid, match=r"manifest unknown|name unknown"):
            store.pull(f"{registry}/{wrong}")
    assert [one.name for one in store.list()] == ["host"]
