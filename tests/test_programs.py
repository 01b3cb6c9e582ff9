"""Programs of the operator's that are told of a call's end, and what neither they nor callers get by it."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from acting import acting_as
from daemons import until

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

    from sandboxd.models import CallbackState

NOBODY = 65_534
UID = 54_322
OTHER = 54_323


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    """A directory that the program's user may write to."""
    path = tmp_path / "inbox"
    path.mkdir()
    path.chmod(0o777)
    for directory in (tmp_path, *tmp_path.parents):
        if not directory.stat().st_mode & 0o001:
            directory.chmod(directory.stat().st_mode | 0o011)
    return path


def config(**programs: str) -> str:
    """A configuration in which each of these is a script for ``sh``."""
    named = {
        name: {"argv": ["/bin/sh", "-c", script], "user": "nobody", "timeout": "3s", "pids": 16}
        for name, script in programs.items()
    }
    return (
        f"callbacks: {json.dumps(named)}\n"
        "callers:\n  - {match: {uid: 0}, role: operator, callbacks: ['*']}\n"
        f"  - {{match: {{uid: {UID}}}, role: agent, callbacks: [tell]}}\n"
        f"  - {{match: {{uid: {OTHER}}}, role: agent, callback: true}}\n"
    )


def ended(daemon: Daemon, id_: str) -> CallbackState:
    client = daemon.client()
    until(lambda: client.callback(id_).state != "owed", "it is told", 30)
    return client.callback(id_)


def tried(daemon: Daemon, id_: str, times: int = 1) -> CallbackState:
    client = daemon.client()
    until(lambda: client.callback(id_).tries >= times, "it is tried", 30)
    return client.callback(id_)


def left(name: str) -> list[str]:
    """Processes of that user that have this in their command."""
    found = []
    for process in psutil.process_iter(["uids", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if process.info["uids"] and process.info["uids"].real == NOBODY and name in line:
            found.append(line)
    return found


def test_a_program_is_told_of_the_end_and_that_is_kept(
    daemon_factory: Callable[..., Daemon], inbox: Path
) -> None:
    daemon = daemon_factory(config=config(tell=f"cat > {inbox}/$SANDBOXD_CALL"))
    client = daemon.client()
    id_ = client.start(["sh", "-c", "exit 7"], callback={"exec": "tell"}, labels={"job": "9"}).id
    state = ended(daemon, id_)
    assert (state.exec, state.state, state.tries, state.problem) == ("tell", "told", 1, None)
    said = json.loads((inbox / id_).read_text())
    assert (said["id"], said["state"], said["cause"], said["exit_code"]) == (id_, "ended", "exited", 7)
    assert said["outcome"]["exit_code"] == 7
    assert (said["caller"]["uid"], said["policy"], said["labels"]) == (0, "default", {"job": "9"})
    assert (inbox / id_).stat().st_uid == NOBODY
    assert state.at is not None
    assert state.at >= (client.get(id_).times.ended or 0)
    assert "told" in daemon.sandboxd("inspect", id_)
    plain = client.run(["true"]).id
    with pytest.raises(errors.NotFound, match="no callback"):
        client.callback(plain)
    done = daemon.cli("--callback", "tell", "--json", "--", "true")
    assert ended(daemon, json.loads(done.stdout)["id"]).state == "told"


PRY = """
exec > {inbox}/$SANDBOXD_CALL 2>&1
id -u; id -g; id -G
grep -E '^(Cap|NoNewPrivs)' /proc/self/status
env | sort | tr '\\n' ' '; echo
pwd; ulimit -c; umask
ls -l /proc/self/fd | wc -l
cat /proc/net/dev | wc -l
cat /proc/self/cgroup
cat /etc/shadow
kill -9 {daemon}
"""


def test_what_a_program_has_is_only_its_users(
    daemon_factory: Callable[..., Daemon], inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOXD_TEST_SECRET", "not for programs")
    daemon = daemon_factory(config=config(tell=PRY.format(inbox=inbox, daemon="$PPID; kill -9 1")))
    id_ = daemon.client().start(["true"], callback={"exec": "tell"}).id
    tried(daemon, id_)
    text = (inbox / id_).read_text()
    lines = text.splitlines()
    assert lines[:3] == [str(NOBODY)] * 3
    found = dict(line.split(":\t") for line in lines if line.startswith(("Cap", "NoNew")))
    assert {found[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert found["NoNewPrivs"] == "1"
    names = {each.partition("=")[0] for line in lines if "SANDBOXD_CALL=" in line for each in line.split()}
    assert names <= {"PATH", "LANG", "HOME", "SANDBOXD_CALL", "PWD", "_", "OLDPWD", "SHLVL"}
    assert f"callback-{id_}" in text
    assert "Permission denied" in text
    assert daemon.client().health().status == "ready"
    at = lines.index("/")
    assert lines[at + 1 : at + 3] == ["0", "0077"]
    assert int(lines[at + 3]) <= 6  # total, 0, 1, 2, the directory itself
    assert int(lines[at + 4]) == 3  # two lines of headings, and lo


FORKS = "for i in 1 2 3; do (trap '' TERM; sleep 97531) & done; sleep 97531"


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("cat; exit 3", "ended with status 3: {"),
        ("kill -SEGV $$", "ended with status 139"),
        (FORKS, "had not ended after 3s"),
        ("while :; do sh -c 'sleep 97531' & done 2>/dev/null", "ended with status 2"),
        ("yes sleep 97531", "had not ended after 3s"),
        ("exec python3 -c 'x = bytearray(512 << 20); x[:] = b\"1\" * len(x)'", "ended with status 137"),
        ("exec /nosuch/97531", "ended with status 12"),
        ("exec 0<&-; exit 4", "ended with status 4"),
    ],
    ids=["status", "signal", "children", "forks", "output", "memory", "missing", "deaf"],
)
def test_a_program_that_fails_is_ended_with_all_it_started_and_tried_again(
    daemon_factory: Callable[..., Daemon], script: str, problem: str
) -> None:
    daemon = daemon_factory(config=config(tell=script))
    id_ = daemon.client().start(["true"], callback={"exec": "tell"}, labels={"x": "y" * 200}).id
    state = tried(daemon, id_)
    assert state.state == "owed"
    assert problem in (state.problem or ""), state
    assert len(state.problem or "") < 700
    if "had not" in problem:
        assert tried(daemon, id_, 1).state == "owed"
    else:
        tried(daemon, id_, 2)
    daemon.stop()
    assert left("97531") == []
    assert not list(Path("/sys/fs/cgroup").rglob(f"callback-{id_}"))


def test_children_that_outlive_their_program_do_not(
    daemon_factory: Callable[..., Daemon], inbox: Path
) -> None:
    script = f"(setsid sleep 97532; touch {inbox}/late) & echo up > {inbox}/$SANDBOXD_CALL"
    daemon = daemon_factory(config=config(tell=script))
    id_ = daemon.client().start(["true"], callback={"exec": "tell"}).id
    assert ended(daemon, id_).state == "told"
    assert left("97532") == []
    children = psutil.Process(daemon.process.pid).children(recursive=True)
    assert not [child for child in children if child.status() == psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_daemon_that_ends_takes_its_programs_along_and_the_next_one_tells(
    daemon_factory: Callable[..., Daemon], inbox: Path, number: int
) -> None:
    script = f"echo x >> {inbox}/$SANDBOXD_CALL; [ -e {inbox}/go ] || sleep 97533"
    text = config(tell=script).replace('"3s"', '"300s"')
    first = daemon_factory(config=text)
    id_ = first.client().start(["true"], callback={"exec": "tell"}).id
    until((inbox / id_).exists, "it runs")
    began = time.monotonic()
    first.stop(number)
    assert time.monotonic() - began < 30
    until(lambda: left("97533") == [], "it is gone")
    (inbox / "go").touch()
    second = daemon_factory(config=text, state=first.state, name="second")
    assert ended(second, id_).state == "told"
    assert (inbox / id_).read_text() == "x\nx\n"
    assert not list(Path("/sys/fs/cgroup").rglob(f"callback-{id_}"))


def as_user(uid: int, daemon: Daemon, **fields: Any) -> str:
    with acting_as(uid):
        return daemon.client().start(["true"], **fields).id


def test_a_caller_has_only_what_it_was_granted(daemon_factory: Callable[..., Daemon], inbox: Path) -> None:
    daemon = daemon_factory(config=config(tell="cat", other=f"touch {inbox}/other"))
    daemon.admit_everybody()
    id_ = as_user(UID, daemon, callback={"exec": "tell"})
    assert ended(daemon, id_).state == "told"
    for uid, callback in (
        (UID, {"exec": "other"}),
        (UID, {"exec": "nosuch"}),
        (UID, {"unix": "/run/x"}),
        (OTHER, {"exec": "tell"}),
    ):
        with pytest.raises(errors.NotPermitted, match="not yours"):
            as_user(uid, daemon, callback=callback)
    with acting_as(OTHER), pytest.raises(errors.NotFound):
        daemon.client().callback(id_)
    with pytest.raises(errors.InvalidRequest, match="no program 'nosuch'; those of yours are other, tell"):
        daemon.client().start(["true"], callback={"exec": "nosuch"})
    for wrong in (
        {"exec": "../tell"},
        {"exec": "tell\n"},
        {"exec": "tell -x"},
        {"exec": ""},
        {"exec": ["sh"]},
        {"exec": "tell", "unix": "/run/x"},
        {},
    ):
        with pytest.raises(errors.InvalidRequest):
            daemon.client().start(["true"], callback=wrong)  # type: ignore[arg-type]
    assert not (inbox / "other").exists()


def test_a_program_that_is_gone_after_a_restart_is_said_so(
    daemon_factory: Callable[..., Daemon], inbox: Path
) -> None:
    first = daemon_factory(config=config(tell=f"[ -e {inbox}/go ]"))
    id_ = first.client().start(["true"], callback={"exec": "tell"}).id
    tried(first, id_)
    first.stop()
    before = tried_on_disk(first.state, id_)
    second = daemon_factory(config=config(), state=first.state, name="second")
    state = tried(second, id_, before + 1)  # tries are counted over restarts
    assert "no program 'tell'" in (state.problem or "")
    second.stop()
    (inbox / "go").touch()
    third = daemon_factory(config=config(tell=f"[ -e {inbox}/go ]"), state=first.state, name="third")
    assert ended(third, id_).state == "told"


def tried_on_disk(state: Path, id_: str) -> int:
    with closing(sqlite3.connect(f"file:{state}/journal.sqlite3?mode=ro", uri=True)) as connection:
        [[tries]] = connection.execute("SELECT tries FROM callbacks WHERE id = ?", (id_,)).fetchall()
    return int(tries)


def test_users_that_may_not_be_do_not_run_anything(
    daemon_factory: Callable[..., Daemon], inbox: Path
) -> None:
    text = config(tell=f"touch {inbox}/ran", nouser="true")
    text = text.replace('"user": "nobody"', '"user": "nobody", "group": "root"', 1)
    text = text.replace('"user": "nobody", "timeout"', '"user": "nosuchuser97", "timeout"', 1)
    daemon = daemon_factory(config=text)
    client = daemon.client()
    one = client.start(["true"], callback={"exec": "tell"}).id
    two = client.start(["true"], callback={"exec": "nouser"}).id
    assert "gid 0" in (tried(daemon, one).problem or "")
    assert "nosuchuser97" in (tried(daemon, two).problem or "")
    assert not (inbox / "ran").exists()
