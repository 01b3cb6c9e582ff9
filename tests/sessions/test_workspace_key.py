"""``run-in-sandbox --workspace --key``: who asks again finds the call, and what is not here of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import needs_containers, start_daemon, until
from sessioned import CONFIG, give_policies

from sandboxd import errors
from sandboxd.cli import standing, usage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

RUN = Path(sys.executable).parent / "run-in-sandbox"
pytestmark = pytest.mark.usefixtures("agreements")
WAYS = pytest.mark.parametrize("way", [[], ["--upload"]], ids=["lent", "copied"])
ONCE = "echo ran; echo more >>log; exit 3"
SLOWLY = f'trap go=1 USR1; echo begun; until [ -n "$go" ]; do sleep 0.05; done; {ONCE}'
"""Ends once it is let go."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    place = tmp_path / "work"
    place.mkdir()
    (place / "log").write_text("first\n")
    time.sleep(0.01)
    return place


@pytest.fixture(autouse=True)
def nothing_left(daemon: Daemon) -> Iterator[None]:
    before = daemon.client().sessions().sessions
    yield
    assert daemon.client().sessions().sessions == before


def command(key: str, script: str, *options: str) -> list[str]:
    return [
        str(RUN),
        "--workspace",
        ".",
        "--key",
        key,
        "--policy",
        "kept",
        *options,
        "--",
        "sh",
        "-c",
        script,
    ]


def environ(daemon: Daemon) -> dict[str, str]:
    return os.environ | {"SANDBOXD_SOCKET": str(daemon.socket)}


def run(daemon: Daemon, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=directory, env=environ(daemon), capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip


def start(daemon: Daemon, directory: Path, *arguments: str) -> subprocess.Popen[str]:
    """One of which the command has begun."""
    process = subprocess.Popen(
        command(*arguments), cwd=directory, env=environ(daemon), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def calls(daemon: Daemon, key: str) -> int:
    return len([one for one in daemon.client().list().invocations if one.key == key])


def let_go(daemon: Daemon, key: str) -> None:
    (one,) = [one for one in daemon.client().list().invocations if one.key == key]
    daemon.client().signal(one.id, signal.SIGUSR1)


def end(daemon: Daemon, key: str) -> None:
    let_go(daemon, key)
    until(
        lambda: [one for one in daemon.client().list().invocations if one.key == key and one.outcome],
        "its end",
    )


@WAYS
def test_a_retry_shows_the_call_and_brings_nothing_again(
    daemon: Daemon, directory: Path, way: list[str]
) -> None:
    key = f"again-{way}"
    first = run(daemon, directory, key, ONCE, "--pull", *way)
    assert (first.returncode, first.stdout) == (3, "ran\n"), first.stderr
    assert (directory / "log").read_text() == "first\nmore\n"
    (directory / "log").write_text("mine\n")
    again = run(daemon, directory, key, ONCE, "--pull", *way)
    assert (again.returncode, again.stdout) == (3, "ran\n"), again.stderr
    assert "this call ran before, and what it changed was brought then" in again.stderr
    assert (directory / "log").read_text() == "mine\n"
    assert calls(daemon, key) == 1


@WAYS
def test_a_retry_without_pull(daemon: Daemon, directory: Path, way: list[str]) -> None:
    key = f"told-{way}"
    assert "M log\n" in run(daemon, directory, key, ONCE, *way).stderr
    again = run(daemon, directory, key, ONCE, *way)
    assert (again.returncode, again.stdout) == (3, "ran\n")
    assert "what it changed was told then" in again.stderr
    assert (directory / "log").read_text() == "first\n"


@pytest.mark.parametrize("pull", [True, False])
def test_who_died_while_the_call_ran(daemon: Daemon, directory: Path, pull: bool) -> None:  # noqa: FBT001
    key, options = f"died-{pull}", ("--pull",) if pull else ()
    with start(daemon, directory, key, SLOWLY, *options) as process:
        process.kill()
    running = start(daemon, directory, key, SLOWLY, *options)  # attaches to it
    let_go(daemon, key)
    out, err = running.communicate(timeout=100)
    assert (running.returncode, out) == (3, "ran\n")
    assert ("pulled  log\n" if pull else "M log\n") in err
    assert (directory / "log").read_text() == ("first\nmore\n" if pull else "first\n")
    assert calls(daemon, key) == 1


@pytest.mark.parametrize("pull", [True, False])
def test_who_died_before_it_was_reported(daemon: Daemon, directory: Path, pull: bool) -> None:  # noqa: FBT001
    key, options = f"before-{pull}", ("--pull",) if pull else ()
    with start(daemon, directory, key, SLOWLY, *options) as process:
        process.kill()
    end(daemon, key)
    found = run(daemon, directory, key, SLOWLY, *options)
    assert (found.returncode, found.stdout) == (3, "begun\nran\n")
    assert ("pulled  log\n" if pull else "M log\n") in found.stderr


@pytest.mark.parametrize("pull", [True, False])
def test_who_died_with_a_copy(daemon: Daemon, directory: Path, pull: bool) -> None:  # noqa: FBT001
    """The copy is not made again, and what has changed here since is nobody's change there."""
    key, options = f"copy-{pull}", ("--upload", *(("--pull",) if pull else ()))
    with start(daemon, directory, key, SLOWLY, *options) as process:
        process.kill()
    (directory / "new").write_text("mine\n")
    end(daemon, key)
    found = run(daemon, directory, key, SLOWLY, *options)
    assert (found.returncode, found.stdout) == (3, "begun\nran\n")
    assert ("pulled  log\n" if pull else "M log\n") in found.stderr
    assert "new" not in found.stderr
    assert (directory / "new").read_text() == "mine\n"


def test_who_died_while_the_copy_was_made(daemon: Daemon, directory: Path) -> None:
    """What it had made is filled, and used."""
    options = usage.parse(command("half", ONCE, "--upload", "--pull")[1:])
    options.workspace = str(directory)
    made = daemon.client().create_session(standing._name(options), policy="kept", idle="1h")
    done = run(daemon, directory, "half", ONCE, "--upload", "--pull")
    assert (done.returncode, done.stdout) == (3, "ran\n"), done.stderr
    assert (directory / "log").read_text() == "first\nmore\n"
    (call,) = [one for one in daemon.client().list().invocations if one.key == "half"]
    assert call.session == made.id


def test_what_was_refused_is_brought_by_a_retry(daemon: Daemon, directory: Path) -> None:
    first = start(daemon, directory, "refused", SLOWLY, "--pull")
    (directory / "log").write_text("mine\n")
    let_go(daemon, "refused")
    _, err = first.communicate(timeout=100)
    assert (first.returncode, "refused log: " in err, "stays for 1h" in err) == (3, True, True)
    again = run(daemon, directory, "refused", SLOWLY, "--pull")
    assert "refused log: " in again.stderr
    assert (directory / "log").read_text() == "mine\n"
    (call,) = [one for one in daemon.client().list().invocations if one.key == "refused"]
    daemon.client().pull(call.session or "", directory, force=True)
    last = run(daemon, directory, "refused", SLOWLY, "--pull")
    assert (last.returncode, "refused" in last.stderr) == (3, False)
    assert (directory / "log").read_text().endswith("more\n")


def test_another_request_with_the_key(daemon: Daemon, directory: Path, tmp_path: Path) -> None:
    """It is a conflict, brings nothing of the first, and leaves that to who asked for it."""
    other = tmp_path / "other"
    other.mkdir()
    with start(daemon, directory, "other", SLOWLY, "--pull") as process:
        process.kill()
    end(daemon, "other")
    refused = run(daemon, directory, "other", "true", "--pull")
    assert (refused.returncode, "they differ in argv" in refused.stderr) == (125, True)
    for place, options in ((other, ("--pull",)), (directory, ()), (directory, ("--pull", "--upload"))):
        refused = run(daemon, place, "other", SLOWLY, *options)
        assert (refused.returncode, "they differ in session" in refused.stderr) == (125, True)
        assert "stands for --workspace, --upload and --pull" in refused.stderr
    assert (directory / "log").read_text() == "first\n"
    assert list(other.iterdir()) == []
    assert "pulled  log\n" in run(daemon, directory, "other", SLOWLY, "--pull").stderr


def test_a_refused_request_leaves_no_session(daemon: Daemon, directory: Path) -> None:
    done = run(daemon, directory, "bad", "true", "--pull", "--cwd", "no/such")
    assert done.returncode in {125, 126, 127}
    done = run(daemon, directory, "bad2", "true", "--pull", "--memory", "900GiB")
    assert (done.returncode, "stays" in done.stderr) == (125, False)


@WAYS
def test_many_at_once(daemon: Daemon, directory: Path, way: list[str]) -> None:
    key = f"many-{way}"
    pipe = subprocess.PIPE
    many = [
        subprocess.Popen(
            command(key, SLOWLY, "--pull", *way), cwd=directory, env=environ(daemon), text=True,
            stdout=pipe, stderr=pipe,
        )
        for _ in range(4)
    ]  # fmt: skip
    for one in many:
        assert one.stdout is not None
        assert one.stdout.readline() == "begun\n"
    let_go(daemon, key)
    said = [one.communicate(timeout=100) for one in many]
    assert [one.returncode for one in many] == [3] * 4, said
    assert [out for out, _ in said] == ["ran\n"] * 4
    assert [err.count("pulled  log\n") for _, err in said].count(1) == 1
    assert (directory / "log").read_text() == "first\nmore\n"
    assert calls(daemon, key) == 1


@pytest.mark.parametrize("keyed", [True, False])
def test_a_directory_that_goes_meanwhile(daemon: Daemon, directory: Path, keyed: bool) -> None:  # noqa: FBT001
    """That is said, not raised; with a key the session stays for who asks again."""
    options = usage.parse(command("gone", "true", "--pull")[1:])
    options.socket, options.workspace = str(daemon.socket), str(directory)
    options.key = options.key if keyed else None
    told: list[str] = []

    def act() -> None:
        with standing.standing(options, told.append) as place:
            call = daemon.client().run(["true"], session=place.named, policy="kept")
            directory.rename(directory.with_name("moved"))
            place.report({"session": call.session})

    with pytest.raises(errors.InvalidRequest, match="cannot be opened"):
        act()
    assert bool(told) is keyed
    if keyed:
        daemon.client().delete_session(standing._name(options))


def test_who_is_interrupted_leaves_it_to_a_retry(daemon: Daemon, directory: Path) -> None:
    process = start(daemon, directory, "interrupted", SLOWLY, "--pull")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode == 130
    again = run(daemon, directory, "interrupted", SLOWLY, "--pull")
    assert (again.returncode, again.stdout) == (130, "begun\n")


def test_a_session_that_may_have_ended_before_it_was_brought(daemon: Daemon, directory: Path) -> None:
    """Whether it was brought is known for as long as a session is kept."""
    told: list[str] = []
    options = usage.parse(command("old", "true", "--pull")[1:])
    options.socket, options.workspace = str(daemon.socket), str(directory)
    now = time.time_ns() // 1000
    for at, known in ((now - 10**6, True), (now - 3601 * 10**6, False)):
        with standing.standing(options, told.append) as place:
            assert place.report({"session": "another", "times": {"ended": at}}) is known
    assert told[-1].startswith("unless that was not done for 1h")


def test_a_daemon_that_is_killed_under_the_call(tmp_path: Path, directory: Path) -> None:
    """What is waited for is told by the next one, to which the directory is lent again."""
    needs_containers()
    place = tmp_path / "own"
    place.mkdir()
    with start_daemon(place, config=CONFIG) as one:
        give_policies(one)
        process = start(one, directory, "killed", SLOWLY, "--pull")
        one.stop(signal.SIGKILL)
    with start_daemon(place, config=CONFIG) as one:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 125, err
        assert "stays" not in err
        assert one.client().sessions().sessions == []
        assert run(one, directory, "killed", SLOWLY, "--pull").returncode == 125


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_retry_after_a_restart_of_the_daemon(tmp_path: Path, directory: Path, number: int) -> None:
    needs_containers()
    place = tmp_path / "own"
    place.mkdir()
    with start_daemon(place, config=CONFIG) as one:
        give_policies(one)
        with start(one, directory, "restart", SLOWLY, "--pull") as process:
            process.kill()
        end(one, "restart")
        one.stop(number)
    with start_daemon(place, config=CONFIG) as one:
        give_policies(one)
        found = run(one, directory, "restart", SLOWLY, "--pull")
        assert (found.returncode, found.stdout) == (3, "begun\nran\n"), found.stderr
        assert (directory / "log").read_text() == "first\nmore\n"
        with pytest.raises(errors.NotFound):
            one.client().session(one.client().list().invocations[0].session or "")
