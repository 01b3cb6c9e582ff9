"""Streams: what goes in and comes out, in which order, how much of it, and from where it can be resumed."""

from __future__ import annotations

import hashlib
import os
import time
from typing import TYPE_CHECKING

import pytest

from sandboxd import errors
from sandboxd.conformance.case import outcome, text
from sandboxd.conformance.policies import PREFIX

if TYPE_CHECKING:
    from sandboxd.conformance.subject import Subject

MIB = 2**20
COPY = ["sh", "-c", "cat; echo end >&2"]
EVERY_BYTE = bytes(range(256)) * 40


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.mark.parametrize(
    "data", [b"", b"text\n", b"\0\xff\xfe\n\r", EVERY_BYTE, os.urandom(3 * MIB)], ids=len
)
def test_standard_input_of_bytes(subject: Subject, data: bytes) -> None:
    found = subject.run(*COPY, policy="loud", stdin=data)
    assert found.stdout is not None
    assert (found.stdout.size, found.stdout.digest) == (len(data), digest(data))
    with subject.client.stdout(found.id) as chunks:
        assert b"".join(chunks) == data
    assert text(found, "stderr") == "end\n"


def test_no_standard_input_is_an_empty_one(subject: Subject) -> None:
    found = subject.run("sh", "-c", "cat | wc -c; [ -t 0 ] || echo no terminal")
    assert text(found) == "0\nno terminal\n"


def test_standard_input_that_is_sent_while_it_runs(subject: Subject) -> None:
    call = subject.start("sh", "-c", "while read line; do echo got $line; done", stdin="stream")
    client = subject.client
    offset = client.write_stdin(call.id, b"one\n", eof=False)
    subject.until(lambda: b"".join(client.stdout(call.id)) == b"got one\n", "the first line is answered")
    assert client.get(call.id).state == "running"
    assert client.write_stdin(call.id, [b"two", b"\nthr"], offset=offset, eof=False) == 11
    assert client.write_stdin(call.id, b"two", offset=offset, eof=False) == 11  # sent again: not taken again
    with pytest.raises(errors.StateConflict):
        client.write_stdin(call.id, b"a gap", offset=12, eof=False)
    client.write_stdin(call.id, b"ee\n", offset=11)
    found = subject.wait(call)
    assert text(found) == "got one\ngot two\ngot three\n"
    assert client.write_stdin(call.id, b"ee\n", offset=11) == 14  # as if the answer to it was lost
    assert found.stdin_taken == 14
    with pytest.raises(errors.CallEnded) as caught:
        client.write_stdin(call.id, b"late", offset=14)
    assert caught.value.details["offset"] == 14


@pytest.mark.parametrize("argv", [["true"], ["sh", "-c", "exec <&-; echo on"]])
def test_standard_input_that_nobody_reads(subject: Subject, argv: list[str]) -> None:
    assert outcome(subject.run(*argv, stdin=os.urandom(2 * MIB))).exit_code == 0


def test_binary_output_is_base64_and_text_is_text(subject: Subject) -> None:
    found = subject.run("sh", "-c", r"printf 'gr\303\274n'; printf '\377' >&2")
    assert found.stdout is not None
    assert found.stderr is not None
    assert (found.stdout.text, found.stdout.base64) == ("grün", None)
    assert (found.stderr.text, found.stderr.decode()) == (None, b"\xff")


def test_a_lot_of_output_is_whole(subject: Subject) -> None:
    found = subject.run("sh", "-c", "seq 1 2000000; echo done >&2", policy="loud")
    expected = b"".join(b"%d\n" % number for number in range(1, 2_000_001))
    assert found.stdout is not None
    assert not found.stdout.complete
    assert (found.stdout.size, found.stdout.digest) == (len(expected), digest(expected))
    assert found.limits_reached == []
    with subject.client.stdout(found.id) as chunks:
        assert b"".join(chunks) == expected
    with subject.client.stdout(found.id, offset=len(expected) - 9) as chunks:
        assert b"".join(chunks) == expected[-9:]
    assert found.stdout.text is not None
    assert expected.startswith(found.stdout.text.encode())


def test_events_are_numbered_in_order_and_can_be_resumed(subject: Subject) -> None:
    code = "for n in 1 2 3 4 5; do echo out $n; echo err $n >&2; sleep 0.05; done"
    with subject.client.stream(["sh", "-c", code], policy=PREFIX + "plain") as stream:
        events = list(stream)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.type for event in events[:2]] == ["accepted", "started"]
    assert events[-1].type == "ended"
    assert {event.type for event in events[2:-1]} == {"output"}
    assert [event.at for event in events] == sorted(event.at for event in events)
    for name, word in (("stdout", "out"), ("stderr", "err")):
        offset, whole = 0, b""
        for event in events:
            if event.stream == name:
                assert event.offset == offset
                assert event.data is not None
                whole += event.data.decode()
                offset = len(whole)
        assert whole.decode() == "".join(f"{word} {number}\n" for number in range(1, 6))
    call = events[0].id
    assert call is not None
    for after in range(len(events)):
        with subject.client.events(call, after=after) as stream:
            assert list(stream) == events[after:]


def test_events_arrive_while_it_runs(subject: Subject) -> None:
    began = time.monotonic()
    with subject.client.stream(["sh", "-c", "echo first; sleep 60"], policy=PREFIX + "plain") as stream:
        event = next(event for event in stream if event.type == "output")
        assert event.data is not None
        assert event.data.text == "first\n"
    assert time.monotonic() - began < subject.seconds(20)


def test_limits_and_denials_are_events_too(subject: Subject) -> None:
    argv = ["sh", "-c", "unshare -U true; head -c 100000 /dev/zero"]
    with subject.client.stream(argv, policy=PREFIX + "cut") as stream:
        events = list(stream)
    last = events[-1].invocation
    assert last is not None
    assert [event.limit for event in events if event.limit] == last.limits_reached
    assert [event.denial for event in events if event.denial] == last.denials
    assert len(last.limits_reached) == len(last.denials) == 1


def test_a_reader_that_comes_later_or_breaks_off_misses_nothing(subject: Subject) -> None:
    call = subject.start("sh", "-c", "seq 1 20000; sleep 0.3; seq 20001 40000", policy="loud")
    expected = b"".join(b"%d\n" % number for number in range(1, 40_001))
    got = b""
    with subject.client.stdout(call.id, follow=True) as chunks:
        got += next(chunks)
    while len(got) < len(expected):
        with subject.client.stdout(call.id, offset=len(got), follow=True) as chunks:
            got += next(chunks)
    assert got == expected
    subject.wait(call)


def test_output_of_what_is_left_behind_is_whole_and_ends(subject: Subject) -> None:
    found = subject.run(
        "sh", "-c", "(while :; do echo x; done) & echo first >&2; sleep 0.2; exit 5", policy="loud"
    )
    assert outcome(found).exit_code == 5
    assert found.stdout is not None
    assert found.stdout.size > 0
    assert text(found, "stderr") == "first\n"


def test_closed_and_reopened_output(subject: Subject) -> None:
    code = "echo a; echo b > /dev/stdout; echo c > /proc/self/fd/1; exec >&- 2>&-; sleep 0.1; echo d; exit 6"
    found = subject.run("bash", "-c", code)
    assert (outcome(found).exit_code, text(found)) == (6, "a\nb\nc\n")


def test_many_calls_at_once_keep_their_output_apart(subject: Subject) -> None:
    calls = [subject.start("sh", "-c", f"for n in $(seq 1000); do echo {one}; done") for one in range(8)]
    for one, call in enumerate(calls):
        assert text(subject.wait(call, 60)) == f"{one}\n" * 1000
