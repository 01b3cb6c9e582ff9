"""Files: too many, too large, badly named, of the wrong kind, and changing while they are collected."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

import pytest
from daemons import PATIENCE

from sandboxd import errors
from sandboxd.artifacts import decode_path
from sandboxd.models import Cause

if TYPE_CHECKING:
    from pathlib import Path

    from daemons import Daemon
    from programs import Programs

    from sandboxd.models import Invocation


def ended(found: Invocation, code: int = 0) -> Invocation:
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.exit_code) == (Cause.EXITED, code), (
        found.outcome,
        found.stderr,
    )
    return found


def text(found: Invocation) -> str:
    assert found.stdout is not None
    return found.stdout.text or ""


def limits(found: Invocation) -> set[str]:
    return {limit.limit for limit in found.limits_reached}


def collected(
    daemon: Daemon, *argv: str, **options: object
) -> tuple[Invocation, dict[bytes, int], dict[bytes, str]]:
    """A call under a policy that releases every file: the call, sizes by path, reasons by path."""
    options.setdefault("policy", "files")
    found = daemon.run(*argv, **options)  # type: ignore[arg-type]
    released = {decode_path(one.path): one.size for one in found.artifacts}
    return found, released, {decode_path(one.path): one.reason for one in found.withheld}


def test_a_million_files_end_at_the_limit_of_inodes(daemon: Daemon, programs: Programs) -> None:
    began = time.monotonic()
    found = daemon.run("./files", "many", "1000000", inputs=programs.input("files"))
    assert limits(ended(found, 0)) == {"workspace.inodes"}
    made, number = text(found).split()
    assert number == "ENOSPC"
    assert 19_000 < int(made) < 20_000
    assert time.monotonic() - began < 30 * PATIENCE


def test_a_million_files_in_tmp(daemon: Daemon, programs: Programs) -> None:
    found = daemon.run("/workspace/files", "many", "1000000", inputs=programs.input("files"), cwd="/tmp")
    assert limits(ended(found)) == {"tmp"}
    made, number = text(found).split()
    assert (number, 9_000 < int(made) < 10_000) == ("ENOSPC", True)


def test_as_many_files_as_fit_are_too_many_to_collect(daemon: Daemon, programs: Programs) -> None:
    began = time.monotonic()
    found, released, _ = collected(daemon, "./files", "many", "15000", inputs=programs.input("files"))
    ended(found)
    assert len(released) == 1000
    assert found.withheld[-1].path == "."
    assert found.withheld[-1].reason == "too_many"
    assert len(found.withheld) < 1100
    assert time.monotonic() - began < 30 * PATIENCE


def test_a_sparse_terabyte_is_not_collected_and_not_read(daemon: Daemon) -> None:
    code = "truncate -s 1T huge; truncate -s 8E huger 2>/dev/null; truncate -s 4M fine; "
    code += "stat -c %s huge; du -k huge"
    began = time.monotonic()
    found, released, withheld = collected(daemon, "sh", "-c", code)
    assert text(ended(found)).split() == [str(2**40), "0", "huge"]
    assert released == {b"fine": 4 * 2**20}
    assert withheld[b"huge"] == "too_large"
    assert time.monotonic() - began < 10 * PATIENCE


def test_names_are_bytes(daemon: Daemon, tmp_path: Path) -> None:
    code = r"""
    printf a > "$(printf 'new\nline')"
    printf b > "$(printf 'bad\377\376utf8')"
    printf c > 'back\slash'
    printf d > "$(printf '%0255d' 0)"
    printf e > '%41'
    printf f > ' '
    printf g > '-rf'
    printf h > "$(printf '\033[31m')"
    mkdir -p '..a/...'; printf i > '..a/.../...'
    printf j > "$(printf '\303\274')"
    printf k > '*'
    printf l > '..\x'
    printf m > $'ends with\n'
    """
    found, released, withheld = collected(daemon, "bash", "-c", code)
    ended(found)
    expected = [
        b"new\nline", b"bad\xff\xfeutf8", b"back\\slash", b"0" * 255, b"%41", b" ", b"-rf", b"\x1b[31m",
        b"..a/.../...", "ü".encode(), b"*", b"..\\x", b"ends with\n",
    ]  # fmt: skip
    assert released == dict.fromkeys(expected, 1)
    assert withheld == {}
    saved = daemon.client().save_artifacts(found.id, tmp_path)
    assert len(saved) == len(expected)
    contents = sorted(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"".join(contents) == b"abcdefghijklm"


def test_a_deep_tree(daemon: Daemon, programs: Programs) -> None:
    began = time.monotonic()
    found, released, withheld = collected(daemon, "./files", "deep", "3000", inputs=programs.input("files"))
    assert text(ended(found)) == "3000 0\n"
    assert b"files" in released
    assert set(withheld.values()) <= {"name"}
    assert time.monotonic() - began < 30 * PATIENCE


def test_only_regular_files_are_released(daemon: Daemon) -> None:
    code = """
    ln -s /etc/passwd link; ln -s . loop; ln -s /proc/self/environ magic; ln -s nowhere broken; ln -s /dev dir
    mkfifo fifo; echo x > one; ln one two; mkdir d; ln -s ../one d/back
    perl -e 'use Socket; socket(S, AF_UNIX, SOCK_STREAM, 0); bind(S, pack_sockaddr_un("sock")) or die $!'
    ln -s /dev/zero d/zero; mknod d/null c 1 3 2>/dev/null; true
    """
    found, released, withheld = collected(daemon, "bash", "-c", code)
    ended(found)
    assert released == {b"one": 2, b"two": 2}
    links = [b"link", b"loop", b"magic", b"broken", b"dir", b"d/back", b"d/zero"]
    assert withheld == dict.fromkeys(links, "symlink") | {b"fifo": "not_regular", b"sock": "not_regular"}
    assert [denial.name for denial in found.denials] in [["mknodat"], ["mknod"]]


def test_files_that_are_swapped_until_the_last_moment(daemon: Daemon, programs: Programs) -> None:
    """The tool has ended when its files are collected, but its children live until they are killed."""
    for _ in range(3):
        found, released, withheld = collected(daemon, "./files", "swap", inputs=programs.input("files"))
        assert set(released) <= {b"files", b"a", b"b", b"d/a"}
        assert set(withheld.values()) <= {"symlink", "not_regular"}
        for one in found.artifacts:
            if decode_path(one.path) != b"files":
                body = b"".join(daemon.client().artifact(found.id, one.path))
                assert body in {b"", b"inside\n"}


def test_a_container_full_of_processes_is_collected_from_like_any_other(daemon: Daemon) -> None:
    code = "for (1..100) { my $p = fork; sleep 100 if defined $p && !$p } open F, '>f'; print F qq(x\\n)"
    found, released, _ = collected(daemon, "perl", "-e", code)
    ended(found)
    assert released == {b"f": 2}
    assert "pids" in limits(found)


def test_what_is_released_is_what_the_tool_wrote(daemon: Daemon, tmp_path: Path) -> None:
    code = "head -c 3000000 /dev/urandom > x; sha256sum x; cp x y; chmod +x y"
    found, released, _ = collected(daemon, "sh", "-c", code)
    assert released == {b"x": 3_000_000, b"y": 3_000_000}
    digest = text(ended(found)).split()[0]
    daemon.client().save_artifacts(found.id, tmp_path)
    assert hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest() == digest
    assert {one.digest for one in found.artifacts} == {f"sha256:{digest}"}
    assert {one.path: one.executable for one in found.artifacts} == {"x": False, "y": True}


def test_what_a_policy_does_not_name_stays_inside(daemon: Daemon) -> None:
    code = "mkdir -p out; echo a > out/a; echo b > b; echo c > /tmp/c; ln -s ../b out/b; ln -s /tmp out/tmp"
    found, released, withheld = collected(daemon, "sh", "-c", code, policy="shell")
    ended(found)
    assert released == {b"out/a": 2}
    assert withheld == {b"out/b": "symlink", b"out/tmp": "symlink"}
    assert daemon.run("sh", "-c", code).artifacts == []  # default releases nothing
    _, released, _ = collected(daemon, "sh", "-c", code, policy="shell", artifacts=["out/x*"])
    assert released == {}
    _, released, _ = collected(daemon, "sh", "-c", code, policy="shell", artifacts=["**"])
    assert released == {b"out/a": 2}  # a request narrows, it does not widen


def test_no_artifact_can_be_asked_for_by_another_path(daemon: Daemon) -> None:
    found, _, _ = collected(daemon, "sh", "-c", "mkdir d; echo x > d/f")
    client = daemon.client()
    assert b"".join(client.artifact(found.id, "d/f")) == b"x\n"
    for path in ("d/../d/f", "../../etc/passwd", "/etc/passwd", "d", "d//f", "d/f/", "%64/f", "nothing", "."):
        with pytest.raises(errors.Refused):
            b"".join(client.artifact(found.id, path))


def test_locks_leases_and_watches_end_with_the_call(daemon: Daemon) -> None:
    code = "flock -n /usr/bin/env sleep 30 & flock -n /dev/null sleep 30 & sleep 0.2"
    ended(daemon.run("bash", "-c", code))
    code = "flock -n /usr/bin/env echo free && flock -n /dev/null echo free"
    assert text(ended(daemon.run("bash", "-c", code))) == "free\nfree\n"
