"""One container over the calls of a session: what lives on in it, and what each call has for itself."""

from __future__ import annotations

import json
import os
import select
import signal
import uuid
from typing import TYPE_CHECKING

import pytest

from sandboxd import errors
from sandboxd.conformance.case import controls, outcome, said, sh, text
from sandboxd.conformance.expected import RECEIPT
from sandboxd.conformance.plugin import needs
from sandboxd.conformance.traces import Traces

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.conformance.subject import Subject
    from sandboxd.models import Invocation, SessionInfo

COUNT = "grep -ls sleep /proc/[0-9]*/comm | wc -l"


@pytest.fixture
def session(subject: Subject) -> Iterator[SessionInfo]:
    """A session without files."""
    made = subject.client.create_session()
    yield made
    subject.client.delete_session(made.id)


def run(subject: Subject, session: SessionInfo, code: str, **fields: object) -> Invocation:
    return subject.run(*sh(code), policy="kept", session=session.id, **fields)


def test_processes_and_files_live_on(subject: Subject, session: SessionInfo) -> None:
    first = run(subject, session, "echo one > file; echo two > /tmp/other; sleep 1000 & echo $!")
    pid = text(first).strip()
    second = run(subject, session, f"cat file /tmp/other; kill -0 {pid} && echo alive; kill {pid}")
    assert text(second) == "one\ntwo\nalive\n"
    used = [call.container for call in (first, second)]
    assert [one and (one.since, one.number, one.ended) for one in used] == [
        (first.id, 1, None), (first.id, 2, None)
    ]  # fmt: skip


def test_each_call_is_shut_in_as_the_first(subject: Subject, session: SessionInfo) -> None:
    seen = []
    for _ in range(2):
        code = "import json, os; s = open('/proc/self/status').read(); keys = ('Uid', 'Gid', 'Cap', 'NoNew', "
        code += "'Seccomp', 'SigIgn'); print(json.dumps([[l for l in s.splitlines() if l.startswith(keys)], "
        code += "sorted(os.listdir('/proc/self/fd'))[:3], os.umask(0)]))"
        found = subject.run("python3", "-c", code, policy="kept", session=session.id)
        seen.append(said(found))
        assert all(control.enforced for control in controls(found).values())
        there = {"always", "policy kept", *subject.traits}
        assert set(controls(found)) == {name for name, when in RECEIPT.items() if when in there}
    assert json.dumps(seen[0]) == json.dumps(seen[1])


def test_a_limit_ends_its_call_and_nothing_else(subject: Subject, session: SessionInfo) -> None:
    run(subject, session, "sleep 1000 &")
    code = "(setsid sleep 999 &); sleep 998 & sleep 997"
    late = run(subject, session, code, limits={"wall": subject.duration(1)})
    assert outcome(late).cause == "wall_time"
    assert late.container is not None
    assert late.container.ended is None
    assert text(run(subject, session, COUNT)) == "1\n"


def test_a_checkpoint_has_the_files_of_that_moment(subject: Subject, session: SessionInfo) -> None:
    busy = "(while :; do echo x >> busy; mv busy b2; mv b2 busy; done) >/dev/null 2>&1 &"
    call = run(subject, session, f"echo kept > kept; {busy}")
    assert call.checkpoint_before == call.checkpoint_after == session.head.digest
    made = subject.client.checkpoint_session(session.id)
    assert subject.client.session(session.id).head.digest == made.digest
    assert text(run(subject, session, "rm kept; echo later > later; cat later")) == "later\n"
    subject.client.end_session(session.id, discard=True)
    assert text(subject.run(*sh("cat kept; ls later"), session=session.id)) == "kept\n"


def test_each_checkpoint_has_what_was_there_whatever_the_times_of_files_say(
    subject: Subject, session: SessionInfo
) -> None:
    code = "head -c 300000 /dev/urandom > big; touch -d @1000000000 big; sha256sum < big"
    found = []
    for change in (code, "echo x > other; sha256sum < big", code, f"rm big; {code}"):
        digest = text(run(subject, session, change))
        found.append((subject.client.checkpoint_session(session.id), digest))
    assert len({one.digest for one, _ in found}) == 4
    assert len({digest for _, digest in found}) == 3
    subject.client.end_session(session.id)
    for one, digest in found:
        subject.client.rollback_session(session.id, one.id)
        assert text(subject.run(*sh("sha256sum < big"), session=session.id)) == digest


@needs("the engine's processes on this host")
def test_files_of_one_that_dies_between_calls_are_kept(subject: Subject, session: SessionInfo) -> None:
    word = f"conformance-{uuid.uuid4().hex}"
    first = run(
        subject, session, f"echo kept > kept; sh -c 'while :; do sleep 1; done' {word} >/dev/null 2>&1 &"
    )
    process = os.pidfd_open(Traces.of(word).first)
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        assert select.select([process], [], [], subject.seconds(30))[0]
    finally:
        os.close(process)
    after = run(subject, session, f"cat kept; {COUNT}")
    assert text(after) == "kept\n0\n"
    assert after.checkpoint_before != session.head.digest
    assert after.container is not None
    assert after.container.lost is not None
    assert after.container.lost.since == first.id
    assert "its files were kept" in after.container.lost.why


def test_its_end_is_the_end_of_everything_in_it(subject: Subject, session: SessionInfo) -> None:
    run(subject, session, "echo kept > kept; sleep 1000 &")
    assert subject.client.end_session(session.id).container is None
    after = run(subject, session, f"cat kept; {COUNT}")
    assert text(after) == "kept\n0\n"
    assert after.container is not None
    assert after.container.since == after.id


def test_a_call_that_does_not_go_with_it_is_refused(subject: Subject, session: SessionInfo) -> None:
    run(subject, session, "true")
    with pytest.raises(errors.ContainerLive):
        subject.run("true", session=session.id)
    with pytest.raises(errors.InvalidRequest):
        subject.run("true", policy="kept")
