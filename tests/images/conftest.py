"""A store of its own per test, and the archives of ``archives.py``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd.images import ImageStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("archives", Path(__file__).with_name("archives.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["archives"] = module
    spec.loader.exec_module(module)
    return module


_load()  # tests are no package, and this is imported before any of them


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ImageStore]:
    """A store; nothing half-made is left in it, whatever the test did."""
    made = ImageStore(tmp_path / "images")
    yield made
    assert list((tmp_path / "images" / "tmp").iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
