"""Overlays of many layers, by either way of naming them."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import pytest

from sandboxd.kernel import mounts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.mark.parametrize("one_by_one", [True, False])
def test_an_overlay_of_as_many_layers_as_a_session_has(tmp_path: Path, *, one_by_one: bool) -> None:
    count = 60  # of ten thousand calls, at the very worst: 3 * 15 merged ones, and 15 that are not yet
    layers, place, upper = tmp_path / "layers", tmp_path / "place", tmp_path / "upper"
    for directory in (layers, place, upper, upper / "upper", upper / "work"):
        directory.mkdir()
    names = [uuid4().hex for _ in range(count)]
    for number, name in enumerate(names):
        (layers / name).mkdir()
        (layers / name / f"f{number}").touch()
        (layers / name / "top").write_text(str(number))
    with ExitStack() as stack:
        fd = os.open(layers, os.O_PATH | os.O_DIRECTORY)
        stack.callback(os.close, fd)
        lowers = [f"/proc/self/fd/{fd}/{name}" for name in names]
        options = {"upperdir": str(upper / "upper"), "workdir": str(upper / "work")}
        mount = mounts.new_overlay(lowers, options, place, one_by_one=one_by_one)
        stack.callback(os.close, mount)
        assert list(place.iterdir()) == []
        mounts.attach(mount, place)
        stack.callback(mounts.detach, place)
        assert len(list(place.iterdir())) == count + 1
        assert (place / "top").read_text() == "0"
        (place / "top").write_text("written")
        assert (upper / "upper" / "top").read_text() == "written"
        entries = mounts.parse_mountinfo(Path("/proc/self/mountinfo").read_text())
        (entry,) = [one for one in entries if one.target == str(place)]
        assert {"nosuid", "nodev"} <= entry.options
