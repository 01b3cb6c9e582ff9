"""Explain names every control with the line that set it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pages import code, page

from sandboxd.engine import bundle, oci
from sandboxd.models import Bytes, Narrowing, Request
from sandboxd.narrowing import make_plan
from sandboxd.plan import ImageRef, make_shape
from sandboxd.policy import explain, fixed, load_policies, shipped_policies
from sandboxd.policy.filesystem import DEVICES
from sandboxd.policy.floor import FORMATS
from sandboxd.policy.trust import looks_inside, trust_env
from sandboxd.receipt import mounted
from sandboxd.receipt.reading import RLIMIT_LINES
from sandboxd.units import format_size

if TYPE_CHECKING:
    from sandboxd.policy import Policy

SHIPPED = load_policies([shipped_policies()])
PYTHON, BUILD = SHIPPED.get("python"), SHIPPED.get("build")


def rows(policy: Policy) -> dict[str, dict[str, Any]]:
    return {line["control"]: line for line in explain(policy)}


def test_every_control_has_its_line() -> None:
    lines = {line["control"]: line for line in explain(PYTHON, None)}
    assert {f"limits.{path}" for path in FORMATS} <= lines.keys()
    for line in lines.values():
        assert set(line) == {"control", "value", "file", "line", "note"}
        if line["line"] == 0:
            assert line["note"]
            continue
        if line["control"] in {"process.group", "filesystem.shm"}:
            assert line["note"].startswith("as ")
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


def test_a_plan_shows_its_command_and_the_environment_of_the_request() -> None:
    shape = make_shape(PYTHON, ImageRef("python", "sha256:0"))
    request = Request(
        argv=["echo", "a b", Bytes(base64="/w==")], env={"HOME": "/workspace", "LANG": "C.UTF-8"}
    )
    first, *lines = explain(PYTHON, make_plan(PYTHON, shape, request))
    assert (first["control"], first["value"]) == ("command", r"echo 'a b' '\xff'")
    assert (first["file"], first["line"], first["note"]) == ("(the request)", 0, "set by the request")
    env = {line["control"]: line for line in lines if line["control"].startswith("process.env.")}
    assert (env["process.env.HOME"]["value"], env["process.env.HOME"]["file"]) == (
        "/workspace",
        "(the request)",
    )
    assert env["process.env.LANG"]["note"] == "default"
    long = make_plan(PYTHON, shape, Request(argv=["x" * 100_000]))
    assert len(explain(PYTHON, long)[0]["value"]) < 2000


def test_what_rules_of_http_bring_has_their_line(folder: Any) -> None:
    network = "network:\n  allow: [{host: a.test, ports: [443], methods: [GET]}]\n"
    folder.write("p", f"process: {{env: {{PIP_CERT: /mine}}}}\n{network}")
    folder.write("q", network.replace(", methods: [GET]", ""))
    policies = folder.load()
    policy, plain = policies.get("p"), policies.get("q")
    found = rows(policy)
    for name in ("network.trust", "process.env.SSL_CERT_FILE", "process.env.NODE_EXTRA_CA_CERTS"):
        assert "/dev/.sandboxd-ca.pem" in found[name]["value"]
        assert (found[name]["line"], found[name]["note"]) == (4, "for rules that look into HTTP")
    assert (found["process.env.PIP_CERT"]["value"], found["process.env.PIP_CERT"]["line"]) == ("/mine", 3)
    shape = make_shape(policy, ImageRef("python", "sha256:0"))
    plan = make_plan(policy, shape, Request(argv=["true"], env={"SSL_CERT_FILE": "/asked"}))
    asked = {line["control"]: line for line in explain(policy, plan)}["process.env.SSL_CERT_FILE"]
    assert (asked["value"], asked["file"]) == ("/asked", "(the request)")
    assert plan.command.env["DENO_CERT"] == "/dev/.sandboxd-ca.pem"
    assert not [name for name in rows(plain) if "trust" in name or "CERT" in name or "CA_" in name]
    assert not make_plan(plain, shape, Request(argv=["true"])).command.env.keys() & trust_env(policy.spec)
    for each in (policy, plain, PYTHON):
        rules = make_shape(each, ImageRef("python", "sha256:0")).network
        assert looks_inside(each.spec) is (rules is not None and rules.look_inside)


def test_every_list_item_has_a_line_of_its_own() -> None:
    controls = [line["control"] for line in explain(BUILD)]
    assert controls.count("artifacts.0") == controls.count("artifacts.1") == 1
    assert len(controls) == len(set(controls))


def test_what_follows_another_value_has_the_line_of_that(folder: Any) -> None:
    found = rows(BUILD)
    assert found["process.group"]["line"] == found["process.user"]["line"] != 0
    assert len({found[f"filesystem.{key}"]["line"] for key in ("root", "size", "inodes")}) == 3
    assert "filesystem.size" not in rows(PYTHON)
    folder.write("p", "process:\n  user: 7\n  group: 8\nmounts: [{source: /srv, target: /x}]\n")
    found = rows(folder.load().get("p"))
    assert (found["process.user"]["line"], found["process.group"]["line"]) == (4, 5)
    assert (found["process.group"]["value"], found["process.group"]["note"]) == ("8", "")
    assert found["mounts.0"]["line"] == 6
    assert "mounts" not in found


def test_ends_that_are_tried_again_have_their_line(folder: Any) -> None:
    folder.write(
        "p",
        "limits: {stdout: {size: 1MiB, on_limit: kill}}\n"
        "retry:\n"
        "  exited: {times: 2, codes: [69, 75], raise: {memory: 1GiB, wall: 2m}}\n"
        "  signalled: {}\n"
        "  output: {raise: {stdout: 2MiB}}\n"
        "  memory: {times: 3}\n",
    )
    folder.write("q", "extends: p\nretry: {signalled: {times: 4, signals: [SIGSEGV, SIGBUS]}}\n")
    loaded = folder.load()
    found = {name: line for name, line in rows(loaded.get("p")).items() if name.startswith("retry.")}
    said = {name: (line["value"], line["line"], line["note"]) for name, line in found.items()}
    del said["retry.failed"]
    assert said == {
        "retry.exited": ("2 times", 5, "for status 69, 75, then with memory 1GiB, wall 2m"),
        "retry.signalled": ("1 times", 6, "for any signal"),
        "retry.output": ("1 times", 7, "then with stdout 2MiB"),
        "retry.memory": ("3 times", 8, ""),
    }
    child = rows(loaded.get("q"))["retry.signalled"]
    assert (child["value"], child["note"]) == ("4 times", "for SIGSEGV, SIGBUS")
    assert child["file"].endswith("q.yaml")


ELSEWHERE = {
    "isolation": "isolation",
    "seccomp": "syscalls.base",
    "user": "process.user",
    "group": "process.group",
    "umask": "process.umask",
    "parent": "isolation.init",
    "user_namespace": "process.user_namespace",
    "user_namespace_uids": "process.user_namespace",
    "user_namespace_gids": "process.user_namespace",
    **dict.fromkeys([f"{kind}_namespace" for kind in ("mnt", "pid", "net", "ipc", "uts", "cgroup")],
                    "isolation.namespaces"),
    "network": "network",
    **dict.fromkeys(["network_routes", "network_filter", "network_sysctls"], "network"),
    "hostname": "process.hostname",
    "trust": "network.trust",
    **dict.fromkeys(["secrets", "secrets_swap", "secret_files", "secret NAME"], "secrets.0"),
    "root": "filesystem.root",
    "root_overlay": "filesystem.size",
    "workspace": "limits.workspace.size",
    "tmp": "limits.tmp.size",
    "shm": "filesystem.shm",
    "mount TARGET": "mounts.0",
    "mounts_read_only": "mounts.0",
    "mounts": "mounts.0",
    "masked_paths": "isolation.masked_paths.0",
    "rlimit_open_files": "limits.open_files",
    "rlimit_file_size": "limits.file_size",
    "processes": "isolation.cgroup",
    "memory": "limits.memory",
    "pids": "limits.pids",
    "cpu": "limits.cpus",
    "io": "limits.io.read",
    "expose": "expose",
}  # fmt: skip
"""The row that tells of a control of the receipt, where that is not ``isolation.`` and its name."""


def test_every_control_of_a_receipt_has_a_row(folder: Any) -> None:
    controls = [name for row in page("docs/calls.md").rows("control") for name in code(row[0])]
    network = "network: {allow: [{host: a.test, ports: [443], methods: [GET]}]}\n"
    mounts = "mounts: [{source: /srv, target: /x}]\nsecrets: [{name: TOKEN, as: file}]\n"
    folder.write("all", f"filesystem: {{root: overlay, size: 1MiB}}\n{mounts}{network}")
    found = rows(folder.load().get("all"))
    without = [name for name in controls if ELSEWHERE.get(name, f"isolation.{name}") not in found]
    assert controls
    assert not without
    assert ELSEWHERE.keys() <= set(controls)


def test_what_every_container_has_is_what_the_engine_gives_it() -> None:
    for policy in (SHIPPED.get("strict"), BUILD):
        shape = make_shape(policy, ImageRef("base", "sha256:0"))
        found = rows(policy)
        assert found["filesystem.shm"]["value"].startswith(format_size(bundle.shm_size(shape)) + ",")
        own = {"open_files", "file_size"}
        given = {
            RLIMIT_LINES[one.resource][4:].replace(" ", "_"): one.hard for one in oci.rlimits(shape.limits)
        }
        assert {name: value for name, value in given.items() if name not in own} == fixed.RLIMITS
    assert fixed.OOM_SCORE_ADJ == oci.OOM_SCORE_ADJ
    assert {path.removeprefix("/dev/") for path in DEVICES} == mounted.DEVICES.keys()


def test_what_rules_put_into_requests_is_said(folder: Any) -> None:
    folder.write(
        "p",
        "secrets: [{name: A, as: proxy}, {name: B, as: proxy}]\n"
        "network:\n"
        "  allow:\n"
        '    - {host: a.test, ports: [443], inject: {header: X-Key, value: "{secret:A}"}}\n'
        '    - {host: b.test, ports: [80], inject: {header: X-Key, value: "{secret:A}", plain: true}}\n'
        "    - {host: c.test, ports: [443], inject: {sigv4: {access_key: A, secret_key: B}}}\n"
        "  budget: {bytes: 1KiB, session: {bytes: 1MiB, connections: 5}}\n",
    )
    found = folder.load()
    assert found.problems == ()
    lines = {line["control"]: line["value"] for line in explain(found.get("p"))}
    assert lines["network.allow.0"] == "a.test 443, any method, any path, with the header X-Key"
    assert lines["network.allow.1"].endswith("with the header X-Key, also without TLS")
    assert lines["network.allow.2"].endswith("with a signature of AWS")
    assert lines["network.budget.session.bytes"] == str(1 << 20)
    assert lines["network.budget.session.connections"] == "5"


def test_a_container_that_is_kept_is_said_to_be(folder: Any) -> None:
    folder.write("shared", "isolation: session\n")
    found = rows(folder.load().get("shared"))
    assert found["isolation"]["value"] == "session"
    assert "keeps SETUID, SETGID and KILL" in found["isolation.init"]["value"]
    assert "earlier calls of the session" in found["isolation.cgroup"]["value"]
    assert "keeps" not in rows(SHIPPED.get("strict"))["isolation.init"]["value"]
