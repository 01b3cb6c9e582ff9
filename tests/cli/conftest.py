"""The server that the command line is tested against."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

# Test directories are no packages: the module is loaded by its path.
_spec = importlib.util.spec_from_file_location(
    "api_server", Path(__file__).parents[1] / "client" / "api_server.py"
)
assert _spec is not None
assert _spec.loader is not None
if "api_server" not in sys.modules:
    _module = importlib.util.module_from_spec(_spec)
    sys.modules["api_server"] = _module
    _spec.loader.exec_module(_module)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Any]:
    """An ``ApiServer`` with no routes yet."""
    with sys.modules["api_server"].ApiServer(tmp_path / "s") as server:
        yield server
