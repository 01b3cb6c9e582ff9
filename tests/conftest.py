"""What every test gets: the leak check around the session, daemons, the profile of the property tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package; what they share is a module here

pytest_plugins = ["leaks", "daemons"]

# A busy machine is no failed property: how long an example takes is not judged.
settings.register_profile("tests", deadline=None)
settings.register_profile(
    "nightly",
    deadline=None,
    max_examples=int(os.environ.get("SANDBOXD_HYPOTHESIS_EXAMPLES", "0")) or 100,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("nightly" if "SANDBOXD_HYPOTHESIS_EXAMPLES" in os.environ else "tests")

TOGETHER = {"docker", "hostile", "init", "network", "ports"}
"""Directories whose tests share what there is once: an engine, an internet, a daemon, a user of the host."""
FIRST = {"docker", "network"}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which tests stay in one process where several share them (pytest-xdist's loadgroup)."""
    # the longest first, in a process that has done nothing else
    items.sort(key=lambda item: item.path.parent.name not in FIRST)
    for item in items:
        directory = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(directory if directory in TOGETHER else str(item.path)))
