"""Events of calls that were changed on the disk: a header vouches for them, and a bundle has them."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd.journal import proof, schema, signing
from sandboxd.journal.index import DETAIL, RECORD_SIZE, SUMMARY, Index, Record
from sandboxd.journal.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon

    from sandboxd.journal.verify import VerifyReport

SANDBOXD = Path(sys.executable).with_name("sandboxd")


def header_of(daemon: Daemon, id_: str) -> dict[str, dict[str, dict[str, object]]]:
    with closing(schema.connect_reader(daemon.state / "journal.sqlite3")) as connection:
        (data,) = connection.execute("SELECT header FROM records WHERE id = ?", (id_,)).fetchone()
    found: dict[str, dict[str, dict[str, object]]] = json.loads(data)
    return found


def checked(daemon: Daemon) -> VerifyReport:
    with closing(schema.connect_reader(daemon.state / "journal.sqlite3")) as connection:
        return verify(
            connection, keys={signing.key_id(one) for one in signing.known(daemon.state)}, deep=daemon.state
        )


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def lengthen(directory: Path, data: bytes, kind: int = DETAIL) -> None:
    """One more event, with a right checksum."""
    details = directory / "details"
    record = Record(1, details.stat().st_size, len(data), kind).checked(data)
    with details.open("ab") as file:
        file.write(data)
    with (directory / "events").open("ab") as file:
        file.write(record.pack())


def told_otherwise(directory: Path, old: bytes, new: bytes, kind: int) -> None:
    """Change what the last record of a kind says, checksum and all."""
    index = Index(directory)
    count = index.count()
    records = list(index.records(0, count))
    number = max(n for n, record in enumerate(records) if record.kind == kind)
    record = records[number]
    data = index.read("details", record.size, record.offset)
    assert old in data
    changed = data.replace(old, new)
    with (directory / "details").open("r+b") as file:
        file.seek(record.offset)
        file.write(changed)
    with (directory / "events").open("r+b") as file:
        file.seek(number * RECORD_SIZE)
        file.write(record.checked(changed).pack())


DAMAGE: dict[str, Callable[[Path], object]] = {
    "events was changed": lambda one: flip(one / "events", 3),
    "details was changed": lambda one: flip(one / "details", 12),
    "events is gone": lambda one: (one / "events").unlink(),
    "details is gone": lambda one: (one / "details").unlink(),
    "details was changed: it has": lambda one: (one / "details").write_bytes(b""),
    "the events go on behind the last": lambda one: (one / "events").write_bytes(
        (one / "events").read_bytes() + b"zz\n"
    ),
    "the events go on behind the last of them": lambda one: lengthen(
        one, b'{"seq":9,"at":1,"type":"started"}'
    ),
    "tells of another outcome": lambda one: told_otherwise(one, b'"exit_code":3', b'"exit_code":0', DETAIL),
    "a summary of another stdout": lambda one: told_otherwise(one, b'"size":4', b'"size":5', SUMMARY),
}


def test_events_of_a_call_are_vouched_for(daemon_factory: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = daemon_factory()
    silent = daemon.run("true")
    assert "events" not in header_of(daemon, silent.id)
    calls = [daemon.run("sh", "-c", "echo out; echo err >&2; exit 3") for _ in range(len(DAMAGE) + 1)]
    daemon.stop()
    assert (checked(daemon).damaged, checked(daemon).problem) == ([], None)
    for call, (expected, damage) in zip(calls, DAMAGE.items(), strict=False):
        directory = daemon.state / "calls" / call.id
        kept = {path: path.read_bytes() for path in directory.iterdir()}
        damage(directory)
        found = [one for one in checked(daemon).damaged if one.id == call.id]
        assert any(expected in one.what for one in found), (expected, found)
        for path, data in kept.items():
            path.write_bytes(data)
    flip(daemon.state / "calls" / calls[-1].id / "details", -3)  # as the power may leave it: it is made again
    assert checked(daemon).damaged == []
    check_bundle(daemon, calls[-1].id, tmp_path / "bundle.tar")


def check_bundle(daemon: Daemon, call: str, bundle: Path) -> None:
    """It has the events up to the outcome, and nobody changes them."""
    done = subprocess.run(
        [SANDBOXD, "journal", "export", call, "-o", bundle, "--state", daemon.state],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert proof.check(bundle).ok
    whole = bundle.read_bytes()
    for name in ("events", "details"):
        said = header_of(daemon, call)["events"][name]
        member = f"calls/{call}/{name}\0".encode()
        assert whole.count(member) == 1
        at = whole.index(member) + 512
        bundle.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        damaged = proof.check(bundle).damaged
        assert [f"calls/{call}/{name} was changed" in one for one in damaged] == [True]
        assert str(said["digest"]) in damaged[0]
