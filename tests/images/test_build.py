"""Real builds: the same twice, usable, and nothing left when one fails or is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sandboxd.errors import ImageInvalid
from sandboxd.images import ImageStore

TINY = (
    "name: tiny\ndescription: The essential packages and one that is compiled.\npackages: [python3-minimal]\n"
)
BUILD = """
import sys
from pathlib import Path
from sandboxd.images import ImageStore
ImageStore(Path(sys.argv[1])).build(Path(sys.argv[2]), progress=lambda line: print(line, flush=True))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY + "exclude: [/usr/share/doc/*, /usr/share/man/*, /usr/share/locale/*]\n")
    return path


@pytest.mark.timeout(300)
def test_two_builds_have_one_digest(store: ImageStore, recipe: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    first = store.build(recipe, progress=lines.append)
    assert lines[-1] == "taking the digest"
    assert not any("exec " in line for line in lines)
    record = (tmp_path / "images" / first.digest.replace(":", "-") / "tree").read_bytes()
    store.remove("tiny")
    second = store.build(recipe, progress=lines.append)
    again = (tmp_path / "images" / second.digest.replace(":", "-") / "tree").read_bytes()
    assert set(record.splitlines()) ^ set(again.splitlines()) == set()
    assert first.digest == second.digest
    assert store.verify("tiny") == []
    root = second.rootfs
    assert root is not None
    assert not (root / "etc/shadow").exists()
    assert (root / "etc/resolv.conf").read_bytes() == b""
    done = subprocess.run(
        ["/usr/sbin/chroot", "--userspec=1000:1000", root, "/usr/bin/python3", "-c",
         "import os, pwd, textwrap; print(pwd.getpwuid(os.getuid()).pw_name, textwrap.__cached__)"],
        capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.stdout.startswith("sandbox /usr/lib/python3")
    bytecode = sorted(root.glob("usr/lib/python3.*/__pycache__/*.pyc"))
    assert bytecode
    assert {path.read_bytes()[4] for path in bytecode} == {1}  # unchecked-hash: PEP 552


def test_a_package_that_does_not_exist(store: ImageStore, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: bad\ndescription: x\npackages: [no-such-package-anywhere]\n")
    with pytest.raises(ImageInvalid, match="no-such-package-anywhere"):
        store.build(path, progress=lambda _: None)
    assert [info.name for info in store.list()] == ["host"]


def test_a_killed_build_leaves_no_process_and_no_mount(recipe: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, root, recipe],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("extracting"):
                break
        assert using(root)
        process.kill()
    deadline = time.monotonic() + 10
    while using(root) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert using(root) == []
    assert str(root) not in Path("/proc/self/mounts").read_text()
    ImageStore(root)
    assert list((root / "tmp").iterdir()) == []


def using(root: Path) -> list[str]:
    """The processes whose command line names a file below ``root``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if os.fsencode(root) + b"/tmp" in text:
            found.append(entry.parent.name)
    return found
