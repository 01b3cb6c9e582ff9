"""Explain names every control with the line that set it."""

from __future__ import annotations

from pathlib import Path

from sandboxd.models import Narrowing, Request
from sandboxd.plan import ImageRef, make_plan, make_shape
from sandboxd.policy import explain, load_policies, shipped_policies
from sandboxd.policy.floor import FORMATS

PYTHON = load_policies([shipped_policies()]).get("python")


def test_every_control_has_its_line() -> None:
    lines = {line["control"]: line for line in explain(PYTHON, None)}
    assert {f"limits.{path}" for path in FORMATS} <= lines.keys()
    for line in lines.values():
        assert set(line) == {"control", "value", "file", "line", "note"}
        if line["line"] == 0:
            assert line["note"]
            continue
        written = Path(line["file"]).read_text().splitlines()[line["line"] - 1]
        key = line["control"].removesuffix(".size").split(".")[-1]
        assert key in written or key.isdigit()
    assert lines["limits.memory"]["value"] == "1GiB"
    assert lines["limits.memory"]["file"].endswith("python.yaml")
    assert lines["limits.wall"]["file"].endswith("default.yaml")
    assert lines["limits.stdout.size"]["file"].endswith("default.yaml")
    assert lines["network"]["value"] == "none"
    assert lines["limits.cpu_time"] == {
        "control": "limits.cpu_time",
        "value": "no limit",
        "file": "(built-in default)",
        "line": 0,
        "note": "default",
    }


def test_a_plan_shows_what_the_request_narrowed() -> None:
    shape = make_shape(PYTHON, ImageRef("python", "sha256:0"))
    request = Request(argv=["true"], limits=Narrowing(memory=2**20 * 64, cpu_time=10**6), artifacts=["out/a"])
    lines = {line["control"]: line for line in explain(PYTHON, make_plan(PYTHON, shape, request))}
    assert lines["limits.memory"]["value"] == "64MiB"
    assert lines["limits.memory"]["note"] == "narrowed by the request from 1GiB"
    assert lines["limits.cpu_time"]["note"] == "narrowed by the request from no limit"
    assert lines["limits.pids"]["note"] == ""
    assert lines["artifacts.0"]["note"] == "narrowed by the request to out/a"


def test_every_list_item_has_a_line_of_its_own() -> None:
    build = load_policies([shipped_policies()]).get("build")
    controls = [line["control"] for line in explain(build)]
    assert controls.count("artifacts.0") == controls.count("artifacts.1") == 1
    assert len(controls) == len(set(controls))
