"""Loading: strictness, all problems at once, inheritance, and the shipped files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd import errors
from sandboxd.policy import PolicySet, advice, check_text, explain, load_policies, shipped_policies
from sandboxd.policy.schema import Io, Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    Found = Callable[[str], tuple[str, int, str]]

SHIPPED = load_policies([shipped_policies()])


def test_shipped_policies_have_no_problem() -> None:
    assert SHIPPED.problems == ()
    assert SHIPPED.names() == ["build", "default", "python", "shell", "strict"]
    for name in SHIPPED.names():
        policy = SHIPPED.get(name)
        assert policy.description
        assert policy.spec.examples.allows
        assert policy.spec.examples.denies
        assert policy.spec.network is None
        assert policy.spec.limits.io == Io()  # SECURITY.md says that it needs a disk that can be throttled
    assert SHIPPED.get("strict").spec.extends is None


def test_defaults_of_the_schema_are_those_of_the_shipped_default() -> None:
    assert SHIPPED.get("default").spec.limits == Limits()


def test_a_policy_of_two_lines_has_the_documented_defaults(folder: Any) -> None:
    folder.write("tiny")
    policy = folder.load().get("tiny")
    assert policy.spec.limits == Limits()
    assert policy.image == "base"
    assert policy.commit == "exited"
    assert policy.origin("limits.memory").line == 0


def test_all_problems_of_a_file_are_reported_at_once(folder: Any) -> None:
    folder.write(
        "p",
        "imge: base\n"
        "limits:\n"
        "  memroy: 1GiB\n"
        "  wall: 10 parsecs\n"
        "  pids: many\n"
        "  tmp: 64MiB\n"
        "  memory: 512\n"
        "process: {user: '1000', umask: 9}\n"
        "syscalls: {base: defualt}\n"
        "mounts: [{source: data, target: /data}]\n",
    )
    found = folder.load().problems
    assert [(problem.code, problem.line) for problem in found] == [
        ("unknown_key", 3),
        ("unknown_key", 5),
        ("bad_value", 6),
        ("bad_value", 7),
        ("wrong_type", 8),
        ("bad_value", 9),
        ("wrong_type", 10),
        ("bad_value", 10),
        ("bad_value", 11),
        ("bad_value", 12),
    ]
    said = "\n".join(str(problem) for problem in found)
    assert "p.yaml:3:1: unknown key 'imge'; did you mean 'image'?" in said
    assert "p.yaml:5:3: unknown key 'memroy' in limits; did you mean 'memory'?" in said
    assert "did you mean 'default'?" in said
    assert "such as 512MiB" in said


@pytest.mark.parametrize(
    ("text", "code", "line", "said"),
    [
        ("limits:\n  memory: 300MiB\n", "impossible", 4, "pages of a tmpfs count against memory"),
        ("filesystem: {root: overlay, size: 300MiB}\n", "impossible", 3, "filesystem.size 300MiB"),
        ("filesystem: {size: 1MiB}\n", "impossible", 3, "needs root: overlay"),
        ("limits:\n  memory: 1MiB\n", "bad_value", 4, "must be from 4MiB"),
        ("mounts: [{source: /a, target: /proc/x}]\n", "bad_value", 3, "the container mounts itself"),
        ("mounts: [{source: /a, target: /workspace}]\n", "bad_value", 3, "the container mounts itself"),
        ("mounts: [{source: /a, target: /}]\n", "bad_value", 3, "the root is the image's"),
        ("mounts: [{source: /a, target: /b/../c}]\n", "bad_value", 3, "not normalised; write '/c'"),
        ("mounts: [{source: /a, target: //b}]\n", "bad_value", 3, "not normalised"),
        ("mounts: [{source: /, target: /b}]\n", "bad_value", 3, "whole file system"),
        ("mounts: [{source: /sys/fs, target: /b}]\n", "bad_value", 3, "cannot be lent"),
        (
            "mounts:\n- {source: /a, target: /b}\n- {source: /c, target: /b/d}\n",
            "impossible",
            5,
            "over each other",
        ),
        ("artifacts: [{path: /etc/passwd}]\n", "bad_value", 3, "not relative"),
        ("artifacts: [{path: a/../../b}]\n", "bad_value", 3, "'..'"),
        ("artifacts: [{path: a**/b}]\n", "bad_value", 3, "component of its own"),
        ("artifacts: [{max_size: 1MiB}]\n", "missing_key", 3, "'path' is missing"),
        ("process: {env: {A-B: x}}\n", "bad_value", 3, "environment variable"),
        ("process: {env: {A: 1}}\n", "wrong_type", 3, "put it in quotes"),
        ("process: {hostname: a_b}\n", "bad_value", 3, "host name"),
        ("syscalls:\n  allow:\n    - ptrase\n", "unknown_syscall", 5, "ptrace"),
        ("syscalls:\n  deny: ['@fiel']\n", "unknown_syscall", 4, "@file"),
        ("syscalls:\n  allow: [mount]\n", "impossible", 4, "mount can never be allowed"),
        ("syscalls: {deny: [exit_group]}\n", "impossible", 3, "cannot be denied"),
        ("syscalls: {allow: ['@debug'], deny: ['@debug']}\n", "impossible", 3, "deny wins"),
        ("network: {mode: none, allow: [{host: a.b, ports: [1]}]}\n", "impossible", 3, "leaves nothing"),
        ("network: {allow: [{host: 1.2.3.4, ports: [1]}]}\n", "bad_value", 3, "write it as cidr"),
        ("network: {allow: [{cidr: 10.0.0.1/8, ports: [1]}]}\n", "bad_value", 3, "host bits"),
        ("network: {allow: [{host: a.b, cidr: 10.0.0.0/8, ports: [1]}]}\n", "bad_value", 3, "exactly one"),
        ("network: {allow: [{host: a.b, ports: [0]}]}\n", "bad_value", 3, "greater than or equal to 1"),
        ("network: {allow: [{host: a.b, ports: [80, 53]}]}\n", "impossible", 3, "container's own resolver"),
        ("network: {allow: [{host: a.b, ports: [80], paths: [x]}]}\n", "bad_value", 3, "such as /repos/**"),
        ("network: {allow: [{host: a.b, ports: [80], paths: [/a/../b]}]}\n", "bad_value", 3, "match no path"),
        ("network: {allow: [{host: a.b, ports: [80], paths: [/a%2fb]}]}\n", "bad_value", 3, "no escapes"),
        ("network: {allow: [{host: a.b, ports: [80], methods: [get]}]}\n", "bad_value", 3, "A-Z"),
        ("network: {allow: [{host: a.b, ports: [80], headers: {'a b': x}}]}\n", "bad_value", 3, "headers"),
        ("network: {allow: [{cidr: 10.0.0.0/8, ports: [1], methods: [A]}]}\n", "impossible", 3, "write host"),
        ("network: {allow: [{host: a.b, ports: [80], inject: {header: host, value: x}}]}\n", "bad_value", 3,
         "cannot be set"),
        ("network: {allow: [{host: a.b, ports: [80], inject: {header: x}}]}\n", "bad_value", 3, "or sigv4"),
        ("network:\n  allow:\n    - {host: a.b, ports: [80]}\n    - {host: a.b, ports: [8, 80]}\n",
         "impossible", 6, "the same words"),
        ("network: {allow: [{host: a.b, ports: [80, 80]}]}\n", "impossible", 3, "the same words"),
        ("network: {allow: [{host: a.b, ports: [80]}], budget: {requests: 3}}\n", "impossible", 3, "looks"),
        ("extends: nobody\n", "unknown_policy", 3, "no policy 'nobody'"),
        ("extends: p\n", "extends_cycle", 3, "p -> p"),
        ("commit: maybe\n", "bad_value", 3, "known: exited"),
        ("version: 1\nname: q\n", "bad_value", 2, "must be that of the file"),
        ("version: 2\nname: p\n", "bad_value", 1, "known: 1"),
        ("version: 1\n", "missing_key", 1, "'name' is missing"),
        ("examples:\n  allows:\n    - syscall ptrace\n", "wrong_example", 5, "is denied"),
        ("examples:\n  denies:\n    - write /workspace/x\n", "wrong_example", 5, "is allowed"),
    ],
)  # fmt: skip
def test_what_is_wrong_has_its_line(problem_of: Found, text: str, code: str, line: int, said: str) -> None:
    found = problem_of(text)
    assert found[0] == code
    assert found[1] == line
    assert said in found[2]


@pytest.mark.parametrize(
    ("text", "code", "line", "said"),
    [
        ("retry: {failed: 1, backoff: soon}\n", "bad_value", 3, "a range such as 1s..30s"),
        ("retry:\n  backoff: 30s..1s\n", "bad_value", 4, "from a shorter to a longer"),
        ("retry:\n  backoff: 1s..3h\n", "bad_value", 4, "at most 1h"),
        ("retry:\n  on: [engin]\n", "bad_value", 4, "engine"),
        ("retry:\n  memory: {raise: {memory: 512MiB}}\n", "impossible", 4, "raises nothing"),
        ("retry:\n  memory:\n    raise: {cpu_time: 9s}\n", "impossible", 5, "there is no such limit"),
        ("retry:\n  exec_failed: {times: 1}\n", "unknown_key", 4, "exec_failed"),
        ("retry:\n  exited: {times: 1}\n", "missing_key", 4, "'codes' is missing"),
        ("retry:\n  exited: {codes: []}\n", "bad_value", 4, "at least 1"),
        ("retry:\n  exited:\n    codes: [75, 0]\n", "bad_value", 5, "0 is a success"),
        ("retry:\n  exited:\n    codes: [256]\n", "bad_value", 5, "statuses from 1 to 255"),
        ("retry:\n  exited:\n    codes: [-1]\n", "bad_value", 5, "statuses from 1 to 255"),
        ("retry:\n  exited:\n    codes: [true]\n", "wrong_type", 5, "whole number"),
        ("retry:\n  exited:\n    codes: 75\n", "wrong_type", 5, "a list"),
        ("retry:\n  exited:\n    codes: [75,\n      3, 75]\n", "impossible", 6, "75 is listed before"),
        ("retry:\n  exited: {codes: [75], signals: [SIGHUP]}\n", "unknown_key", 4, "signals"),
        ("retry:\n  signalled: {signals: []}\n", "bad_value", 4, "at least 1"),
        ("retry:\n  signalled:\n    signals: [SEGV]\n", "bad_value", 5, "did you mean 'SIGSEGV'"),
        ("retry:\n  signalled:\n    signals: [11]\n", "bad_value", 5, "known: SIGHUP"),
        ("retry:\n  signalled:\n    signals: [SIGCHLD]\n", "bad_value", 5, "not allowed here"),
        ("retry:\n  signalled: {signals: [SIGBUS, SIGBUS]}\n", "impossible", 4, "SIGBUS is listed before"),
        ("retry:\n  output: {times: 1}\n", "impossible", 4, "on_limit: kill"),
        (
            "limits: {stdout: {size: 1MiB, on_limit: kill}}\nretry:\n  output:\n    raise: {stdout: 1MiB}\n",
            "impossible", 6, "the limit is 1MiB already",
        ),
        ("retry:\n  exited: {codes: [1], raise: {stderr: 1KiB}}\n", "impossible", 4, "raises nothing"),
        (
            "network:\n  allow: [{host: a.example, ports: [443]}]\nretry:\n  exited: {codes: [75]}\n",
            "impossible", 6, "safe: true",
        ),
        (
            "network:\n  allow: [{host: a.example, ports: [443]}]\nretry:\n  memory: {times: 1}\n",
            "impossible", 6, "safe: true",
        ),
    ],
)  # fmt: skip
def test_a_retry_that_makes_no_sense_is_refused_at_its_line(
    problem_of: Found, text: str, code: str, line: int, said: str
) -> None:
    found = problem_of(text)
    assert found[:2] == (code, line)
    assert said in found[2]


def test_retries_are_inherited_key_by_key(folder: Any) -> None:
    folder.write("base", "retry: {failed: 3, memory: {times: 1, raise: {memory: 1GiB}}}\n")
    folder.write("p", "extends: base\nretry: {backoff: 2s..4s, memory: !remove }\n")
    folder.write("q", "extends: r\nretry: {exited: {codes: [!remove 69, 70]}}\n")
    folder.write("r", "retry: {exited: {times: 2, codes: [69, 75]}, signalled: {signals: [SIGBUS]}}\n")
    exited = folder.load().get("q").spec.retry.exited
    assert (exited.times, exited.codes) == (2, (75, 70))
    retry = folder.load().get("p").spec.retry
    assert (retry.failed, retry.backoff, retry.memory) == (3, "2s..4s", None)
    assert [retry.pause(before) for before in range(3)] == [2_000_000, 4_000_000, 4_000_000]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("network: {mode: host}\n", 3),
        ("mounts:\n  - source: /srv\n    target: /srv\n    mode: read-write\n", 6),
        ("limits: {stdout: {size: 1MiB, on_limit: kill}, stderr: {size: 1MiB, on_limit: truncate}}\n", 3),
    ],
)
def test_what_a_later_release_enforces_is_refused_at_its_line(
    problem_of: Found, text: str, line: int
) -> None:
    assert problem_of(text)[:2] == ("control_not_supported", line)


@pytest.mark.parametrize(
    "text",
    [
        "network: {}\n",
        "network: {mode: none}\n",
        "retry: none\n",
        "commit: success\n",
        "process: {user_namespace: engine}\n",  # it is for the engine to say whether it can
        "process: {user_namespace: none}\n",
    ],
)
def test_what_asks_for_nothing_more_is_accepted(folder: Any, text: str) -> None:
    folder.write("p", text)
    assert folder.codes() == []


@pytest.mark.timeout(60)
def test_as_many_rules_as_there_may_be_are_compared(folder: Any) -> None:
    """Every one that allows with every one that denies: a million pairs, which once took minutes."""
    rules = {
        kind: "".join(f"    - {{cidr: {net}.{n // 256}.{n % 256}.0/24, ports: [80]}}\n" for n in range(1000))
        for kind, net in (("allow", 50), ("deny", 60))
    }
    folder.write("p", f"network:\n  allow:\n{rules['allow']}  deny:\n{rules['deny']}")
    assert folder.load().problems == ()


def test_a_secret_that_is_injected_has_to_be_listed(folder: Any) -> None:
    rule = "{host: a.b, ports: [443], inject: {header: Authorization, value: 'Bearer {secret:TOKEN}'}}"
    folder.write("p", f"network:\n  allow:\n    - {rule}\n")
    assert ("impossible", 5) in folder.codes()
    folder.write("p", f"network:\n  allow:\n    - {rule}\nsecrets: [{{name: TOKEN, as: proxy}}]\n")
    assert folder.codes() == []


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("secrets: [{name: PATH, as: env}]\n", 3, "PATH is a variable already"),
        ("secrets: [{name: T, as: file, placeholder: x}]\n", 3, "granted as: proxy"),
        (
            "process: {env: {T: x}}\nsecrets: [{name: T, as: proxy, placeholder: x}]\n",
            4,
            "a variable already",
        ),
        ("process: {env: {T: x}}\nsecrets:\n  - {name: T, as: env}\n", 5, "T is a variable already"),
        ("secrets: [{name: T, as: file}]\nmounts: [{source: /srv, target: /run}]\n", 4, "/run/secrets"),
        (
            "secrets: [{name: T, as: file}]\nmounts: [{source: /srv, target: /run/secrets/T}]\n",
            4,
            "lie over each other",
        ),
        ("secrets: [{name: T, as: file}, {name: T, as: env}]\n", 3, "T is listed before"),
    ],
)
def test_secrets_that_something_is_in_the_way_of(problem_of: Found, text: str, line: int, said: str) -> None:
    code, at, message = problem_of(text)
    assert (code, at) == ("impossible", line)
    assert said in message


def test_secrets_as_files_and_as_variables(folder: Any) -> None:
    folder.write(
        "p",
        "mounts: [{source: /srv, target: /srv}]\nsecrets: [{name: A, as: file}, {name: B, as: env}]\n"
        "examples: {allows: [read /run/secrets/A], denies: [write /run/secrets/A]}\n",
    )
    loaded = folder.load()
    assert loaded.problems == ()
    rows = {row["control"]: row for row in explain(loaded.get("p"))}
    assert rows["secrets.0"]["value"] == "the file /run/secrets/A"
    assert rows["secrets.1"]["value"] == "the variable B"
    assert "discouraged" in rows["secrets.1"]["note"]
    (note,) = advice((folder.path / "p.yaml").read_text(), "p.yaml")
    assert (note.line, note.code) == (4, "discouraged")


def test_a_chain_of_parents_and_where_each_value_came_from(folder: Any) -> None:
    folder.write(
        "a",
        "limits:\n  memory: 1GiB\n  wall: 9s\nsyscalls: {allow: [ptrace]}\nprocess: {env: {A: a, B: a}}\n",
    )
    folder.write(
        "b", "extends: a\nlimits: {wall: 8s}\nprocess: {env: {B: b}}\nmounts: [{source: /x, target: /x}]\n"
    )
    folder.write(
        "c",
        "extends: b\nsyscalls:\n  allow: [!remove ptrace]\nmounts: [!remove /x, {source: /y, target: /x}]\n",
    )
    loaded = folder.load()
    assert loaded.problems == ()
    policy = loaded.get("c")
    assert (policy.spec.limits.memory, policy.spec.limits.wall) == (2**30, 8_000_000)
    assert policy.spec.syscalls.allow == ()
    assert [mount.source for mount in policy.spec.mounts] == ["/y"]
    assert dict(policy.spec.process.env) == {"A": "a", "B": "b"}
    origins = {
        path: policy.origin(path) for path in ("limits.memory", "limits.wall", "process.env.B", "mounts.0")
    }
    assert [(Path(at.file).name, at.line) for at in origins.values()] == [
        ("a.yaml", 4), ("b.yaml", 4), ("b.yaml", 5), ("c.yaml", 6),
    ]  # fmt: skip


def test_a_wrong_parent_is_a_problem_of_each_that_extends_it(folder: Any) -> None:
    folder.write("a", "limits: {wall: 1}\n")
    folder.write("b", "extends: a\n")
    folder.write("c", "extends: b\n")
    folder.write("d")
    loaded = folder.load()
    assert loaded.names() == ["d"]
    assert [(Path(problem.file).stem, problem.code) for problem in loaded.problems] == [
        ("a", "bad_value"), ("b", "bad_parent"), ("c", "bad_parent"),
    ]  # fmt: skip


def test_circles_are_named_and_end(folder: Any) -> None:
    folder.write("a", "extends: c\n")
    folder.write("b", "extends: a\n")
    folder.write("c", "extends: b\n")
    folder.write("d", "extends: a\n")
    found = {Path(problem.file).stem: problem for problem in folder.load().problems}
    assert [found[name].code for name in "abcd"] == ["extends_cycle"] * 3 + ["bad_parent"]
    assert "a -> c -> b -> a" in found["a"].message


def test_too_many_ancestors(folder: Any) -> None:
    folder.write("p0")
    for number in range(1, 20):
        folder.write(f"p{number}", f"extends: p{number - 1}\n")
    loaded = folder.load()
    assert len(loaded.names()) == 17
    assert {problem.code for problem in loaded.problems} == {"too_large"}


def test_a_problem_of_an_inherited_value_is_reported_where_it_is_inherited(folder: Any) -> None:
    folder.write("a", "limits: {workspace: {size: 400MiB}}\n")
    folder.write("b", "extends: a\nlimits: {tmp: {size: 200MiB}}\n")
    (problem,) = folder.load().problems
    assert (Path(problem.file).stem, problem.code, problem.line) == ("b", "impossible", 4)


def test_a_later_directory_wins_also_when_it_is_wrong(folder: Any, tmp_path: Path) -> None:
    later = tmp_path / "later"
    later.mkdir()
    folder.write("p", "image: one\n")
    (later / "p.yaml").write_text("version: 1\nname: p\nimage: two\n")
    dirs = [folder.path, tmp_path / "absent", later]
    assert load_policies(dirs).get("p").image == "two"
    (later / "p.yaml").write_text("version: 1\nname: p\nimage: [two]\n")
    loaded = load_policies(dirs)
    assert loaded.names() == []
    with pytest.raises(errors.PolicyInvalid, match=r"not in force.*p\.yaml:3:8"):
        loaded.get("p")
    assert [problem.code for problem in loaded.problems_of("p")] == ["wrong_type"]


def test_names_of_system_calls_are_checked_beside_other_errors(tmp_path: Path) -> None:
    text = "version: 1\nname: p\nlimits: {wal: 1s}\nsyscalls: {allow: [opneat], deny: [bpff]}\n"
    (tmp_path / "p.yaml").write_text(text)
    found = [(problem.line, problem.code) for problem in load_policies([tmp_path]).problems]
    assert found == [(3, "unknown_key"), (4, "unknown_syscall"), (4, "unknown_syscall")]


def test_a_policy_that_only_asks_for_what_is_not_enforced_says_so(tmp_path: Path) -> None:
    file = tmp_path / "net.yaml"
    text = "version: 1\nname: net\nnetwork: {mode: host}\n"
    file.write_text(text)
    with pytest.raises(errors.ControlNotSupported, match=f"{file}:3:.*network") as caught:
        load_policies([tmp_path]).get("net")
    assert caught.value.details["problems"][0]["line"] == 3
    file.write_text(text + "limits: {wall: 5}\n")
    with pytest.raises(errors.PolicyInvalid, match="not in force"):
        load_policies([tmp_path]).get("net")


@pytest.mark.parametrize("kind", ["env", "file"])
def test_a_secret_that_others_in_the_container_would_have_is_refused(problem_of: Found, kind: str) -> None:
    text = f"isolation: session\nsecrets:\n  - {{name: A, as: {kind}}}\n"
    code, line, message = problem_of(text)[:3]
    assert (code, line) == ("impossible", 5)
    assert "use `as: proxy`" in message


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(errors.NotFound, match="did you mean 'python'"):
        SHIPPED.get("pyhton")


def test_other_files_of_the_directory_are_not_policies(folder: Any) -> None:
    folder.write("p")
    (folder.path / ".#p.yaml").symlink_to("user@host.1234")
    (folder.path / "p.yaml~").write_text("old")
    (folder.path / "README.md").write_text("no")
    assert folder.load().names() == ["p"]
    assert folder.codes() == []


def test_a_file_with_the_other_ending_is_not_passed_over_in_silence(folder: Any) -> None:
    (folder.path / "p.yml").write_text("version: 1\nname: p\n")
    (problem,) = folder.load().problems
    assert problem.message == "rename this file to end in .yaml"


def test_what_a_hostile_text_says_is_harmless_on_a_terminal(problem_of: Found) -> None:
    _, _, message = problem_of('"\\e[2J\\n": 1\n')
    assert message.isprintable()
    _, _, message = problem_of(f"image: '{'x y' * 10_000}'\n")
    assert len(message) < 1000
    assert problem_of('process: {env: {A: "\\ud800"}}\n')[0] == "syntax"


def test_digest_is_of_what_is_in_force(folder: Any, tmp_path: Path) -> None:
    folder.write("p", "limits: {memory: 1GiB}\n")
    first = folder.load().get("p").digest
    folder.write(
        "p",
        "# comment\ndescription: any\nlimits:\n  memory: 1024MiB\nexamples: {denies: [syscall bpf]}\n",
    )
    assert folder.load().get("p").digest == first
    folder.write("p", "limits: {memory: 1025MiB}\n")
    assert folder.load().get("p").digest != first


def test_check_text_knows_the_policies_around_it() -> None:
    head = "version: 1\nname: mine\nextends: python\n"
    assert check_text(head, "mine.yaml", SHIPPED) == []
    assert check_text(head, "-", SHIPPED) == []
    (problem,) = check_text(head.replace("python", "pyton"), "-", SHIPPED)
    assert "did you mean 'python'" in problem.message
    (problem,) = check_text(head, "other.yaml", SHIPPED)
    assert (problem.file, problem.line) == ("other.yaml", 2)
    (problem,) = check_text("version: 1\nname: default\nextends: python\n", "default.yaml", SHIPPED)
    assert problem.code == "extends_cycle"
    assert check_text("version: 1\nlimits: {wall: 1h}\n", "floor.yaml", SHIPPED) == []
    assert check_text("version: 1\nlimits: {wal: 1h}\n", "floor.yaml", SHIPPED)[0].code == "unknown_key"


WORDS = st.sampled_from([
    "version", "name", "extends", "limits", "wall", "memory", "60s", "512MiB", "1", "x", "default", "python",
    "mounts",
    "source", "target", "network", "allow", "host", "syscalls", "examples", "!remove", "[", "]", "{", "}",
    ",", ":", "-", "'", '"', "#", "|", "\n", "\u00e9",
])  # fmt: skip


@given(st.lists(WORDS, max_size=40).map(" ".join))
def test_any_text_gives_a_policy_or_problems(text: str) -> None:
    for problem in check_text(text, "x.yaml", SHIPPED):
        assert problem.file == "x.yaml"
        assert problem.line >= 1


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.sampled_from(["512MiB", "1s", "none", "/a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
SECTIONS = sorted(SHIPPED.get("default").spec.resolved())


@given(st.dictionaries(st.sampled_from([*SECTIONS, "extends", "examples"]), JSON, max_size=4))
def test_any_value_anywhere_gives_a_policy_or_problems(document: dict[str, Any]) -> None:
    import json  # noqa: PLC0415, JSON is YAML, so any value has a text

    text = json.dumps({"version": 1, "name": "x", **document})
    for problem in check_text(text, "x.yaml", PolicySet()):
        assert problem.line == 1


def test_sharing_a_container_is_noted(folder: Any) -> None:
    folder.write("p", "isolation: session\n")
    (note,) = advice((folder.path / "p.yaml").read_text(), "p.yaml")
    assert (note.code, note.line) == ("discouraged", 3)
    assert "share a container" in note.message
    folder.write("q", "isolation: call\n")
    assert advice((folder.path / "q.yaml").read_text(), "q.yaml") == []
