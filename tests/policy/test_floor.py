"""floor.yaml: what no policy may exceed."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from sandboxd.httprule import HttpRequest
from sandboxd.policy import check_text, load_policies, seccomp, shipped_policies
from sandboxd.policy.floor import FORMATS
from sandboxd.policy.rules import network_rules
from sandboxd.reach import Reach


@pytest.mark.parametrize(
    ("floor", "policy", "said"),
    [
        ("limits: {memory: 400MiB}\n", "", "limits.memory: 512MiB is wider than the floor's 400MiB"),
        ("limits: {wall: 10s}\n", "limits: {wall: 11s}\n", "limits.wall: 11s is wider than the floor's 10s"),
        ("limits: {cpu_time: 10s}\n", "", "limits.cpu_time: no limit is wider than the floor's 10s"),
        ("limits: {cpus: 0.5}\n", "", "limits.cpus: 1 is wider than the floor's 0.5"),
        ("limits: {pids: 8}\n", "", "limits.pids: 64 is wider than the floor's 8"),
        ("limits: {stdout: 1KiB}\n", "", "limits.stdout.size: 1MiB is wider than the floor's 1KiB"),
        (
            "limits: {workspace: {inodes: 9}}\n",
            "",
            "limits.workspace.inodes: 20k is wider than the floor's 9",
        ),
        ("limits: {io: {read: 1MiB}}\n", "", "limits.io.read: no limit is wider than the floor's 1MiB"),
        ("filesystem: {root: read-only}\n", "filesystem: {root: overlay, size: 1MiB}\n", "filesystem.root"),
        ("artifacts: {secrets: deny}\n", "artifacts: [{path: a}]\n", "artifacts.0.secrets: allow is wider"),
        ("mounts: [/srv]\n", "mounts: [{source: /srvx, target: /a}]\n", "mounts.0: /srvx is wider"),
        ("mounts: []\n", "mounts: [{source: /srv, target: /a}]\n", "wider than the floor's none"),
        (
            "secrets: {names: [A, B]}\n",
            "secrets: [{name: C, as: proxy}]\n",
            "secrets.0: secret C is wider than the floor's A, B",
        ),
        (
            "secrets: {names: []}\n",
            "secrets: [{name: C, as: file}]\n",
            "secret C is wider than the floor's none",
        ),
        (
            "secrets: {as: [proxy]}\n",
            "secrets: [{name: C, as: env}]\n",
            "secrets.0.as: secret C as env is wider than the floor's proxy",
        ),
        ("commit: exited\n", "commit: always\n", "commit: always is wider than the floor's exited"),
        ("commit: never\n", "", "commit: exited is wider than the floor's never"),
        (
            "isolation: call\n",
            "isolation: session\n",
            "isolation: session is wider than the floor's call",
        ),
    ],
)
def test_a_wider_policy_is_refused_with_both_values(folder: Any, floor: str, policy: str, said: str) -> None:
    where = folder.write("floor", floor)
    folder.write("p", policy)
    (problem,) = folder.load().problems
    assert problem.code == "wider_than_floor"
    assert said in problem.message
    assert f"({where}:2)" in problem.message
    assert problem.line == (3 if policy else 1)
    assert folder.load().names() == []


@pytest.mark.parametrize("floor", ["none", "tls", "plain"])
@pytest.mark.parametrize(
    ("rule", "has"),
    [
        ("", "none"),
        ("inject: {header: q, value: v}", "tls"),
        ('inject: {header: q, value: "{secret:S}"}', "tls"),
        ("inject: {header: q, value: v, plain: true}", "plain"),
        ("inject: {sigv4: {access_key: S, secret_key: S}}", "tls"),
        ("inject: {sigv4: {access_key: S, secret_key: S}, plain: true}", "plain"),
    ],
)
def test_what_rules_put_into_requests_lies_within_the_floor(
    folder: Any, floor: str, rule: str, has: str
) -> None:
    target = "host: a.test, ports: [443]"
    folder.write("floor", f"network: {{allow: [{{{target}}}]}}\ninject: {floor}\n")
    text = f"network: {{allow: [{{{target}{', ' * bool(rule)}{rule}}}]}}\n"
    folder.write("p", text + "secrets: [{name: S, as: proxy}]\n" * ("S" in rule))
    order = ["none", "tls", "plain"]
    problems = folder.load().problems
    assert [one.code for one in problems] == ["wider_than_floor"] * (order.index(has) > order.index(floor))
    assert all(f"{has} is wider than the floor's {floor}" in one.message for one in problems)


def test_what_is_within_is_in_force(folder: Any) -> None:
    folder.write("floor", "secrets: {names: [A, B], as: [proxy, file]}\n")
    folder.write("p", "secrets: [{name: A, as: proxy}, {name: B, as: file}]\n")
    assert folder.codes() == []


def test_a_kept_container_may_be_forbidden_and_a_child_may_do_without(folder: Any) -> None:
    folder.write("floor", "isolation: call\n")
    folder.write("p", "isolation: session\n")
    folder.write("q", "extends: p\nisolation: call\n")
    folder.write("r", "extends: p\n")
    assert folder.load().names() == ["q"]
    folder.write("floor", "isolation: session\n")
    assert folder.load().names() == ["p", "q", "r"]


@pytest.mark.parametrize(
    "text",
    [
        "secrets: {names: [lower]}\n",
        "secrets: {as: [stdin]}\n",
        "inject: https\n",
        "secrets: [A]\n",
        "isolation: none\n",
    ],
)
def test_a_floor_that_makes_no_sense_is_an_error(folder: Any, text: str) -> None:
    folder.write("floor", text)
    folder.write("p")
    assert folder.load().floor_failed
    assert folder.load().problems[0].line == 2


@pytest.mark.parametrize(
    ("rule", "wider"),
    [
        ("methods: [GET], paths: [/a/**], headers: {x: y}", False),
        ("methods: [GET], paths: [/a/**], headers: {x: y, z: w}, inject: {header: q, value: v}", False),
        ("methods: [GET, PUT], paths: [/a/**], headers: {x: y}", True),
        ("paths: [/a/**], headers: {x: y}", True),
        ("methods: [GET], paths: [/**], headers: {x: y}", True),
        ("methods: [GET], headers: {x: y}", True),
        ("methods: [GET], paths: [/a/**], headers: {x: z}", True),
        ("methods: [GET], paths: [/a/**]", True),
        ("methods: [GET], paths: [/a/**], headers: {x: y}, websocket: true", True),
        ("", True),
    ],
)
def test_rules_of_http_lie_within_those_of_the_floor(folder: Any, rule: str, wider: bool) -> None:  # noqa: FBT001
    target = "host: a.test, ports: [443]"
    floor = "methods: [GET, HEAD], paths: [/a/**, /b], headers: {x: y}"
    folder.write("floor", f"network: {{allow: [{{{target}, {floor}}}]}}\n")
    folder.write("p", f"network: {{allow: [{{{target}{', ' * bool(rule)}{rule}}}]}}\n")
    assert [code for code, _ in folder.codes()] == ["wider_than_floor"] * wider


@pytest.mark.parametrize(
    ("within", "wider"), [("[10.1.0.0/16]", False), ("[10.0.0.0/8]", False), ("[10.0.0.0/8, fd00::/8]", True)]
)
def test_where_a_name_may_lead_lies_within_the_floor(folder: Any, within: str, wider: bool) -> None:  # noqa: FBT001
    folder.write("floor", "network: {allow: [{host: a.test, ports: [443], within: [10.0.0.0/8]}]}\n")
    folder.write("p", f"network: {{allow: [{{host: a.test, ports: [443], within: {within}}}]}}\n")
    assert [code for code, _ in folder.codes()] == ["wider_than_floor"] * wider


def test_a_network_needs_one_in_the_floor(folder: Any) -> None:
    folder.write("floor")
    folder.write("p", "network: {allow: [{host: a.b, ports: [443]}]}\n")
    assert folder.codes() == [("wider_than_floor", 3)]


FLOOR = """\
network:
  allow: [{host: '*.a.test', ports: [80, 443]}, {host: b.test, ports: [443]}, {cidr: 10.0.0.0/8, ports: [1]}]
  budget: {connections: 10}
"""


@pytest.mark.parametrize(
    ("rules", "wider"),
    [
        ("{allow: [{host: '*.a.test', ports: [443]}], budget: {connections: 10}}", []),
        ("{allow: [{host: x.a.test, ports: [80]}], budget: {connections: 1}}", []),
        ("{allow: [{host: '*.y.a.test', ports: [80]}], budget: {connections: 10}}", []),
        ("{allow: [{cidr: 10.1.0.0/16, ports: [1]}], budget: {connections: 10}}", []),
        ("{allow: [{host: a.test, ports: [443]}], budget: {connections: 10}}", ["network.allow.0"]),
        ("{allow: [{host: b.test, ports: [443, 80]}], budget: {connections: 10}}", ["network.allow.0"]),
        ("{allow: [{host: '*.test', ports: [443]}], budget: {connections: 10}}", ["network.allow.0"]),
        ("{allow: [{cidr: 0.0.0.0/0, ports: [1]}], budget: {connections: 10}}", ["network.allow.0"]),
        ("{allow: [{host: b.test, ports: [443]}]}", ["network.budget.connections"]),
        (
            "{allow: [{host: b.test, ports: [443]}], budget: {session: {connections: 5}}}",
            ["network.budget.connections"],
        ),
        (
            "{allow: [{host: b.test, ports: [443]}], budget: {connections: 11}}",
            ["network.budget.connections"],
        ),
    ],
)
def test_rules_are_within_those_of_the_floor(folder: Any, rules: str, wider: list[str]) -> None:
    folder.write("floor", FLOOR)
    folder.write("p", f"network: {rules}\n")
    problems = folder.load().problems
    assert [problem.code for problem in problems] == ["wider_than_floor"] * len(wider)
    assert [problem.message.partition(":")[0] for problem in problems] == wider


def test_equal_values_and_what_the_floor_does_not_say_are_allowed(folder: Any) -> None:
    folder.write("floor", "limits: {memory: 512MiB, stdout: {on_limit: kill}}\nmounts: [/srv]\n")
    folder.write("p", "limits: {wall: 9h}\nmounts: [{source: /srv/x, target: /x}]\n")
    folder.write("q", "network: {mode: none}\nlimits: {stdout: 1GiB}\n")
    assert folder.codes() == []


def test_hosts_that_the_floor_denies_are_denied_everywhere(folder: Any) -> None:
    rules = "allow: [{host: '*.test', ports: [443]}, {cidr: 10.0.0.0/8, ports: [1]}]"
    denied = "[{host: '*.bad.test'}, {cidr: 10.1.0.0/16}, {host: a.test, paths: [/no/**]}]"
    where = folder.write("floor", f"network: {{{rules}, deny: {denied}}}\n")
    folder.write("p", "network: {allow: [{host: '*.test', ports: [443]}]}\n")
    folder.write("q", f"network: {{{rules}, deny: [{{host: '*.bad.test'}}]}}\n")
    folder.write("r", "extends: q\nnetwork: {deny: [{host: '*.worse.test'}]}\n")
    folder.write("none", "network: {mode: none}\n")
    folder.write("without")
    loaded = folder.load()
    assert loaded.problems == ()
    for name in ("p", "q", "r"):
        found = network_rules(loaded.get(name))
        assert found is not None
        reach = Reach(found)
        decision = reach.at("x.bad.test", 443)
        assert not decision.allowed
        assert decision.where is not None
        assert decision.where.startswith(str(where)) == (name == "p")
        assert reach.at("x.test", 443).allowed
        assert not reach.address(ip_address("10.1.2.3"), 1).allowed
        assert not reach.request("a.test", 443, HttpRequest("GET", b"/no/x", ())).allowed
        assert reach.request("a.test", 443, HttpRequest("GET", b"/yes", ())).allowed
    for name in ("none", "without"):
        assert network_rules(loaded.get(name)) is None
    # a rule that it denies whole is an error of the policy
    folder.write("s", "network: {allow: [{host: x.bad.test, ports: [443]}]}\n")
    assert [code for code, _ in folder.codes()] == ["impossible"]


def test_what_the_floor_denies_is_denied_everywhere(folder: Any) -> None:
    where = folder.write("floor", "syscalls: {deny: [socket]}\n")
    folder.write("p")
    folder.write("q", "extends: p\nsyscalls: {deny: [symlink]}\n")
    loaded = folder.load()
    assert loaded.problems == ()
    for name in ("p", "q"):
        policy = loaded.get(name)
        assert "socket" in policy.spec.syscalls.deny
        assert seccomp.compile_filter(policy.syscalls).judge("socket") == "denied"
    assert loaded.get("q").spec.syscalls.deny == ("symlink", "socket")
    assert loaded.get("q").origin("syscalls.deny.1").file == str(where)
    folder.write("r", "syscalls: {allow: [socket]}\n")
    assert folder.codes() == [("impossible", 3)]


def test_a_child_cannot_get_around_the_floor_by_removing(folder: Any) -> None:
    folder.write("floor", "syscalls: {deny: [socket]}\n")
    folder.write("p", "syscalls: {deny: [socket]}\n")
    folder.write("q", "extends: p\nsyscalls: {deny: [!remove socket]}\n")
    assert "socket" in folder.load().get("q").spec.syscalls.deny
    folder.write("p")
    assert folder.codes() == [("bad_remove", 4)]


def test_a_child_within_the_floor_may_extend_a_parent_that_is_not(folder: Any) -> None:
    where = folder.write("floor", "limits: {wall: 30s}\nsyscalls: {deny: [clone]}\n")
    folder.write("wide", "limits: {wall: 60s}\nexamples: {allows: [syscall clone]}\n")
    folder.write("narrow", "extends: wide\nlimits: {wall: 10s}\n")
    folder.write("same", "extends: wide\n")
    folder.write("below", "extends: same\nlimits: {wall: 5s}\n")
    loaded = folder.load()
    assert loaded.names() == ["below", "narrow"]
    assert {Path(problem.file).stem for problem in loaded.problems} == {"wide", "same"}
    assert "clone" in loaded.get("below").spec.syscalls.deny
    text = "version: 1\nname: mine\nextends: wide\nlimits: {wall: 10s}\n"
    assert check_text(text, "mine.yaml", loaded) == []
    (problem,) = check_text(text.replace("10s", "31s"), "mine.yaml", loaded)
    assert problem.code == "wider_than_floor"
    assert f"({where}:2)" in problem.message
    (problem,) = check_text("version: 1\nname: wide\nextends: narrow\n", "wide.yaml", loaded)
    assert problem.code == "extends_cycle"


def test_a_broken_parent_is_named_with_its_reason(folder: Any) -> None:
    folder.write("floor", "limits: {wall: 1h}\n")
    where = folder.write("broken", "limits: {wal: 1s}\n")
    folder.write("child", "extends: broken\nlimits: {wall: 10s}\n")
    folder.write("grandchild", "extends: child\n")
    loaded = folder.load()
    reason = f"{where}:3:10: unknown key 'wal' in limits"
    found = {Path(problem.file).stem: problem for problem in loaded.problems}
    for name, parent in {"child": "broken", "grandchild": "child"}.items():
        assert found[name].code == "bad_parent"
        said = f"{parent!r} cannot be extended: {reason}; did you mean 'wall'?"
        assert found[name].message == said
        (problem,) = check_text(f"version: 1\nname: x\nextends: {name}\n", "x.yaml", loaded)
        assert reason in problem.message
    folder.write("floor", "limits: {wal: 1h}\n")
    (problem,) = check_text("version: 1\nname: x\nextends: child\n", "x.yaml", folder.load())
    assert (problem.code, "floor.yaml:2:10: unknown key" in problem.message) == ("bad_parent", True)


@pytest.mark.parametrize(
    ("floor", "code"),
    [
        ("limits: {memroy: 1GiB}\n", "unknown_key"),
        ("name: floor\n", "unknown_key"),
        ("syscalls: {deny: [no_such_call]}\n", "unknown_syscall"),
        ("syscalls: {deny: [exit_group]}\n", "impossible"),
        ("a: [\n", "syntax"),
    ],
)
def test_with_a_wrong_floor_there_is_no_policy(folder: Any, floor: str, code: str) -> None:
    folder.write("floor", floor)
    folder.write("p")
    loaded = folder.load()
    assert loaded.names() == []
    assert loaded.floor_failed
    assert [problem.code for problem in loaded.problems] == [code]


def test_a_floor_that_is_named_must_be_there(folder: Any, tmp_path: Path) -> None:
    folder.write("p")
    loaded = load_policies([folder.path], tmp_path / "elsewhere" / "floor.yaml")
    assert (loaded.names(), loaded.floor_failed) == ([], True)


def test_several_floors_hold_together(folder: Any, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    other = tmp_path / "more" / "site.yaml"
    other.write_text("version: 1\nlimits: {wall: 30s}\n")
    folder.write("floor", "limits: {pids: 32}\n")
    found = load_policies([shipped_policies(), folder.path], other)
    assert found.names() == ["strict"]
    said = "\n".join(problem.message for problem in found.problems)
    assert "limits.pids: 64" in said
    assert "limits.wall: 1m" in said


def test_the_formats_know_every_number_of_the_limits() -> None:
    limits = load_policies([shipped_policies()]).get("strict").spec.limits.model_dump()
    flat = {f"{key}.{inner}" if isinstance(value, dict) else key for key, value in limits.items()
            for inner in (value if isinstance(value, dict) else [""])}  # fmt: skip
    assert flat - {"stdout.on_limit", "stderr.on_limit"} == set(FORMATS)


def test_a_floor_bounds_the_ports_that_are_exposed(folder: Any) -> None:
    folder.write("floor", "expose: [8080, 9000]\n")
    folder.write("p", "expose: [8080]\n")
    folder.write("q", "expose: [8080, 80]\n")
    folder.write("none")
    loaded = folder.load()
    assert loaded.names() == ["none", "p"]
    (problem,) = loaded.problems
    assert (problem.code, problem.line) == ("wider_than_floor", 3)
    assert "port 80 is wider than the floor's 8080, 9000" in problem.message
    folder.write("floor", "expose: []\n")
    assert folder.load().names() == ["none"]


def test_a_floor_bounds_what_a_retry_raises(folder: Any) -> None:
    folder.write("floor", "limits: {memory: 1GiB, wall: 2m}\n")
    folder.write("p", "retry: {memory: {raise: {memory: 1GiB}}, wall_time: {raise: {wall: 2m}}}\n")
    folder.write("q", "retry:\n  memory: {raise: {memory: 2GiB}}\n")
    loaded = folder.load()
    assert loaded.names() == ["p"]
    (problem,) = loaded.problems
    assert (problem.code, problem.line) == ("wider_than_floor", 4)
    assert "2GiB is wider than the floor's 1GiB" in problem.message


def test_a_floor_bounds_what_a_retry_raises_for_output(folder: Any) -> None:
    folder.write("floor", "limits: {stdout: 8MiB}\n")
    kills = "limits: {stdout: {size: 1MiB, on_limit: kill}}\n"
    folder.write("p", kills + "retry: {output: {raise: {stdout: 8MiB, stderr: 1GiB}}}\n")
    folder.write("q", kills + "retry:\n  output: {times: 2}\n  exited: {codes: [1], raise: {stdout: 9MiB}}\n")
    loaded = folder.load()
    assert loaded.names() == ["p"]
    (problem,) = loaded.problems
    assert (problem.code, problem.line) == ("wider_than_floor", 6)
    assert problem.message.startswith("retry.exited.raise.stdout: 9MiB is wider than the floor's 8MiB")


@pytest.mark.parametrize(
    ("budget", "wider"),
    [
        ("", ["network.budget.session.bytes"]),
        (", budget: {bytes: 1KiB}", ["network.budget.session.bytes"]),
        (", budget: {session: {bytes: 1MiB}}", []),
        (", budget: {session: {bytes: 2MiB}}", ["network.budget.session.bytes"]),
        (", budget: {session: {bytes_in: 1KiB}}", ["network.budget.session.bytes"]),
    ],
)
def test_a_floor_bounds_what_sessions_may_use(folder: Any, budget: str, wider: list[str]) -> None:
    rules = "allow: [{host: a.test, ports: [443]}]"
    folder.write("floor", f"network: {{{rules}, budget: {{session: {{bytes: 1MiB}}}}}}\n")
    folder.write("p", f"network: {{{rules}{budget}}}\n")
    assert [one.message.partition(":")[0] for one in folder.load().problems] == wider
