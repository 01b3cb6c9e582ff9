"""Programs of the operator's that are told of a call's end: what reaches them, and what they are held to.

They run on the host, and not in a container; but the cgroup that bounds each is the engine's to make.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
from typing import TYPE_CHECKING

import psutil
import pytest

from sandboxd import errors
from sandboxd.conformance.plugin import needs
from sandboxd.conformance.policies import PREFIX
from sandboxd.conformance.subject import open_subject

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sandboxd.conformance.subject import Subject
    from sandboxd.models import CallbackState

pytestmark = needs("a daemon of the suite's own")

PRIES = """
exec > "$TOLD/$SANDBOXD_CALL" 2>&1
cat
id -u; id -G; pwd
grep -E '^(CapPrm|CapEff|CapBnd|NoNewPrivs)' /proc/self/status | cut -f2
cat /proc/net/dev | wc -l
cat /proc/self/cgroup
"""
LATER = 'echo x >> "$TOLD/$SANDBOXD_CALL"; [ -e "$TOLD/go" ]'
SLEEP = "sleep 98761"
FAILS = {
    "status": ("exit 3", "ended with status 3"),
    "time": (f"(setsid {SLEEP} &); {SLEEP}", "had not ended after"),
    "pids": (f"while {SLEEP} & do :; done", "ended with status 2"),
    "memory": ("head -c 200M /dev/zero | tail -n 1", "ended with status 137"),
}
"""By what ends it: a script, and what is told of its end."""


def config(told: Path, subject: Subject, **scripts: str) -> str:
    """A configuration by which the suite's user may name these scripts as a callback."""
    programs = {
        name: {
            "argv": ["/bin/sh", "-c", f"TOLD={told}; {script}"],
            "user": "nobody",
            "timeout": subject.duration(3),
            "memory": "64MiB",
            "pids": 8,
            "cpus": 1,
        }
        for name, script in scripts.items()
    }
    callers = [{"match": {"uid": os.geteuid()}, "role": "operator", "callbacks": list(scripts)}]
    return f"callbacks: {json.dumps(programs)}\ncallers: {json.dumps(callers)}\n"


@pytest.fixture(scope="module")
def told(subject: Subject) -> Iterator[Path]:
    """A directory that anybody may write to."""
    path = subject.directory / "told"
    path.mkdir()
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def own(subject: Subject, told: Path) -> Iterator[Subject]:
    """A daemon with these programs: on some engines the first container of one takes long."""
    scripts = {name: script for name, (script, _) in FAILS.items()}
    text = config(told, subject, tell=PRIES, later=LATER, **scripts)
    with open_subject(subject.options, config=text, share=1) as one:
        yield one


def tried(own: Subject, id_: str, times: int = 1) -> CallbackState:
    """What became of a callback, once it was tried so often."""
    own.until(lambda: own.client.callback(id_).tries >= times, "it is tried", 20)
    return own.client.callback(id_)


def left() -> list[int]:
    """Processes on this host that a program started and did not end."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if " ".join(process.info["cmdline"] or []) == SLEEP
    ]


def test_a_program_is_told_and_has_its_users_rights_alone(own: Subject, told: Path) -> None:
    for name in ("another", "../tell", "tell; true"):
        with pytest.raises(errors.Refused):
            own.start("true", callback={"exec": name})
    call = own.start("sh", "-c", "exit 7", callback={"exec": "tell"}, labels={"job": "9"})
    state = tried(own, call.id)
    assert (state.exec, state.state, state.problem) == ("tell", "told", None)
    line, *lines = (told / call.id).read_text().splitlines()
    said = json.loads(line)
    assert (said["id"], said["state"], said["cause"], said["exit_code"]) == (call.id, "ended", "exited", 7)
    assert (said["policy"], said["labels"]) == (PREFIX + "plain", {"job": "9"})
    nobody = pwd.getpwnam("nobody")
    assert lines[:3] == [str(nobody.pw_uid), str(nobody.pw_gid), "/"]
    assert lines[3:7] == ["0" * 16] * 3 + ["1"]
    assert lines[7] == "3", "two lines of headings, and lo"
    assert any(f"callback-{call.id}" in one for one in lines[8:]), "a cgroup of its own"


def test_a_program_that_fails_is_ended_with_all_that_it_started(own: Subject) -> None:
    calls = {name: own.start("true", callback={"exec": name}) for name in FAILS}
    for name, call in calls.items():
        state = tried(own, call.id)
        assert state.state == "owed"
        assert FAILS[name][1] in (state.problem or ""), name
    own.until(lambda: not left(), "nothing is left of it until it is tried again")


def test_what_was_not_told_is_told_by_the_next_daemon(own: Subject, told: Path) -> None:
    call = own.start("true", callback={"exec": "later"})
    assert tried(own, call.id).state == "owed"
    own.stop(signal.SIGKILL)
    (told / "go").touch()
    own.launch()
    own.until(lambda: own.client.callback(call.id).state == "told", "it is told", 20)
    assert (told / call.id).read_text().count("x") >= 2
