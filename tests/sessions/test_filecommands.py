"""The files of a session by the command line: listed, read, written on a condition, as layers of images."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pty
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sessioned import ask, said, sh

from sandboxd import errors

if TYPE_CHECKING:
    from daemons import Daemon

    from sandboxd.models import SessionInfo

SANDBOXD = str(Path(sys.executable).with_name("sandboxd"))


def run(
    daemon: Daemon, *arguments: str | bytes, stdin: bytes = b"", status: int = 0
) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [SANDBOXD, "session", *arguments],
        env=os.environ | {"SANDBOXD_SOCKET": str(daemon.socket)},
        input=stdin,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_a_file_is_put_listed_got_and_removed(daemon: Daemon, session: SessionInfo, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "mine").write_bytes(data)
    put = run(daemon, "put", session.id, "in/data", str(tmp_path / "mine"), "--mode", "750", "--new")
    assert put.stdout.decode() == digest(data) + "\n"
    assert said(sh(daemon, session, "stat -c '%a %s' in/data")) == f"750 {len(data)}\n"
    assert run(daemon, "get", session.id, "in/data").stdout == data
    run(daemon, "get", session.id, "in/data", "-o", str(tmp_path / "got"))
    assert (tmp_path / "got").read_bytes() == data
    run(daemon, "put", session.id, "in/empty", "--directory")
    listed = run(daemon, "files", session.id, "--recursive", "--digest", "--json")
    found = json.loads(listed.stdout)
    assert [(one["path"], one["kind"], one.get("digest")) for one in found["files"]] == [
        ("in", "directory", None),
        ("in/data", "file", digest(data)),
        ("in/empty", "directory", None),
    ]
    assert (found["truncated"], found["unnamed"]) == (False, 0)
    rows = run(daemon, "files", session.id, "in").stdout.decode()
    assert "-rwxr-x---" in rows
    assert "drwxr-xr-x" in rows
    run(daemon, "put", session.id, "typed", "-", stdin=b"from standard input")
    assert run(daemon, "get", session.id, "typed").stdout == b"from standard input"
    before = daemon.client().session(session.id).head.id
    run(daemon, "unlink", session.id, "in", "--recursive")
    assert run(daemon, "files", session.id, "in", status=1).stderr.startswith(b"sandboxd: the session has no")
    assert run(daemon, "get", session.id, "in/data", "--checkpoint", before).stdout == data


def test_conditions_hold(daemon: Daemon, session: SessionInfo) -> None:
    one = run(daemon, "put", session.id, "f", stdin=b"one").stdout.decode().strip()
    for arguments in (
        ("put", session.id, "f", "--new"),
        ("put", session.id, "f", "--if-match", digest(b"other")),
        ("unlink", session.id, "f", "--if-match", digest(b"other")),
    ):
        failed = run(daemon, *arguments, "--json", stdin=b"two", status=1)
        assert json.loads(failed.stdout)["code"] == "precondition_failed"
        assert json.loads(failed.stdout)["details"]["digest"] == one
    two = run(daemon, "put", session.id, "f", "--if-match", one, stdin=b"two").stdout.decode().strip()
    run(daemon, "unlink", session.id, "f", "--if-match", two)
    wrong: tuple[tuple[tuple[str, ...], bytes], ...] = (
        (("put", session.id, "f", "--mode", "9"), b"three octal digits"),
        (("put", session.id, "f", "--directory", "--mode", "755"), b"nothing else"),
        (("put", session.id, "f", "/nowhere/file"), b"/nowhere/file: No such file"),
        (("put", session.id, "../out"), b"sandboxd: "),
        (("get", session.id, "gone"), b"the session has no"),
        (("get", "nobody", "f"), b"no session"),
    )
    for command, words in wrong:
        assert words in run(daemon, *command, status=1).stderr


NAMES = {
    b"-rf": "-rf",
    b"--help": "--help",
    b"\x1b[31mred": "\x1b[31mred",
    b"new\nline": "new\nline",
    b"\xff": "%FF",
    b"100%41": "100%2541",
    b"with space": "with space",
    "\u202etxt.exe".encode(): "\u202etxt.exe",
}


def test_names_and_bytes_of_a_hostile_tool(daemon: Daemon, session: SessionInfo, tmp_path: Path) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in NAMES:
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name))
    run(daemon, "import", session.id, "--own", stdin=archive.getvalue())
    assert said(sh(daemon, session, "stat -c %u ./-rf")) == "1000\n"
    sh(
        daemon,
        session,
        "ln -s \"$(printf '/etc/\\033[2Jx')\" link; mkfifo pipe; mkdir deep; ln -s .. deep/up",
    )
    listed = run(daemon, "files", session.id, "--recursive")
    rows = listed.stdout.decode()
    assert not any(one in rows for one in ("\x1b", "\u202e"))
    assert "\\x1b[31mred" in rows
    assert "link -> /etc/\\x1b[2Jx" in rows
    assert "prw-" in rows
    for name, path in NAMES.items():
        assert b"".join(daemon.client().read_file(session.id, path)) == name
    for name in (b"-rf", b"--help", b"new\nline"):
        assert run(daemon, "get", session.id, "--", name).stdout == name
    assert run(daemon, "get", session.id, b"\xff").stdout == b"\xff"  # as the shell has it
    run(daemon, "unlink", session.id, "--", "-rf")
    for path in ("pipe", "deep/up/link"):
        assert run(daemon, "get", session.id, path, status=1).stdout == b""
    outside = tmp_path / "outside"
    failed = run(daemon, "get", session.id, "gone", "-o", str(outside), status=1)
    assert b"the session has no" in failed.stderr
    assert not outside.exists()


def test_a_terminal_is_shown_no_escapes(daemon: Daemon, session: SessionInfo) -> None:
    daemon.client().write_file(session.id, "f", "a\tb\n\x1b]0;title\x07é\r".encode() + b"\xff\n")
    main, side = pty.openpty()
    seen = bytearray()

    def read() -> None:
        try:
            while chunk := os.read(main, 4096):
                seen.extend(chunk)
        except OSError:  # EIO: nobody has the other side
            return

    reading = threading.Thread(target=read)
    reading.start()
    environ = os.environ | {"SANDBOXD_SOCKET": str(daemon.socket)}
    got = subprocess.run([SANDBOXD, "session", "get", session.id, "f"], stdout=side, env=environ, check=False)
    tar = subprocess.run(
        [SANDBOXD, "session", "export", session.id],
        stdout=side,
        stderr=subprocess.PIPE,
        env=environ,
        check=False,
    )
    os.close(side)
    reading.join()
    os.close(main)
    assert got.returncode == 0
    assert b"a\tb\r\n\\x1b]0;title\\x07\xc3\xa9\\r\\xff\r\n" in seen
    assert b"\x1b" not in seen
    assert (tar.returncode, b"nothing for a terminal" in tar.stderr) == (1, True)


def test_files_go_out_and_come_in_as_layers(daemon: Daemon, session: SessionInfo, tmp_path: Path) -> None:
    client = daemon.client()
    sh(daemon, session, "echo one >kept; echo two >gone; mkdir d; ln -s ../kept d/link; mkfifo d/p")
    first = client.session(session.id).head
    sh(daemon, session, "rm gone; echo three >d/new")
    whole = run(daemon, "export", session.id, "-o", str(tmp_path / "whole.tar"))
    assert whole.stdout == b""
    changed = run(daemon, "export", session.id, "--since", first.id).stdout
    with tarfile.open(fileobj=io.BytesIO(changed)) as tar:
        assert sorted(tar.getnames()) == [".wh.gone", "d/new"]
    other = client.create_session()
    try:
        made = run(daemon, "import", other.id, str(tmp_path / "whole.tar")).stdout.decode()
        assert made.split() == [client.session(other.id).head.id, client.session(other.id).head.digest]
        assert (
            said(sh(daemon, other, "ls; cat d/link d/new; stat -c %F d/p")) == "d\nkept\none\nthree\nfifo\n"
        )
        stale = run(daemon, "import", other.id, "--if-match", first.digest, "--json", stdin=changed, status=1)
        assert json.loads(stale.stdout)["code"] == "precondition_failed"
        head = client.session(other.id).head
        assert json.loads(stale.stdout)["details"]["digest"] == head.digest
        run(daemon, "import", other.id, "--if-match", head.digest, stdin=changed)
        assert client.session(other.id).head.parent == head.id
        standing = client.session(other.id).head.id
        end = len(changed.rstrip(b"\0")) // 512 * 512 + 512
        for bad in (b"no tar" * 200, changed[:515], b"", changed[:end], changed[: end + 512]):
            failed = run(daemon, "import", other.id, "--json", stdin=bad, status=1)
            assert json.loads(failed.stdout)["code"] == "invalid_request"
        assert client.session(other.id).head.id == standing
    finally:
        client.delete_session(other.id)


def test_lists_come_in_pages(daemon: Daemon, session: SessionInfo) -> None:
    """In the order of a walk, whatever sorts before a slash; each file once."""
    made = "for d in a a-b a/c 'a/c!' b; do mkdir $d; for n in 1 2 3; do echo $d >$d/$n; done; done"
    sh(daemon, session, made)
    client = daemon.client()
    whole = [one.path for one in client.session_files(session.id, recursive=True).files]
    assert len(whole) == 20
    for limit in (1, 3, 7):
        found: list[str] = []
        after = None
        while True:
            page = client.session_files(session.id, recursive=True, digest=True, after=after, limit=limit)
            found += [one.path for one in page.files]
            assert all(one.digest for one in page.files if one.kind == "file")
            after = page.next
            assert (after is not None) == page.truncated
            if after is None:
                break
        assert found == whole
    told = run(daemon, "files", session.id, "--recursive", "--limit", "4")
    assert b"there are more" in told.stderr
    bad = ask(daemon, "GET", f"{session.id}/files?after=%ed%a0%80")
    assert bad.status in {200, 400}
    with pytest.raises(errors.NotFound):
        client.session_files(session.id, "nowhere", after="x")
