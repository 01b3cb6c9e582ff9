"""Shapes and plans: pure, exact, and never wider than the policy."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd import canonical, errors
from sandboxd.models import Bytes, Input, Narrowing, Request
from sandboxd.narrowing import make_plan
from sandboxd.plan import ImageRef, Mount, Plan, make_shape
from sandboxd.policy import load_policies, shipped_policies

if TYPE_CHECKING:
    from pathlib import Path

SHIPPED = load_policies([shipped_policies()])
IMAGE = ImageRef("base", canonical.digest_bytes(b""))
DEFAULT = SHIPPED.get("default")
SHAPE = make_shape(DEFAULT, IMAGE)


def plan(policy: str = "default", **request: Any) -> Plan:
    found = SHIPPED.get(policy)
    return make_plan(found, make_shape(found, IMAGE), Request(**{"argv": ["true"], **request}))


def given_input(path: str, text: str = "x") -> Input:
    return Input(path=path, content=Bytes(text=text))


def test_a_shape_is_exact_and_its_digest_is_that_of_its_values() -> None:
    assert SHAPE.limits.memory == 512 * 2**20
    assert (SHAPE.process.uid, SHAPE.process.gid, SHAPE.process.umask) == (1000, 1000, 0o022)
    assert (SHAPE.root.mode, SHAPE.root.size) == ("read-only", 0)
    assert SHAPE.network is None
    assert SHAPE.syscalls == DEFAULT.syscalls
    assert SHAPE.digest == make_shape(DEFAULT, IMAGE).digest
    assert SHAPE.digest != make_shape(DEFAULT, ImageRef("base", "sha256:1")).digest
    assert json.loads(canonical.canonical(SHAPE.to_json()))["limits"]["pids"] == 64
    build = make_shape(SHIPPED.get("build"), IMAGE)
    assert (build.root.mode, build.root.size, build.root.inodes) == ("overlay", 512 * 2**20, 50_000)
    assert make_shape(SHIPPED.get("strict"), IMAGE).limits.on_output == "kill"


def test_the_digest_of_a_plan_is_that_of_all_its_values() -> None:
    full = plan(
        "build",
        argv=["cat", "\u00e9"],
        tar={"text": "tar"},
        inputs=[{"path": "a/b", "content": {"text": "x"}}],
        artifacts=["*.png"],
        limits={"wall": "1s"},
    )
    for one in (plan(), full):
        assert one.encoded == canonical.canonical(one.to_json())
        assert one.digest == canonical.digest(one.to_json())


def test_what_a_policy_says_reaches_the_shape(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(
        "version: 1\nname: p\nmounts: [{source: /srv/a, target: /a}]\n"
        "process: {user: 7, group: 8, hostname: h, umask: '0077'}\n"
        "limits: {file_size: 1MiB, io: {read: 2MiB}, cpus: 0.25, cpu_time: 1.5s, stderr: {on_limit: kill}}\n"
    )
    shape = make_shape(load_policies([tmp_path]).get("p"), IMAGE)
    assert shape.mounts == (Mount("/srv/a", "/a"),)
    assert (shape.process.uid, shape.process.gid, shape.process.user_namespace) == (7, 8, "slot")
    assert (shape.process.hostname, shape.process.umask) == ("h", 0o077)
    assert (shape.limits.file_size, shape.limits.io_read, shape.limits.io_write) == (2**20, 2**21, None)
    assert (shape.limits.cpus, shape.limits.cpu_time, shape.limits.on_output) == (250, 1_500_000, "kill")


def test_the_command_has_the_documented_environment() -> None:
    env = plan("python", env={"LANG": "de_DE.UTF-8", "X": "1"}).command.env
    assert env["HOME"] == env["TMPDIR"] == "/tmp"
    assert env["PATH"].endswith("/usr/bin:/sbin:/bin")
    assert (env["LANG"], env["X"], env["MPLBACKEND"]) == ("de_DE.UTF-8", "1", "Agg")


def test_argv_may_be_bytes() -> None:
    argv = plan(argv=["cat", Bytes(base64=base64.b64encode(b"\xff").decode())]).command.argv
    assert argv == ({"text": "cat"}, {"base64": "/w=="})
    same = plan(argv=["cat", Bytes(base64=base64.b64encode(b"x").decode())])
    assert same.digest == plan(argv=["cat", "x"]).digest


@pytest.mark.parametrize(
    ("narrow", "said", "asked", "allowed"),
    [
        (
            {"memory": "513MiB"},
            "limits.memory 513MiB is more than the policy's 512MiB",
            513 * 2**20,
            512 * 2**20,
        ),
        ({"wall": "61s"}, "limits.wall 61s is more than the policy's 1m", 61_000_000, 60_000_000),
        ({"cpus": 1.5}, "limits.cpus 1.5 is more than the policy's 1", 1500, 1000),
        ({"pids": 65}, "limits.pids 65 is more than the policy's 64", 65, 64),
        ({"stdout": "2MiB"}, "limits.stdout 2MiB is more than the policy's 1MiB", 2 * 2**20, 2**20),
    ],
)
def test_a_wider_request_is_refused_with_both_values(
    narrow: dict[str, Any], said: str, asked: int, allowed: int
) -> None:
    with pytest.raises(errors.RequestTooWide, match=said) as caught:
        plan(limits=narrow)
    assert (caught.value.details["asked"], caught.value.details["allowed"]) == (asked, allowed)


def test_all_that_is_wider_is_named() -> None:
    with pytest.raises(errors.RequestTooWide) as caught:
        plan(limits={"memory": "1GiB", "pids": 100, "wall": "1s"})
    assert [item["limit"] for item in caught.value.details["wider"]] == ["memory", "pids"]


def test_what_the_policy_leaves_open_a_request_may_set() -> None:
    assert plan(limits={"cpu_time": "9h"}).limits.cpu_time == 9 * 3600 * 10**6


@given(
    st.builds(
        Narrowing,
        wall=st.none() | st.integers(1, 10**8),
        cpus=st.none() | st.sampled_from([0.01, 0.5, 1.0, 1.001, 7.0]),
        memory=st.none() | st.integers(2**22, 2**30),
        pids=st.none() | st.integers(1, 100),
        stderr=st.none() | st.integers(0, 2**21),
    )
)
def test_no_plan_is_wider_than_its_policy(narrow: Narrowing) -> None:
    try:
        limits = make_plan(DEFAULT, SHAPE, Request(argv=["x"], limits=narrow)).limits
    except errors.RequestTooWide as error:
        wider = error.details["wider"]
    else:
        wider = []
        assert limits.wall == (narrow.wall or SHAPE.limits.wall)
        for name in ("wall", "cpus", "memory", "pids", "stdout", "stderr"):
            assert getattr(limits, name) <= getattr(SHAPE.limits, name)
    assert all(item["asked"] > item["allowed"] for item in wider)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"inputs": [given_input("../x")]}, "inputs.0.path"),
        ({"inputs": [given_input("a"), given_input("/x")]}, "inputs.1.path"),
        ({"inputs": [given_input("a//b")]}, "inputs.0.path"),
        ({"inputs": [given_input("./a")]}, "inputs.0.path"),
        ({"inputs": [given_input("x" * 256)]}, "inputs.0.path"),
        ({"inputs": [given_input("a"), given_input("a")]}, "inputs.1.path"),
        ({"inputs": [given_input("a/b"), given_input("a")]}, "inputs.1.path"),
        ({"cwd": "/workspace/../etc"}, "cwd"),
        ({"cwd": "/workspace/"}, "cwd"),
        ({"argv": [""]}, "argv.0"),
        ({"argv": ["x", Bytes(base64="AA==")]}, "argv.1"),
        ({"artifacts": ["out/**", "/etc/*"]}, "artifacts.1"),
        ({"limits": {"memory": "1MiB"}}, "limits.memory"),
        ({"limits": {"cpus": 0.00001}}, "limits.cpus"),
    ],
)
def test_malformed_requests_name_the_field(request_: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        plan(**request_)
    assert caught.value.details["field"] == field


def test_inputs_must_fit_the_workspace() -> None:
    large = given_input("large", "x" * (17 * 2**20))
    with pytest.raises(errors.RequestTooWide, match=r"17MiB of limits.workspace.size, which is 16MiB"):
        plan("strict", inputs=[large])
    with pytest.raises(errors.RequestTooWide, match=r"limits.workspace.inodes, which is 1k"):
        plan("strict", inputs=[given_input(f"d{number}/f") for number in range(501)])


def test_inputs_and_tar_are_named_by_digest() -> None:
    found = plan(inputs=[Input(path="a/b", content=Bytes(text="x"), mode=0o755)], tar=Bytes(text="tar"))
    assert [(item.path, item.size, item.mode) for item in found.inputs] == [("a/b", 1, 0o755)]
    assert found.inputs[0].digest == canonical.digest_bytes(b"x")
    assert found.tar == canonical.digest_bytes(b"tar")


def test_artifacts_are_the_policys_and_what_the_request_narrows() -> None:
    assert plan("python").artifacts == (("out/**", 64 * 2**20),)
    assert plan("python").narrowed_artifacts is None
    assert plan("python", artifacts=["out/*.png"]).narrowed_artifacts == ("out/*.png",)
    assert plan("python", artifacts=[]).narrowed_artifacts == ()


def test_a_plan_says_when_its_session_keeps_what_it_changed() -> None:
    alone, within = plan(), plan(session="s")
    assert (alone.commit, within.commit) == (None, "exited")
    assert alone.digest != within.digest


def test_plans_differ_by_what_they_would_do_only() -> None:
    assert plan(key="one", labels={"a": "b"}, deadline="5s").digest == plan().digest
    assert plan(stdin="stream").digest != plan().digest
    assert plan(stdin=Bytes(text="a")).digest != plan(stdin=Bytes(text="b")).digest
    assert plan(limits={"wall": "60s"}).digest == plan().digest


def test_what_a_call_holds_counts_what_is_put_into_its_workspace() -> None:
    memory = SHAPE.limits.memory
    assert plan().holds == memory
    assert plan(limits={"memory": "64MiB"}).holds == 64 * 2**20
    assert plan(inputs=[given_input("a", "xyz"), given_input("b", "x")]).holds == memory + 4
    assert plan(tar=Bytes(text="tar")).holds == memory + SHAPE.limits.workspace_size
