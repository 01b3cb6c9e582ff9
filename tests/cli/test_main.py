"""``sandboxd`` as a process, and its help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from api_server import HEX, ID, event, invocation, output
from archives import directory, member, tar

from sandboxd.cli import main as command_line
from sandboxd.cli import terminal
from sandboxd.cli.usage import visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from api_server import ApiServer
    from cyclopts import App

ROOT = Path(__file__).parents[2]
OTHER = ID[:-1] + "c"


def run(api: ApiServer | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    if api:
        environment["SANDBOXD_SOCKET"] = str(api.socket)
    return subprocess.run(
        [sys.executable, "-m", "sandboxd.cli.main", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )


def commands() -> Iterator[tuple[str, App]]:
    app = command_line.build_app()
    for name in command_line.COMMANDS:
        yield name, app[name]
    for group, (_, members) in command_line.GROUPS.items():
        assert app[group].help
        for name in members:
            yield f"{group} {name}", app[group][name]


@pytest.mark.parametrize(
    ("name", "app"), list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_command_and_option_is_documented(name: str, app: App) -> None:
    assert app.help.strip(), name
    arguments = app.assemble_argument_collection()
    for argument in arguments:
        if argument.children:  # a group of options, flattened: its members are in the collection too
            continue
        assert argument.parameter.help, f"{name}: {argument.name}"
    names = {one for argument in arguments for one in argument.names}
    assert name in {"serve", "policy schema"} or "--json" in names
    local = name.split(maxsplit=1)[0] in {"serve", "doctor", "image", "journal"} or name in {
        "policy check",
        "policy schema",
    }
    assert local or "--socket" in names


@pytest.mark.parametrize("arguments", [[], ["--help"], ["policy"], ["image", "--help"], ["journal"]])
def test_help_lists_what_there_is(arguments: list[str]) -> None:
    found = run(None, *arguments)
    assert found.returncode == 0
    group = command_line.GROUPS.get(arguments[0]) if arguments else None
    for name in group[1] if group else [*command_line.COMMANDS, *command_line.GROUPS]:
        assert f"│ {name} " in found.stdout


@pytest.mark.parametrize("arguments", [["nope"], ["ps", "--nope"], ["inspect"], ["ps", "--limit", "x"]])
def test_a_wrong_command_line_is_2(arguments: list[str]) -> None:
    found = run(None, *arguments)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("sandboxd: ")
    assert "Traceback" not in found.stderr


def test_no_daemon_is_one_line_and_1(tmp_path: Path) -> None:
    found = run(None, "ps", "--json", "--socket", str(tmp_path / "s"))
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert "sandboxd serve" in found.stderr
    assert json.loads(found.stdout)["code"] == "unavailable"


def listing(api: ApiServer, *documents: dict[str, Any]) -> None:
    api.json("GET", "invocations", {"invocations": list(documents)})


def test_ps(api: ApiServer) -> None:
    listing(api, invocation(None, argv=["echo", "\x1b[31m[bold]x", {"base64": "/w=="}]))
    found = run(api, "ps")
    assert found.returncode == 0, found.stderr
    assert ID in found.stdout
    assert r"\x1b[31m[bold]x" in found.stdout
    assert "\x1b" not in found.stdout
    states = {seen.query["state"] for seen in api.sent("GET", "invocations")}
    assert states == {"accepted", "held", "queued", "starting", "running", "collecting"}
    found = run(api, "ps", "-a", "--json", "--policy", "p", "--label", "a=b")
    assert [one["id"] for one in json.loads(found.stdout)["invocations"]] == [ID]
    assert api.requests[-1].query["policy"] == "p"
    assert "state" not in api.requests[-1].query


def test_ps_with_nothing_to_show(api: ApiServer) -> None:
    listing(api)
    found = run(api, "ps")
    assert (found.returncode, found.stdout) == (0, "")
    assert "sandboxd ps -a" in found.stderr


def test_ps_of_containers(api: ApiServer) -> None:
    slot = {
        "state": "waiting",
        "policy": "p\x1b",
        "image": "i",
        "shape": "sha256:0123456789abcdef",
        "since": 1,
    }
    api.json("GET", "slots", {"slots": [slot | {"id": "one"}, slot | {"policy": "q", "state": "creating"}]})
    found = run(api, "ps", "--slots")
    assert found.returncode == 0, found.stderr
    assert "\x1b" not in found.stdout
    assert "0123456789ab\n" in found.stdout
    listed = json.loads(run(api, "ps", "--slots", "--json", "--policy", "q").stdout)
    assert [one["state"] for one in listed["slots"]] == ["creating"]
    assert run(api, "ps", "--slots", "-a").returncode == 1


def test_inspect_shows_all_and_ids_may_be_short(api: ApiServer) -> None:
    listing(api, invocation(), invocation(id=OTHER))
    api.json("GET", f"invocations/{ID}", invocation("signalled", outcome={"signal": 9, "message": "m\x9b2J"}))
    for text in (ID, ID[-6:]):
        found = run(api, "inspect", text)
        assert found.returncode == 0, found.stderr
        assert "cause: signalled" in found.stdout
        assert "\x9b" not in found.stdout
    found = run(api, "inspect", ID[-12:], "--json")
    assert json.loads(found.stdout)["outcome"]["signal"] == 9
    for text, said in ((ID[:8], "fits 2 calls"), ("ffff9999", "no recent call"), ("ab", "too short")):
        found = run(api, "inspect", text)
        assert (found.returncode, said in found.stderr) == (1, True), found.stderr


def test_logs_are_byte_exact(api: ApiServer) -> None:
    api.events(
        output(1, {"base64": "/wA="}), output(2, {"text": "err"}, "stderr"), output(3, {"text": "\x1b[0m"}),
        event(4, "ended", invocation=invocation()), method="GET", path=f"invocations/{ID}/events",
    )  # fmt: skip
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "SANDBOXD_SOCKET": str(api.socket)}
    command = [sys.executable, "-m", "sandboxd.cli.main", "logs", ID]
    for more in ([], ["-f"]):
        found = subprocess.run([*command, *more], capture_output=True, env=environment, check=True)
        assert (found.stdout, found.stderr) == (b"\xff\x00\x1b[0m", b"err")
    assert [seen.query["follow"] for seen in api.requests] == ["0", "1"]
    api.on("GET", f"invocations/{ID}/stderr", lambda one: one.send(b"\xfe"))
    found = subprocess.run([*command, "--stderr"], capture_output=True, env=environment, check=True)
    assert (found.stdout, found.stderr) == (b"", b"\xfe")
    found = subprocess.run([*command, "--json"], capture_output=True, env=environment, check=True)
    assert [json.loads(line)["seq"] for line in found.stdout.splitlines()] == [1, 2, 3, 4]


def test_cancel(api: ApiServer) -> None:
    api.json("POST", f"invocations/{ID}/cancel", invocation("cancelled"))
    assert run(api, "cancel", ID).stdout == f"{ID}: cancelled\n"
    api.on("POST", f"invocations/{ID}/cancel", lambda one: one.problem(404, "not_found", "no such call"))
    found = run(api, "cancel", ID)
    assert (found.returncode, found.stderr) == (1, "sandboxd: no such call\n")


def test_policy_check_needs_no_daemon(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("version: 1\nname: good\nextends: default\nlimits: {wall: 1s}\n")
    bad.write_text("version: 1\nname: bad\nextends: good\nlimits: {wal: 1s, memory: 1XB}\n")
    found = run(None, "policy", "check", str(good))
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    found = run(None, "policy", "check", str(good), str(bad), str(tmp_path / "none.yaml"))
    assert found.returncode == 1
    lines = found.stdout.splitlines()
    assert any(line.startswith(f"{bad}:4:10: ") and "wall" in line for line in lines)
    assert any(line.startswith(f"{bad}:4:") and "1XB" in line for line in lines)
    assert any("none.yaml" in line for line in lines)
    found = run(None, "policy", "check", "--json", str(bad))
    assert {one["line"] for one in json.loads(found.stdout)["problems"]} == {4}


def test_looking_at_images_makes_no_state_directory(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for command in (["ls"], ["verify"], ["rm", "base"]):
        found = run(None, "image", *command, "--state", str(absent))
        assert (found.returncode, found.stdout) == (1, "")
        assert f"there is no state directory {absent}" in found.stderr
    assert not absent.exists()


def test_policies_can_be_read_here(tmp_path: Path) -> None:
    assert "strict" in run(None, "policy", "list", "--local").stdout
    assert "name: strict" in run(None, "policy", "show", "strict", "--local").stdout
    explained = json.loads(run(None, "policy", "explain", "strict", "--local", "--json").stdout)["explain"]
    wall = next(line for line in explained if line["control"] == "limits.wall")
    assert wall["file"].endswith("strict.yaml")
    assert wall["line"] > 1
    assert "command" not in {line["control"] for line in explained}
    shown = run(None, "policy", "explain", "strict", "--local", "--", "python3", "a b").stdout
    assert re.search(r"^command +python3 'a b' +\(the request\) ", shown, re.MULTILINE)
    found = run(None, "policy", "show", "strikt", "--local")
    assert (found.returncode, "strict" in found.stderr) == (1, True)
    assert json.loads(run(None, "policy", "schema").stdout)["type"] == "object"
    broken = tmp_path / "c.yaml"
    broken.write_text("engin: oci\nstate: 3\n")
    found = run(None, "policy", "list", "--local", "--config", str(broken))
    assert found.returncode == 1
    assert [line.split(": ")[1] for line in found.stderr.splitlines()] == [f"{broken}:1:1", f"{broken}:2:8"]


def test_policy_explain_asks_the_daemon_for_the_plan(api: ApiServer) -> None:
    line = {"control": "limits.wall", "value": "5s", "file": "f.yaml", "line": 3, "note": "narrowed"}
    command = {"control": "command", "value": "python3 -V", "file": "(the request)", "line": 0, "note": "n"}
    api.json("POST", "plans", {"digest": HEX, "plan": {}, "explain": [command, line]})
    found = run(api, "policy", "explain", "p", "--", "python3", "--version")
    assert "f.yaml:3" in found.stdout
    assert "python3 -V" in found.stdout
    assert "python3 -V" not in run(api, "policy", "explain", "p").stdout  # nobody gave a command
    assert api.requests[0].json() == {"argv": ["python3", "--version"], "policy": "p"}


def test_images_and_journal_say_what_to_do(tmp_path: Path) -> None:
    found = run(None, "image", "build", "nope", "--state", str(tmp_path))
    assert (found.returncode, "one of: base" in found.stderr) == (1, True)
    assert "host" in run(None, "image", "ls", "--state", str(tmp_path)).stdout
    for arguments in (
        ["image", "verify", "nope"],
        ["image", "rm", "nope"],
        ["image", "import", "/nonexistent.tar"],
    ):
        found = run(None, *arguments, "--state", str(tmp_path))
        assert (found.returncode, "Traceback" in found.stderr) == (1, False), found.stderr
    found = run(None, "journal", "verify", "--state", str(tmp_path))
    assert (found.returncode, "no journal at" in found.stderr) == (1, True)
    (tmp_path / "journal.sqlite3").write_bytes(b"garbage" * 1000)
    found = run(None, "journal", "head", "--state", str(tmp_path))
    assert (found.returncode, "damaged" in found.stderr) == (1, True)


def test_an_image_that_a_policy_names_by_digest_is_not_removed_by_name(tmp_path: Path) -> None:
    archive, state = tmp_path / "small.tar", tmp_path / "state"
    archive.write_bytes(tar(directory("etc"), member("etc/x", b"x")))
    done = run(None, "image", "import", str(archive), "--state", str(state), "--json")
    digest = json.loads(done.stdout)["digest"]
    own = tmp_path / "policies"
    own.mkdir()
    (tmp_path / "c.yaml").write_text(f"policies: [{own}]\n")
    where = ["--state", str(state), "--config", str(tmp_path / "c.yaml")]
    for image in (digest, "small"):
        (own / "p.yaml").write_text(f"version: 1\nname: p\nimage: {image}\n")
        for name in (digest, "small"):
            found = run(None, "image", "rm", name, *where)
            assert (found.returncode, "is used by p" in found.stderr) == (1, True), found.stderr
        listed = json.loads(run(None, "image", "ls", "--json", *where).stdout)["images"]
        assert {one["name"]: one["used_by"] for one in listed}["small"] == ["p"]
    (own / "p.yaml").unlink()
    assert run(None, "image", "rm", digest, *where).returncode == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü", "plain ü"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b]0;t\x07", r"\x1b]0;t\x07"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\x9b1m", r"\x9b1m"),
        ("\udcff", r"\udcff"),
        ("C:\\x", "C:\\x"),
    ],
)
def test_nothing_reaches_the_terminal_unescaped(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_durations_are_for_people() -> None:
    shown = [terminal.duration(value) for value in (None, 1500, 1_500_000, 600_000_000, 36_000_000_000)]
    assert shown == ["-", "1.5 ms", "1.5 s", "10 min", "10 h"]
