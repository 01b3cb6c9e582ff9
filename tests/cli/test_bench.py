"""``sandboxd bench`` against a real daemon, and its statistics."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

import pytest
from daemons import SANDBOXD

from sandboxd.cli.bench import percentile

if TYPE_CHECKING:
    from daemons import Daemon

SHORT = ("--rounds", "2", "--seconds", "0.2")


def run(daemon: Daemon, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SANDBOXD, "bench", "--socket", daemon.socket, *options],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_it_measures_calls_beside_a_bare_process(daemon: Daemon) -> None:
    found = run(daemon, *SHORT, "--json")
    assert found.returncode == 0, found.stderr
    document = json.loads(found.stdout)
    kinds = {(one["who"], one["what"]) for one in document["times"]}
    assert {("fork+exec", "true"), ("sandboxd", "true"), ("sandboxd", "python3")} <= kinds
    assert all(0 < one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"] for one in document["times"])
    assert [one["callers"] for one in document["throughput"]] == [1, 4, 16]
    assert all(one["per_second"] > 0 for one in document["throughput"])


def test_people_get_tables(daemon: Daemon) -> None:
    found = run(daemon, *SHORT)
    assert found.returncode == 0, found.stderr
    assert "TIMES FORK+EXEC" in found.stdout
    assert "CALLS A SECOND" in found.stdout


@pytest.mark.parametrize(
    ("options", "said"), [(["--policy", "nope"], "nope"), (["--seconds", "0"], "--seconds")]
)
def test_what_cannot_be_measured_is_an_error(daemon: Daemon, options: list[str], said: str) -> None:
    found = run(daemon, *options)
    assert (found.returncode, found.stdout) == (1, "")
    assert said in found.stderr
    assert "Traceback" not in found.stderr


def test_percentiles_are_of_the_nearest_rank() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, percent) for percent in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert percentile([7.0], 99) == 7.0
