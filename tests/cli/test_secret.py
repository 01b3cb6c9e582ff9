"""``sandboxd secret`` against a real daemon: where a value may come from, and where it never is."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from daemons import SANDBOXD

if TYPE_CHECKING:
    from pathlib import Path

    from daemons import Daemon

CAT = "version: 1\nname: said\nextends: default\nsecrets: [{name: SAID, as: file}]\n"


def secret(daemon: Daemon, *argv: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [SANDBOXD, "secret", *argv, "--socket", str(daemon.socket)],
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def size_of(daemon: Daemon) -> object:
    """How many bytes the daemon has as the value of SAID: what it hands to a command."""
    (daemon.policies / "said.yaml").write_text(CAT)
    end = time.monotonic() + 20
    while "said" not in {policy.name for policy in daemon.client().policies()}:
        assert time.monotonic() < end
        time.sleep(0.05)

    def size() -> int:
        call = daemon.run("wc", "-c", "/run/secrets/SAID", policy="said")
        assert call.stdout is not None
        return int((call.stdout.text or "0").split()[0])

    yield size
    (daemon.policies / "said.yaml").unlink()
    secret(daemon, "rm", "SAID")


def test_set_rotate_ls_rm(daemon: Daemon) -> None:
    found = secret(daemon, "ls")
    assert (found.returncode, found.stdout) == (0, b"")
    assert b"no secrets yet" in found.stderr
    found = secret(daemon, "set", "TOKEN", stdin=b"the first value")
    assert (found.returncode, found.stdout) == (0, b"stored: TOKEN, version 1\n")
    found = secret(daemon, "set", "TOKEN", "--json", stdin=b"the second value")
    assert found.returncode == 1
    assert json.loads(found.stdout)["code"] == "state_conflict"
    found = secret(daemon, "rotate", "TOKEN", "--json", stdin=b"the second value")
    assert json.loads(found.stdout)["version"] == 2
    found = secret(daemon, "ls")
    assert [line.split()[:2] for line in found.stdout.decode().splitlines()[2:]] == [["TOKEN", "2"]]
    found = secret(daemon, "ls", "--json")
    (one,) = json.loads(found.stdout)["secrets"]
    assert sorted(one) == ["created", "name", "rotated", "version"]
    assert secret(daemon, "rm", "TOKEN", "--json").stdout == b'{\n  "removed": "TOKEN"\n}\n'
    assert secret(daemon, "rm", "TOKEN").returncode == 1
    assert secret(daemon, "rotate", "TOKEN", stdin=b"the third value").returncode == 1


@pytest.mark.parametrize(
    ("stdin", "size"),
    [(b"0123456789", 10), (b"0123456789\n", 10), (b"0123456789\n\n", 12), (b"01234\n56789\n", 12)],
)
def test_the_newline_of_echo_is_no_part_of_a_value(
    daemon: Daemon, size_of: object, stdin: bytes, size: int
) -> None:
    assert secret(daemon, "set", "SAID", stdin=stdin).returncode == 0
    assert size_of() == size  # type: ignore[operator]


def test_a_file_is_taken_byte_for_byte(daemon: Daemon, size_of: object, tmp_path: Path) -> None:
    file = tmp_path / "value"
    file.write_bytes(b"0123456789\n")
    assert secret(daemon, "set", "SAID", "--from-file", str(file)).returncode == 0
    assert size_of() == 11  # type: ignore[operator]
    file.write_bytes(b"x" * 65_537)
    found = secret(daemon, "rotate", "SAID", "--from-file", str(file))
    assert (found.returncode, b"65536" in found.stderr) == (1, True)
    assert secret(daemon, "rotate", "SAID", "--from-file", str(tmp_path / "none")).returncode == 1


def test_no_value_is_taken_from_the_command_line(daemon: Daemon) -> None:
    assert secret(daemon, "set", "TOKEN", "the value").returncode == 2
    assert secret(daemon, "set", "TOKEN", "--value", "the value").returncode == 2


def typed(daemon: Daemon, *lines: bytes) -> tuple[int, bytes]:
    """What is shown on a terminal on which these lines are typed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(SANDBOXD, [str(SANDBOXD), "secret", "set", "SAID", "--socket", str(daemon.socket)])
    shown, left = b"", list(lines)
    while True:
        ready, _, _ = select.select([terminal], [], [], 20)
        assert ready, shown
        try:
            data = os.read(terminal, 4096)
        except OSError:  # EIO: it has ended
            break
        if not data:
            break
        shown += data
        if left and shown.endswith((b"(not shown): ", b"Once more: ")):
            os.write(terminal, left.pop(0) + b"\n")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown


def test_what_is_typed_is_not_shown(daemon: Daemon, size_of: object) -> None:
    status, shown = typed(daemon, b"typed by hand", b"typed otherwise")
    assert (status, b"the two are not the same" in shown) == (1, True)
    status, shown = typed(daemon, b"typed by hand", b"typed by hand")
    assert (status, b"stored: SAID" in shown) == (0, True)
    assert b"typed by hand" not in shown
    assert size_of() == 13  # type: ignore[operator]
