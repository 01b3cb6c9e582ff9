"""Checkpoints of a container that a session keeps: what has not changed is shared with the one before."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import needs_containers
from living import live, living
from sessioned import layers, said, sh

from sandboxd import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

    from sandboxd.models import CheckpointInfo, SessionInfo

SANDBOXD = Path(sys.executable).with_name("sandboxd")
BIG = "head -c 2M /dev/urandom > big"
CHANGED = {
    "content, and its time was set back": (
        "touch -r big time; head -c 2M /dev/urandom | dd of=big conv=notrunc 2>/dev/null; touch -r time big;"
        " rm time"
    ),
    "one byte at its end": (
        "touch -r big time; printf x | dd of=big bs=1 seek=2097151 conv=notrunc 2>/dev/null;"
        " touch -r time big; rm time"
    ),
    "another file of its size and time": (
        "touch -r big time; mv big old; head -c 2M /dev/urandom > big; touch -r time big; rm old time"
    ),
    "its mode": "chmod 4711 big",
    "it is a directory": "rm big; mkdir big; echo x > big/file",
    "it is a symbolic link": "rm big; echo x > x; ln -s x big",
    "it is a FIFO": "rm big; mkfifo big",
    "it is gone": "rm big; echo x > x; ln x y",
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    needs_containers()
    with living(tmp_path_factory.mktemp("checkpoints")) as one:
        yield one


def layer_of(daemon: Daemon, checkpoint: CheckpointInfo) -> Path:
    layers(daemon)
    with closing(sqlite3.connect(f"file:{daemon.state}/journal.sqlite3?mode=ro", uri=True)) as journal:
        found = journal.execute("SELECT layer FROM checkpoints WHERE id = ?", (checkpoint.id,)).fetchone()
    return daemon.state / "sessions" / "layers" / str(found[0])


def is_shared(one: Path, other: Path, name: str = "big") -> bool:
    return (one / name).lstat().st_ino == (other / name).lstat().st_ino


def room(daemon: Daemon) -> int:
    """Bytes that all layers take, each file once."""
    found = {}
    for path in (daemon.state / "sessions" / "layers").rglob("*"):
        status = path.lstat()
        found[status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def verified(daemon: Daemon) -> None:
    layers(daemon)
    done = subprocess.run(
        [SANDBOXD, "journal", "verify", "--deep", "--json", "--state", str(daemon.state)],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"] is True


def test_a_large_file_is_on_disk_once_however_many_checkpoints_have_it(
    daemon: Daemon, session: SessionInfo
) -> None:
    client = daemon.client()
    live(daemon, session, BIG)
    digest = said(live(daemon, session, "sha256sum < big"))
    first = client.checkpoint_session(session.id)
    before = room(daemon)
    made = [first]
    for number in range(4):
        live(daemon, session, f"echo {number} >> log")
        made.append(client.checkpoint_session(session.id))
    assert len({one.digest for one in made}) == 5
    assert room(daemon) - before < 1 << 20
    paths = [layer_of(daemon, one) for one in made]
    assert all(is_shared(one, paths[0]) for one in paths)
    assert not is_shared(paths[4], paths[3], "log")
    ended = client.end_session(session.id)
    assert ended.head.id == made[4].id, "nothing has changed since"
    assert said(sh(daemon, session, "sha256sum < big; cat log", policy="plain")) == digest + "0\n1\n2\n3\n"
    verified(daemon)
    for number, one in enumerate(made):  # each has what was there when it was made
        client.rollback_session(session.id, one.id)
        log = "".join(f"{line}\n" for line in range(number))
        code = "sha256sum < big; cat log 2>/dev/null || true"
        assert said(sh(daemon, session, code, policy="plain")) == digest + log


@pytest.mark.parametrize("what", CHANGED)
def test_what_has_changed_is_not_shared(daemon: Daemon, session: SessionInfo, what: str) -> None:
    client = daemon.client()
    live(daemon, session, f"{BIG}; echo small > small; ln small same")
    before = said(live(daemon, session, "sha256sum < big"))
    first = client.checkpoint_session(session.id)
    assert said(live(daemon, session, CHANGED[what])) == ""
    show = "if [ -p big ]; then echo fifo; else stat -c '%A %Y' big; cat big/file big | sha256sum; fi 2>&1"
    after = said(live(daemon, session, show))
    second = client.checkpoint_session(session.id)
    one, other = layer_of(daemon, first), layer_of(daemon, second)
    assert is_shared(one, other, "small")
    assert (other / "small").samefile(other / "same")
    if what == "it is gone":
        assert not (other / "big").exists()
    else:
        assert not is_shared(one, other)
    verified(daemon)
    client.end_session(session.id)
    assert said(sh(daemon, session, show, policy="plain")) == after
    client.rollback_session(session.id, first.id)
    assert said(sh(daemon, session, "sha256sum < big", policy="plain")) == before


def test_what_is_written_through_a_mapping_is_not_shared(daemon: Daemon, session: SessionInfo) -> None:
    """No time of a file tells of that. What goes on writing is stopped while it is looked at."""
    client = daemon.client()
    writes = (
        "import mmap, os, sys\n"
        "file = open('big', 'r+b'); memory = mmap.mmap(file.fileno(), 0)\n"
        "before = os.stat('big')\n"
        "memory[1 << 20] ^= 0xff\n"
        "after = os.stat('big')\n"
        "print(before.st_mtime_ns == after.st_mtime_ns)\n"
        "sys.stdout.flush()\n"
        "if os.fork():\n"
        "    os._exit(0)\n"
        "os.setsid()\n"
        "number = 0\n"
        "while True:\n"
        "    number += 1\n"
        "    memory[0:8] = memory[-8:] = number.to_bytes(8, 'big')\n"
    )
    live(daemon, session, f"{BIG}; echo small > small", policy="snakes")
    made = [client.checkpoint_session(session.id)]
    assert said(daemon.run("python3", "-c", writes, policy="snakes", session=session.id)) == "True\n"
    made += [client.checkpoint_session(session.id) for _ in range(3)]
    paths = [layer_of(daemon, one) for one in made]
    for one, other in pairwise(paths):
        assert is_shared(one, other, "small")
        assert not is_shared(one, other)
    for one in paths[1:]:
        with (one / "big").open("rb") as file:
            begin = int.from_bytes(file.read(8), "big")
            file.seek(-8, os.SEEK_END)
            end = int.from_bytes(file.read(8), "big")
        assert begin - end in {0, 1}
    verified(daemon)
    client.end_session(session.id)


def test_a_checkpoint_that_is_forgotten_leaves_those_after_it_whole(
    daemon: Daemon, session: SessionInfo
) -> None:
    client = daemon.client()
    live(daemon, session, BIG)
    digest = said(live(daemon, session, "sha256sum < big"))
    first = client.checkpoint_session(session.id)
    gone = layer_of(daemon, first)
    live(daemon, session, "echo more > more; ln more again")
    second = client.checkpoint_session(session.id)
    assert is_shared(gone, layer_of(daemon, second))
    client.discard_session(session.id)
    assert [one.id for one in client.checkpoints(session.id).checkpoints] == [second.id, session.head.id]
    assert not gone.exists()
    verified(daemon)
    live(daemon, session, "echo yet > yet")
    third = client.checkpoint_session(session.id)
    assert is_shared(layer_of(daemon, second), layer_of(daemon, third))
    client.end_session(session.id)
    client.discard_session(session.id)
    assert layers(daemon) == {layer_of(daemon, third).name}
    assert said(sh(daemon, session, "sha256sum < big; cat more again yet", policy="plain")) == (
        f"{digest}more\nmore\nyet\n"
    )
    verified(daemon)


def test_what_is_shared_counts_in_each_checkpoint(daemon: Daemon) -> None:
    """Else forgetting the one that it was counted with would make room that is not there."""
    client = daemon.client()
    session = client.create_session(size="5MiB")
    live(daemon, session, BIG)
    client.checkpoint_session(session.id)
    size = client.session(session.id).size
    assert size > 2 << 20
    live(daemon, session, "echo x > x; ln x y")
    client.checkpoint_session(session.id)
    assert client.session(session.id).size == size + 4096
    client.discard_session(session.id)
    assert client.session(session.id).size == size + 4096
    live(daemon, session, "head -c 4M /dev/urandom > more")
    with pytest.raises(errors.QuotaExceeded):
        client.checkpoint_session(session.id)
    client.end_session(session.id, discard=True)
    client.delete_session(session.id)


def test_checkpoints_that_are_no_layer_yet_and_those_of_no_change(
    daemon: Daemon, session: SessionInfo
) -> None:
    """What comes after is shared with the last one that is on disk as files."""
    client = daemon.client()
    live(daemon, session, BIG)
    first = client.checkpoint_session(session.id)
    assert client.checkpoint_session(session.id).id == first.id, "nothing has changed: its files go again"
    live(daemon, session, "cp -p big /tmp; rm big; echo x > x")  # so small that it is in the journal first
    second = client.checkpoint_session(session.id)
    live(daemon, session, "cp -p /tmp/big big; echo y > y")
    third = client.checkpoint_session(session.id)
    one, two, three = (layer_of(daemon, made) for made in (first, second, third))
    assert not (two / "big").exists()
    assert is_shared(one, three)
    assert not is_shared(two, three, "x")
    verified(daemon)


def test_the_next_container_shares_nothing_with_this_one(daemon: Daemon, session: SessionInfo) -> None:
    """Its checkpoints stand on those, and have only what it changed itself."""
    client = daemon.client()
    live(daemon, session, BIG)
    first = client.end_session(session.id).head
    live(daemon, session, "touch big; echo more >> big")
    second = client.end_session(session.id).head
    assert second.parent == first.id
    assert not is_shared(layer_of(daemon, first), layer_of(daemon, second))
    verified(daemon)
