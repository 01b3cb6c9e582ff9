"""Output: too much, to readers that do not read, after the end, and never lost or mixed up."""

from __future__ import annotations

import hashlib
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import psutil
from daemons import PATIENCE

from sandboxd.models import Cause

if TYPE_CHECKING:
    from daemons import Daemon

    from sandboxd.models import Invocation

GIGABYTE = 2**30
MAX_RESIDENT_GROWTH = 48 * 2**20


def ended(found: Invocation, code: int = 0) -> Invocation:
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.exit_code) == (Cause.EXITED, code), (
        found.outcome,
        found.stderr,
    )
    return found


def test_a_gigabyte_to_a_reader_that_stalls(daemon: Daemon) -> None:
    process = psutil.Process(daemon.process.pid)
    before, most = process.memory_info().rss, 0
    client = daemon.client()
    with client.stream(["sh", "-c", f"yes | head -c {GIGABYTE}; echo $? >&2"], policy="loud") as stalled:
        first = next(stalled)
        assert first.id is not None
        until = time.monotonic() + 90
        while (now := client.get(first.id)).state != "ended":  # the tool is not held up by who does not read
            assert time.monotonic() < until, now.state
            most = max(most, process.memory_info().rss)
            time.sleep(0.05)
        assert most - before < MAX_RESIDENT_GROWTH, f"{(most - before) >> 20} MiB"
        ended(now)
        assert now.stdout is not None
        assert (now.stdout.size, now.stdout.truncated, now.stdout.dropped) == (GIGABYTE, False, 0)
        digest = hashlib.sha256()
        for _ in range(GIGABYTE // (1 << 20)):
            digest.update(b"y\n" * (1 << 19))
        assert now.stdout.digest == f"sha256:{digest.hexdigest()}"
        # Who wakes up again finds every byte, in order.
        offset = 0
        for event in stalled:
            if event.stream == "stdout":
                assert event.offset == offset
                assert event.data is not None
                offset += len(event.data.decode())
                if offset > 64 * 2**20:
                    break
    assert process.memory_info().rss - before < MAX_RESIDENT_GROWTH


def test_output_over_its_cap_is_cut_and_said_so(daemon: Daemon) -> None:
    found = ended(daemon.run("sh", "-c", "head -c 3000000 /dev/zero; head -c 2000000 /dev/zero >&2; exit 0"))
    for stream, made in ((found.stdout, 3_000_000), (found.stderr, 2_000_000)):
        assert stream is not None
        assert (stream.size, stream.truncated, stream.dropped) == (2**20, True, made - 2**20)
        assert stream.digest == f"sha256:{hashlib.sha256(bytes(2**20)).hexdigest()}"
    assert {(limit.limit, limit.ended) for limit in found.limits_reached} == {
        ("stdout", False),
        ("stderr", False),
    }
    assert found.usage is not None
    assert found.usage.stdout == found.usage.stderr == 2**20


def test_output_exactly_at_its_cap_is_not_cut(daemon: Daemon) -> None:
    found = ended(daemon.run("sh", "-c", f"head -c {2**20} /dev/zero"))
    assert found.stdout is not None
    assert (found.stdout.size, found.stdout.truncated, found.limits_reached) == (2**20, False, [])


def test_output_over_a_cap_that_ends_the_call(daemon: Daemon) -> None:
    found = daemon.run("yes", policy="strict")
    assert found.outcome is not None
    assert found.outcome.cause is Cause.OUTPUT
    assert [(limit.limit, limit.ended) for limit in found.limits_reached] == [("stdout", True)]
    assert found.stdout is not None
    assert found.stdout.size == 256 * 1024
    assert found.outcome.exit_status() == 124


def test_endless_output_ends_at_the_deadline(daemon: Daemon) -> None:
    found = daemon.run("sh", "-c", "yes & yes >&2 & yes", limits={"wall": "500ms"})
    assert found.outcome is not None
    assert found.outcome.cause is Cause.WALL_TIME
    assert found.stdout is not None
    assert found.stdout.truncated


def test_a_tool_that_closes_its_output_runs_on(daemon: Daemon) -> None:
    found = ended(daemon.run("bash", "-c", "echo before; exec >&- 2>&-; sleep 0.2; echo after; exit 6"), 6)
    assert found.stdout is not None
    assert found.stdout.text == "before\n"
    assert found.usage is not None
    assert found.usage.wall > 150_000


def test_output_can_be_reopened_and_is_one_stream(daemon: Daemon) -> None:
    code = "echo a; echo b > /dev/stdout; echo c > /proc/self/fd/1; echo d | tee /dev/stderr; "
    code += "truncate -s 0 /dev/stdout; echo e"
    found = daemon.run("sh", "-c", code)
    assert found.stdout is not None
    assert found.stderr is not None
    assert found.stdout.text == "a\nb\nc\nd\ne\n"
    assert (found.stderr.text or "").startswith("d\n")


def test_no_other_stream_can_be_read_back(daemon: Daemon) -> None:
    found = ended(
        daemon.run(
            "bash",
            "-c",
            "echo mine; timeout 0.2 cat <&1 >/dev/null; timeout 0.2 cat /dev/stdout >/dev/null; exit 0",
        )
    )
    assert found.stdout is not None
    # A pipe that it owns can be opened for reading, so a tool may swallow its own output, and nobody's else.
    assert found.stdout.text in {"mine\n", ""}


def test_bytes_of_every_kind_arrive(daemon: Daemon) -> None:
    found = ended(daemon.run("perl", "-e", "binmode STDOUT; print pack('C*', 0..255) x 100"))
    assert found.stdout is not None
    assert found.stdout.text is None
    assert found.stdout.decode() == bytes(range(256)) * 100


def test_terminal_escapes_in_output_and_arguments_do_no_harm_to_the_journal(daemon: Daemon) -> None:
    found = ended(daemon.run("printf", r"\033]0;x\007\r\n%s", "\x1b[2J\r\n", labels={"a": "\x1b[31m\n"}))
    again = daemon.client().get(found.id)
    assert again.argv == found.argv
    assert again.stdout == found.stdout
    assert "\x1b" not in daemon.log.read_text()


def test_a_reader_that_goes_away_cancels_its_call(daemon: Daemon) -> None:
    client = daemon.client()
    with client.stream(["sh", "-c", "yes"], limits={"wall": "30s"}) as stream:
        call = next(stream).id
        assert call is not None
    assert client.wait(call, timeout=10 * PATIENCE).outcome is not None
    outcome = client.get(call).outcome
    assert outcome is not None
    assert outcome.cause is Cause.CANCELLED


def test_many_stalled_readers_of_one_call(daemon: Daemon) -> None:
    process = psutil.Process(daemon.process.pid)
    before = process.memory_info().rss
    client = daemon.client()
    call = client.start(["sh", "-c", "yes | head -c 50M"], policy="loud")
    with ExitStack() as stack:
        events = [stack.enter_context(client.events(call.id)) for _ in range(20)]
        bodies = [stack.enter_context(client.stdout(call.id, follow=True)) for _ in range(20)]
        heads = [len(next(body)) for body in bodies]
        for one in events:
            assert next(one).type == "accepted"
        ended(client.wait(call.id, timeout=60 * PATIENCE))
        assert process.memory_info().rss - before < MAX_RESIDENT_GROWTH
        assert heads[-1] + sum(map(len, bodies[-1])) == 50 * 2**20


def test_a_million_tiny_writes_are_no_million_events(daemon: Daemon) -> None:
    found = ended(daemon.run("perl", "-e", "syswrite(STDOUT, 'x') for 1..300000"))
    assert found.stdout is not None
    assert found.stdout.size == 300_000
    spool = daemon.state / "calls" / found.id
    assert sum(path.stat().st_size for path in spool.iterdir()) < 2 * 2**20
