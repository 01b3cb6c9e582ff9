"""The pytest plugin of the suite: the subject as a fixture, what tests need, and the report."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.conformance.subject import Subject, open_subject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.conformance.report import Report

__all__ = ["Suite", "needs"]

needs = pytest.mark.needs
"""``@needs("a limit of io")``: a key of ``expected.EXPECTED``."""
SUBJECT = pytest.StashKey[Subject]()


@pytest.fixture(scope="session")
def subject(pytestconfig: pytest.Config) -> Subject:
    """The daemon under test."""
    return pytestconfig.stash[SUBJECT]


@pytest.fixture
def another(subject: Subject) -> Iterator[Callable[..., Subject]]:
    """Starts further daemons, which end with the test; ``config`` is added to their configuration."""
    with ExitStack() as stack:
        yield lambda config: stack.enter_context(open_subject(subject.options, config=config, share=1))


class Suite:
    """Hands the subject over to pytest, and results to the report."""

    def __init__(self, subject: Subject, report: Report) -> None:
        self._subject = subject
        self._report = report

    def pytest_configure(self, config: pytest.Config) -> None:
        """Before collection."""
        config.stash[SUBJECT] = self._subject
        config.addinivalue_line("markers", "needs(what): a key of expected.EXPECTED")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Before any fixture of a test: what it needs may be what they stand on."""
        for mark in item.iter_markers("needs"):
            if why := self._subject.why_not(mark.args[0]):
                pytest.skip(why)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """After each phase of a test."""
        self._report.add(report)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """At the end."""
        terminalreporter.section("conformance")
        for line in self._report.lines():
            terminalreporter.write_line(line)
