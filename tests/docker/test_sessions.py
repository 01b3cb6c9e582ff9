"""Sessions with the other engine: the same files, the same lines of the receipt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from daemons import Daemon

    from sandboxd.models import Invocation


def run(daemon: Daemon, session: str, code: str) -> Invocation:
    names = {one.name for one in daemon.client().policies()}
    policy = "plain" if "plain" in names else "default"
    return daemon.client().run(["sh", "-c", code], policy=policy, session=session)


def test_files_are_there_for_the_next_call(docker_daemon: Daemon, daemon: Daemon) -> None:
    lines = []
    for one in (docker_daemon, daemon):
        client = one.client()
        session = client.create_session("docker")
        try:
            first = run(one, session.id, "echo one > f; mkdir -p a/b; touch a/b/c; ln f same; mkfifo fifo")
            assert first.outcome is not None
            assert first.outcome.exit_code == 0, first.outcome
            second = run(
                one, session.id, "cat f; stat -c '%u %g %h' f same; rm -r a; mkdir a; echo two > f; ls a"
            )
            assert second.stdout is not None
            assert second.stdout.text == "one\n1000 1000 2\n1000 1000 2\n", second.stderr
            third = run(one, session.id, "cat f; ls -A . a")
            assert third.stdout is not None
            assert third.stdout.text == "two\n.:\na\nf\nfifo\nsame\n\na:\n"
            assert third.receipt is not None
            lines.append({control.name: control for control in third.receipt.controls}["workspace"])
            assert client.rollback_session(session.id, session.head.id).size == 0
            empty = run(one, session.id, "ls -A")
            assert empty.stdout is not None
            assert empty.stdout.text == ""
        finally:
            client.delete_session(session.id)
    assert lines[0].in_force == lines[1].in_force
    assert all(line.enforced for line in lines)


@pytest.mark.parametrize("code", ["echo x > new; kill -9 $$", "echo x > new; sleep 60"])
def test_what_failed_leaves_nothing(docker_daemon: Daemon, code: str) -> None:
    client = docker_daemon.client()
    session = client.create_session()
    try:
        found = client.run(["sh", "-c", code], policy="plain", session=session.id, limits={"wall": "1s"})
        assert found.checkpoint_after == found.checkpoint_before == session.head.digest
        empty = run(docker_daemon, session.id, "ls -A")
        assert empty.stdout is not None
        assert empty.stdout.text == ""
    finally:
        client.delete_session(session.id)
