"""Files of sessions from outside: read, written on a condition, compared, out and in as a tar."""

from __future__ import annotations

import hashlib
import io
import tarfile
from typing import TYPE_CHECKING, Any

import pytest
from sessioned import by, layers, said, sh

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

    from sandboxd.models import SessionInfo


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def content(daemon: Daemon, session: SessionInfo, path: str, **fields: str) -> bytes:
    return b"".join(daemon.client().read_file(session.id, path, **fields))


def test_what_is_written_is_there_for_calls_and_what_calls_wrote_is_read(
    daemon: Daemon, session: SessionInfo
) -> None:
    client = daemon.client()
    first = client.write_file(session.id, "d/run", b"#!/bin/sh\necho ran\n", mode=0o755)
    assert first.digest == digest(b"#!/bin/sh\necho ran\n")
    assert first.checkpoint == client.session(session.id).head.digest
    assert said(sh(daemon, session, "d/run; stat -c '%u %a' d d/run; echo more >> d/run; ln -s run d/l")) == (
        "ran\n1000 755\n1000 755\n"
    )
    assert content(daemon, session, "d/run") == b"#!/bin/sh\necho ran\nmore\n"
    assert content(daemon, session, "d/run", checkpoint=first.checkpoint) == b"#!/bin/sh\necho ran\n"
    found = client.files(session.id, "d").files
    assert [(one.path, one.kind, one.target) for one in found] == [
        ("d/l", "symlink", "run"),
        ("d/run", "file", None),
    ]
    assert [one.path for one in client.files(session.id).files] == ["d"]
    for act in (
        lambda: content(daemon, session, "d/l"),  # no link is followed
        lambda: content(daemon, session, "d"),
        lambda: client.files(session.id, "d/run"),
        lambda: client.write_file(session.id, "d/l", b"x"),
        lambda: client.write_file(session.id, "d/run/x", b"x"),
        lambda: client.remove_file(session.id, "d"),
    ):
        with pytest.raises(errors.StateConflict):
            act()
    client.remove_file(session.id, "d/l")
    client.remove_file(session.id, "d", recursive=True)
    assert said(sh(daemon, session, "ls -A")) == ""
    for path in ("d", "../x", "d/run"):
        with pytest.raises((errors.NotFound, errors.InvalidRequest)):
            content(daemon, session, path)


def test_a_change_on_a_condition(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    one = client.write_file(session.id, "f", b"one", new=True)
    with pytest.raises(errors.PreconditionFailed) as caught:
        client.write_file(session.id, "f", b"two", new=True)
    assert caught.value.details["digest"] == one.digest
    two = client.write_file(session.id, "f", b"two", match=one.digest)
    before = layers(daemon)
    acts: list[Callable[[], Any]] = [
        lambda: client.write_file(session.id, "f", b"three", match=one.digest),
        lambda: client.remove_file(session.id, "f", match=one.digest),
        lambda: client.write_file(session.id, "g", b"x", match=one.digest),
    ]
    for act in acts:
        with pytest.raises(errors.PreconditionFailed):
            act()
    assert layers(daemon) == before
    assert content(daemon, session, "f") == b"two"
    client.remove_file(session.id, "f", match=two.digest)
    assert client.files(session.id).files == []


def test_what_differs(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    first = sh(daemon, session, "printf 'a\\nb\\n' > text; echo x > gone; mkdir d; chmod 700 d")
    sh(daemon, session, "printf 'a\\nc\\n' > text; rm gone; echo new > d/new; chmod 755 d; : > empty")
    found = client.diff(session.id, first.checkpoint_after, text=True)
    assert [(one.path, one.change, one.aspects) for one in found.changes] == [
        ("d", "changed", ["mode"]),
        ("d/new", "added", []),
        ("empty", "added", []),
        ("gone", "removed", []),
        ("text", "changed", ["content"]),
    ]
    text = next(one for one in found.changes if one.path == "text")
    assert text.diff == "--- a/text\n+++ b/text\n@@ -1,2 +1,2 @@\n a\n-b\n+c\n"
    assert (text.old_size, text.new_size) == (4, 4)
    assert (found.old, found.complete) == (first.checkpoint_after, True)
    assert {one.change for one in client.diff(session.id).changes} == {"added"}
    assert client.diff(session.id, found.new, found.new).changes == []
    few = client.diff(session.id, limit=2)
    assert (len(few.changes), few.complete) == (2, False)


def test_out_and_in_as_a_tar(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    first = sh(daemon, session, "mkdir -p a/b; echo x > a/b/f; ln a/b/f same; ln -s f a/b/l; echo y > gone")
    sh(daemon, session, "rm gone; echo z > new")
    whole = b"".join(client.export(session.id))
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        assert sorted(archive.getnames()) == ["a", "a/b", "a/b/f", "a/b/l", "new", "same"]
    changed = b"".join(client.export(session.id, since=first.checkpoint_after))
    with tarfile.open(fileobj=io.BytesIO(changed)) as archive:
        assert sorted(archive.getnames()) == [".wh.gone", "new"]
    other = client.fork_session(session.id, checkpoint=first.checkpoint_after)
    empty = client.create_session()
    try:
        assert client.import_tar(other.id, changed).entries == 2
        assert client.import_tar(empty.id, whole).entries == 6
        look = "find . -mindepth 1 | sort; cat a/b/l same new; stat -c %h same"
        assert (
            said(sh(daemon, other, look)) == said(sh(daemon, empty, look)) == said(sh(daemon, session, look))
        )
        before = client.session(empty.id).head.digest
        for bad in (b"garbage" * 100, _tar("../out"), _tar("/etc/x/../../../y")):
            with pytest.raises(errors.InvalidRequest):
                client.import_tar(empty.id, bad)
        assert client.session(empty.id).head.digest == before
    finally:
        client.delete_session(other.id)
        client.delete_session(empty.id)


def _tar(name: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return out.getvalue()


def test_files_count_to_quotas_and_are_the_callers_own(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    small = client.create_session(size="64KiB")
    try:
        with pytest.raises(errors.QuotaExceeded):
            client.write_file(small.id, "f", b"x" * (65 << 10))
        assert client.files(small.id).files == []
    finally:
        client.delete_session(small.id)
    with by(4242, daemon):
        other = daemon.client()
        acts: list[Callable[[], Any]] = [
            lambda: other.files(session.id),
            lambda: other.read_file(session.id, "f"),
            lambda: other.write_file(session.id, "f", b"x"),
            lambda: other.remove_file(session.id, "f"),
            lambda: other.diff(session.id),
            lambda: other.export(session.id),
            lambda: other.import_tar(session.id, _tar("x")),
        ]
        for act in acts:
            with pytest.raises(errors.NotFound):
                act()


def test_a_session_in_use_is_not_changed_and_one_that_is_read_is_not_removed(
    daemon: Daemon, session: SessionInfo
) -> None:
    client = daemon.client()
    client.write_file(session.id, "big", b"x" * (40 << 20))
    call = client.start(["sleep", "20"], policy="kept", session=session.id)
    with pytest.raises(errors.SessionBusy):
        client.write_file(session.id, "f", b"x")
    assert [one.path for one in client.files(session.id).files] == ["big"]
    client.cancel(call.id)
    with client.read_file(session.id, "big") as chunks:
        next(chunks)
        with pytest.raises(errors.SessionBusy):
            client.delete_session(session.id)


def test_the_command_line_of_files(daemon: Daemon, session: SessionInfo, tmp_path: Any) -> None:
    (tmp_path / "f").write_bytes(b"text\n")
    file = str(tmp_path / "f")
    assert "written: d/f" in daemon.sandboxd("session", "put", session.id, "d/f", "--from-file", file)
    assert "d/f" in daemon.sandboxd("session", "files", session.id, "d")
    assert daemon.sandboxd("session", "cat", session.id, "d/f") == "text\n"
    assert daemon.sandboxd("session", "diff", session.id, "--text").startswith("A d/\nA d/f\n--- /dev/null\n")
    (tmp_path / "tar").write_bytes(_tar("e"))
    assert "1 entries" in daemon.sandboxd(
        "session", "import", session.id, "--from-file", str(tmp_path / "tar")
    )
    assert "ustar" in daemon.sandboxd("session", "export", session.id)
    assert "removed: e" in daemon.sandboxd("session", "unlink", session.id, "e")
