"""Records: what a call left is found again, and comes to the same when it is run again."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

import pytest

from sandboxd import errors
from sandboxd.conformance.case import sh

if TYPE_CHECKING:
    from sandboxd.conformance.subject import Subject


def test_a_call_that_is_run_again_comes_to_the_same(subject: Subject) -> None:
    call = subject.run(
        *sh('cat in; cat; echo "$WORD" >&2; id -u; exit 5'), inputs={"in": "given\n"}, stdin=b"typed\n",
        env={"WORD": "said"},
    )  # fmt: skip
    replay = subject.client.replay(call.id)
    assert replay.differs == [], replay.differs
    assert {"stdout", "stderr", "exit_code", "plan", "policy", "image"} <= set(replay.same)
    assert replay.replayed.id != call.id


def test_what_is_not_the_same_is_told(subject: Subject) -> None:
    call = subject.run(*sh("head -c 16 /dev/urandom"))
    replay = subject.client.replay(call.id)
    assert [one.what for one in replay.differs] == ["stdout"]
    assert any(text.startswith("randomness") for text in replay.not_captured)


def test_the_calls_of_a_session_come_to_the_same_again(subject: Subject) -> None:
    """Each finds what those before it left now, and what a call changed in its session is compared."""
    client = subject.client
    session = client.create_session()
    try:
        for code in (
            "echo one >f; mkdir d",
            "cat f; mv f d/g; head -c 8 /dev/urandom >r",
            "cat d/g; ls -l d/g",
        ):
            subject.run(*sh(code), session=session.id)
        with client.replay_session(session.id) as events:
            *calls, last = events
    finally:
        client.delete_session(session.id)
    replays = [one.call.replay for one in calls if one.call is not None and one.call.replay is not None]
    differs = [{what.what for what in one.differs} for one in replays]
    assert differs[:2] == [set(), {"file r"}]
    assert {"file f", "file d"} <= set(replays[0].same)
    assert {"file f", "file d/g", "stdout"} <= set(replays[1].same)
    assert last.ended is not None
    assert last.ended.same + last.ended.differing == 3
    assert [one.id for one in client.sessions().sessions if one.id == session.id] == []


def test_an_ended_call_is_found_by_its_command_and_output(subject: Subject) -> None:
    word = "w" + hashlib.sha256(str(time.time_ns()).encode()).hexdigest()[:16]
    call = subject.run(*sh(f"echo out{word}; echo err{word} >&2"))
    until = time.monotonic() + subject.seconds(20)
    while not (found := subject.client.search(f"out{word}").hits) and time.monotonic() < until:
        time.sleep(0.1)
    assert [hit.id for hit in found] == [call.id]
    assert [hit.id for hit in subject.client.search(f"stderr : err{word}").hits] == [call.id]
    assert subject.client.search(f"out{word}", cause="memory").hits == []
    with pytest.raises(errors.InvalidRequest):
        subject.client.search('"')


def test_a_released_content_says_where_it_comes_from(subject: Subject) -> None:
    content = f"made at {time.time_ns()}\n".encode()
    call = subject.run(*sh("mkdir -p out; cat > out/a; cp out/a out/b"), policy="files", stdin=content)
    assert call.artifacts, call.withheld
    lineage = subject.client.lineage(call.artifacts[0].digest)
    assert lineage.digest == "sha256:" + hashlib.sha256(content).hexdigest()
    assert [(one.id, one.policy, one.image, one.plan) for one in lineage.calls] == [
        (call.id, call.policy, call.image, call.plan)
    ]
    assert lineage.calls[0].paths == ["out/a", "out/b"]
    with pytest.raises(errors.NotFound):
        subject.client.lineage("sha256:" + "0" * 64)


def test_files_are_held_back_by_what_they_are(subject: Subject) -> None:
    """By content, not by name; by count; and none that has what looks like a private key."""
    code = (
        "mkdir out; cd out; echo text > 1.png; printf '\\211PNG\\r\\n\\032\\n' > 2.txt; echo more > 3;"
        "printf 'GIF89a\\0' > image.png; echo '-----BEGIN PRIVATE KEY-----' > 0"
    )
    call = subject.run(*sh(code), policy="release")
    assert [file.path for file in call.artifacts] == ["out/1.png", "out/2.txt"]
    assert {one.path: one.reason for one in call.withheld} == {
        "out/0": "secret",
        "out/3": "too_many",
        "out/image.png": "type",
    }
