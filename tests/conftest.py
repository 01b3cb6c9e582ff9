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

LONG = ("conformance/test_conformance.py", "crash/test_failpoints.py", "crash/test_power_loss.py")
"""Files of few tests that take minutes: begun first, lest one process has them to itself at the end."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Where several processes share the tests, each has whole files, or all of a directory's.

    (pytest-xdist 3.8 has ``loadgroup`` for that, which does nothing with pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415  -- not everybody has it

    class ByDirectory(LoadScopeScheduling):  # type: ignore[misc]  # it says no types
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            directory = Path(file).parent.name
            return directory if directory in TOGETHER else file

        def _assign_work_unit(self, node: object) -> None:
            for scope in self.workqueue:
                if scope.endswith(LONG):
                    self.workqueue.move_to_end(scope, last=False)
                    break
            super()._assign_work_unit(node)

    return ByDirectory(config, log)
