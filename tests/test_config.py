"""The configuration: defaults, the design's example, and every error at its line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandboxd.config import Config, default_socket, load_config
from sandboxd.errors import ConfigInvalid

EXAMPLE = """\
engine: auto
state: /var/lib/sandboxd
socket: {path: /run/sandboxd/sandboxd.sock, mode: "0660", group: sandboxd}
policies: [/etc/sandboxd/policies]
budget: {memory: 75%, slots: 64}
pool: {min: 2, max: 16}
callers:
  - {match: {uid: 0}, role: operator, policies: ["*"]}
  - {match: {group: sandboxd}, role: agent, policies: [default, python, shell], concurrent: 8, weight: 1}
"""


def load(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "sandboxd.yaml"
    file.write_text(text)
    return load_config(file)


def problems(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigInvalid) as caught:
        load(tmp_path, text)
    lines = [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).splitlines()]
    assert len(caught.value.details["problems"]) == len(lines)
    assert all(
        set(p) == {"file", "line", "column", "code", "message"} for p in caught.value.details["problems"]
    )
    return lines


def test_no_file_is_all_defaults(tmp_path: Path) -> None:
    found = load_config(default=tmp_path / "missing")
    assert found == Config()
    assert found.callers[0].match.uid == 0
    assert found.callers[0].role == "operator"
    assert found.callers[0].policies == ("*",)
    assert found.callers[1].policies == ("default", "strict", "python", "shell", "build")
    assert (found.queue, found.ids.base, found.ids.count) == (1000, 1879048192, 4096)
    assert (found.http.headers, found.http.body, found.http.connections) == (32768, 67108864, 512)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "# nothing yet\n") == Config()


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"missing\.yaml:1:1: cannot be read: No such file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigInvalid, match="Is a directory"):
        load_config(tmp_path)


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    found = load(tmp_path, EXAMPLE)
    assert found.socket.mode == 0o660
    assert found.budget.bytes_of(1000) == 750
    assert found.callers[1].concurrent == 8
    assert found.callers[1].match.group == "sandboxd"


def test_who_may_have_which_secrets(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        "callers:\n  - {match: {uid: 0}, role: operator}\n  - {match: {uid: 1}, role: agent}\n"
        '  - {match: {uid: 2}, role: agent, secrets: ["GITHUB_*", TOKEN]}\n'
        "  - {match: {uid: 3}, role: operator, secrets: []}\n",
    )
    assert [rule.granted for rule in found.callers] == [("*",), (), ("GITHUB_*", "TOKEN"), ()]
    wrong = problems(
        tmp_path, "callers: [{match: {uid: 2}, role: agent, secrets: [github]}]\nsecrets: {key: x}\n"
    )
    assert "callers.0.secrets: 'github' is not a secret's name or a glob of one" in wrong[0]
    assert "secrets.key: 'x' is not an absolute path" in wrong[1]


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().queue = 1


def test_all_errors_come_at_once_with_the_nearest_word(tmp_path: Path) -> None:
    text = (
        "engin: oci\nruntime: cron\nstate: relative\nbudget: {memory: 80, slots: 0}\n"
        "pool: {min: 9, max: 3}\nhttp: {body: 64, header_timeout: 10}\nqueue: 1\nqueue: 2\n"
        "callers:\n  - {match: {uid: -1}, role: operater}\n  - {match: {}, role: agent, polices: [x]}\n"
    )
    lines = problems(tmp_path, text)
    expected = [
        ("1:1: unknown key 'engin'; did you mean 'engine'?"),
        ("2:10: runtime: 'cron' is not auto, builtin, crun, runc"),
        ("3:8: state: 'relative' is not an absolute path"),
        ("4:18: budget.memory: write a share"),
        ("4:29: budget.slots must be greater"),
        ("5:7: pool: min (9) is above max (3)"),
        ("6:14: http.body: a size needs a unit"),
        ("6:34: http.header_timeout: a duration needs a unit"),
        ("8:1: duplicate key 'queue', first on line 7"),
        ("10:19: callers.0.match.uid must be greater"),
        ("10:30: callers.0.role: 'operater' is not one of operator, agent; did you mean 'operator'?"),
        ("11:13: callers.1.match: give at least one"),
        ("11:30: unknown key 'polices'; did you mean 'policies'?"),
    ]
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(f"sandboxd.yaml:{start}"), line


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('socket: {mode: "0666"}', "anybody may write"),
        ("socket: {mode: 432}", "octal"),
        ("socket: {mode: rw}", "octal"),
        (f"socket: {{path: /{'x' * 200}}}", "107 bytes"),
        ("socket: {group: 'a b'}", "not the name of a user or group"),
        ("budget: {memory: 120%}", "not a share"),
        ("callbacks: {tell: {argv: [tell], user: a}}", "'tell' is not an absolute path"),
        ("callbacks: {tell: {argv: [], user: a}}", "at least 1"),
        ("callbacks: {tell: {argv: [/bin/tell]}}", "user"),
        ("callbacks: {tell: {argv: [/bin/tell], user: root}}", "does not run as root"),
        ("callbacks: {tell: {argv: [/bin/tell], user: a, timeout: 1h}}", "timeout"),
        ("callbacks: {tell: {argv: [/bin/tell], user: a, env: {A: b}}}", "unknown key 'env'"),
        ("callbacks: {Tell/x: {argv: [/bin/tell], user: a}}", "Tell/x"),
        ("callers: [{match: {uid: 1}, role: agent, callbacks: [a/b]}]", "'a/b' is not the name of a program"),
        ("budget: {memory: 12QiB}", "is not a size"),
        ("budget: {memory: 4B}", "less than 1MiB"),
        ("ids: {base: 4294900000}", "pass the last id"),
        ("budget: {slots: 4096}", "ids.count: 4096 ranges are too few for 4096 containers"),
        ("ids: {count: 67}", "at least 68"),
        ("callers: []", "at least one"),
        ("callers: [{match: {uid: 0}}]", "callers.0.role is missing"),
        ("queue: 1.5", "queue"),
        ("queue: true", "queue"),
        ("engine: [oci]", "engine"),
        ("- a list", "must be a mapping"),
        ("pool: 3", "pool must be a mapping"),
    ],
)
def test_wrong_values(tmp_path: Path, text: str, word: str) -> None:
    assert word in problems(tmp_path, text)[0]


def test_an_unquoted_mode_means_what_it_says(tmp_path: Path) -> None:
    assert load(tmp_path, "socket: {mode: 0600}").socket.mode == 0o600


def test_the_socket_that_both_sides_meet_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sandboxd.config.file.SYSTEM_SOCKET", tmp_path / "system.sock")
    assert default_socket({"SANDBOXD_SOCKET": "/x"}) == Path("/x")
    assert default_socket({"XDG_RUNTIME_DIR": "/run/user/1"}) == tmp_path / "system.sock"  # we are root
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    assert default_socket({"XDG_RUNTIME_DIR": "/run/user/1"}) == Path("/run/user/1/sandboxd/sandboxd.sock")
    assert default_socket({}) == tmp_path / "system.sock"
    (tmp_path / "system.sock").touch()
    assert default_socket({"XDG_RUNTIME_DIR": "/run/user/1"}) == tmp_path / "system.sock"
