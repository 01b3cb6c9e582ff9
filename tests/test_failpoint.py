"""Failpoints: nothing without the variable, and what a file says with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from crashing import names_in_source

from sandboxd import failpoint
from sandboxd.failpoint import VARIABLE

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
from sandboxd.failpoint import failpoint
for number in range(5):
    try:
        failpoint("place")
        print(number, flush=True)
    except OSError as error:
        print(error.errno, error.strerror, flush=True)
"""


def run(directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, VARIABLE: str(directory)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )


def test_nothing_is_armed_unless_the_daemon_was_started_so() -> None:
    assert VARIABLE not in os.environ
    assert failpoint._failpoints is None


@pytest.mark.parametrize(
    ("action", "said", "status"),
    [
        (None, "0\n1\n2\n3\n4\n", 0),
        ("KILL", "", -signal.SIGKILL),
        ("KILL 3", "0\n1\n", -signal.SIGKILL),
        ("ENOSPC 5", "0\n1\n2\n3\n28 No space left on device\n", 0),
        ("EIO", "5 Input/output error\n" * 5, 0),
    ],
)
def test_a_file_says_what_happens(tmp_path: Path, action: str | None, said: str, status: int) -> None:
    if action is not None:
        (tmp_path / "place").write_text(action)
    done = run(tmp_path)
    assert (done.stdout, done.returncode) == (said, status), done.stderr
    assert (tmp_path / "hits").read_text() == "place\n"


def test_names_are_places_of_their_own() -> None:
    names = names_in_source()
    assert {"accept.durable", "outcome.write", "layer.sync"} <= names
    assert not [name for name in names if name.startswith(".") or "/" in name]
