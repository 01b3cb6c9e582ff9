"""Evidence bundles: they verify elsewhere, and nothing in them can be changed; hostile ones are refused."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import tarfile
import tracemalloc
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from journals import behind, record

from sandboxd import canonical, errors
from sandboxd.journal import Head, Journal, bundle, proof, schema, signing
from sandboxd.journal.chain import GENESIS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def made(tmp_path: Path, *numbers: int, everything: bool = False) -> tuple[Path, str]:
    """A bundle of some of six calls, and the id of the node's key."""
    state = tmp_path / "state"
    async with Journal.open(state) as journal:
        for number in range(6):
            await record(
                journal, state, stdout=b"output of %d\n" % number, files={"a": b"same", "b": b"%d" % number}
            )
        key = journal.key
    with closing(schema.connect_reader(state / "journal.sqlite3")) as connection:
        rows = bundle.select(connection, [], everything=True).calls
        ids = [rows[number][1] for number in numbers]
        chosen = bundle.select(connection, ids, everything=everything)
        done = bundle.export(connection, state, key, chosen, tmp_path / "bundle.tar")
    assert done.calls == (6 if everything else len(numbers))
    return tmp_path / "bundle.tar", key.id


async def test_a_bundle_verifies_without_its_state(tmp_path: Path) -> None:
    path, key = await made(tmp_path, 4, 2)
    shutil.rmtree(tmp_path / "state")
    report = proof.check(path, {key})
    assert report.ok, report
    assert (report.calls, report.records, report.head.n, report.key) == (2, 4, 6, key)
    assert report.files == 2 * 2 + 3  # bodies and streams; one artifact is the same
    assert report.absent == ["policy sha256:" + "ab" * 32]  # this journal was never told it
    assert [name for name, _ in members(path)][:3] == ["manifest.json", "key.pem", "records.jsonl"]
    assert proof.check(path).ok
    assert "signed with" in str(proof.check(path, {"sha256:" + "0" * 64}).problem)


async def test_all_calls_and_pruned_ones(tmp_path: Path) -> None:
    path, key = await made(tmp_path, everything=True)
    assert proof.check(path, {key}).calls == 6
    state = tmp_path / "state"
    behind(
        state, "UPDATE invocations SET doc = NULL, pruned = 1 WHERE id = (SELECT id FROM records WHERE n = 2)"
    )
    with closing(schema.connect_reader(state / "journal.sqlite3")) as connection:
        found = signing.NodeKey.load(signing.place_of(None, state, {}))
        bundle.export(connection, state, found, bundle.select(connection, [], everything=True), path)
        report = proof.check(path, {key})
        assert (report.ok, report.pruned) == (True, 1)
        with pytest.raises(errors.NotFound):
            bundle.select(connection, ["nope"])
        with pytest.raises(errors.NotFound):
            bundle.select(connection, [], session="nope")
        with pytest.raises(errors.InvalidRequest):
            bundle.export(connection, state, found, bundle.Chosen([], [], Head(0, GENESIS)), path)
        chosen = bundle.select(connection, [], everything=True)
        with pytest.raises(errors.HostFailed):
            bundle.export(connection, state, found, chosen, tmp_path / "no" / "such" / "place")
    assert sorted(os.listdir(tmp_path)) == ["bundle.tar", "state"]  # noqa: PTH208


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(one.name, tar.extractfile(one).read()) for one in tar]  # type: ignore[union-attr]


def written(path: Path, found: list[tuple[str, bytes]], **fields: object) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in found:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))
    return path


async def test_any_change_is_found(tmp_path: Path) -> None:
    """Each byte of each member matters; and so does each member."""
    path, key = await made(tmp_path, 1, 3)
    whole = members(path)
    assert proof.check(written(tmp_path / "same", whole), {key}).ok
    rng = random.Random(6)
    for index, (name, data) in enumerate(whole):
        for _ in range(8):
            at = rng.randrange(len(data))
            changed = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
            report = proof.check(
                written(tmp_path / "x", [*whole[:index], (name, changed), *whole[index + 1 :]]), {key}
            )
            assert not report.ok, (name, at)
        without = [*whole[:index], *whole[index + 1 :]]
        report = proof.check(written(tmp_path / "x", without), {key})
        if name.endswith("/body.json"):
            assert report.damaged, name
        else:
            assert not report.ok, name
        twice = [*whole[: index + 1], *whole[index:]]
        assert not proof.check(written(tmp_path / "x", twice), {key}).ok, name


async def test_damage_is_named_and_the_rest_is_checked(tmp_path: Path) -> None:
    path, key = await made(tmp_path, 1, 3)
    whole = [(name, b"else" if name.endswith("/stdout") else data) for name, data in members(path)]
    report = proof.check(written(tmp_path / "x", whole), {key})
    assert (report.problem, len(report.damaged), report.files) == (None, 2, 5)
    assert "/stdout was changed" in report.damaged[0]


async def test_records_are_not_dropped_or_moved(tmp_path: Path) -> None:
    path, key = await made(tmp_path, 1, 3)
    whole = dict(members(path))
    lines = whole["records.jsonl"].splitlines(keepends=True)
    changes: list[Callable[[], list[bytes]]] = [
        lambda: lines[:-1],
        lambda: [*lines[:1], *lines[2:]],
        lambda: [lines[1], lines[0], *lines[2:]],
        lambda: [*lines, lines[-1]],
        lambda: lines[1:],
        list,
    ]
    for change in changes:
        found = whole | {"records.jsonl": b"".join(change())}
        assert not proof.check(written(tmp_path / "x", list(found.items())), {key}).ok


async def test_a_bundle_of_another_node_is_not_ours(tmp_path: Path) -> None:
    """A forger signs a chain of their own with a key of their own: it holds in itself, under its id."""
    path, _ = await made(tmp_path, 1)
    other = signing.NodeKey.open(signing.KeyPlace(tmp_path / "other", own=True))
    report = proof.check(path, {other.id})
    assert "none of this node" in str(report.problem)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("../escape", {}),
        ("/etc/passwd", {}),
        ("blobs/" + "0" * 64, {}),
        ("calls/x/../../y", {}),
        ("calls/x/body.json", {}),
        ("policies/" + "0" * 63, {}),
        ("link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("hard", {"type": tarfile.LNKTYPE, "linkname": "manifest.json"}),
        ("dir", {"type": tarfile.DIRTYPE}),
        ("fifo", {"type": tarfile.FIFOTYPE}),
        ("x" * 99, {}),
    ],
)
async def test_hostile_members_are_refused(tmp_path: Path, name: str, fields: dict[str, object]) -> None:
    path, key = await made(tmp_path, 1)
    with tarfile.open(tmp_path / "x", "w", format=tarfile.USTAR_FORMAT) as tar:
        for each, data in members(path):
            member = tarfile.TarInfo(each)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        member = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(member, field, value)
        tar.addfile(member)
    assert "no bundle" in str(proof.check(tmp_path / "x", {key}).problem)


async def test_hostile_files_are_refused(tmp_path: Path) -> None:
    path, key = await made(tmp_path, 1)
    data, target = path.read_bytes(), tmp_path / "x"
    huge = bytearray(data)
    huge[124:136] = b"77777777777\0"  # the manifest claims 8 GiB
    huge[148:156] = b"%06o\0 " % (sum(huge[:148]) + sum(huge[156:512]) + 8 * 32)
    manifest = json.loads(members(path)[0][1])
    for wrong in (
        b"", b"\0" * 1024, b"x" * 5000, data[:-10240], data[: len(data) // 2], data + b"\0" * 20480,
        data + b"x", bytes(huge), b"\x1f\x8b" + data, b'{"a":' * 5000,
    ):  # fmt: skip
        target.write_bytes(wrong)
        assert proof.check(target, {key}).problem, wrong[:20]
    changes: list[dict[str, object]] = [
        {"calls": []}, {"calls": ["../x"]}, {"calls": [1]}, {"calls": manifest["calls"] * 2}, {"first": 0},
        {"first": -1}, {"first": "1"}, {"first": True}, {"v": 2}, {"head": None}, {"head": {}},
        {"calls": ["unknown"]},
    ]  # fmt: skip
    for change in changes:
        found = [("manifest.json", canonical.canonical(manifest | change)), *members(path)[1:]]
        assert proof.check(written(target, found), {key}).problem, change
    deep = [("manifest.json", b"[" * 100_000), *members(path)[1:]]
    assert proof.check(written(target, deep), {key}).problem
    with pytest.raises(errors.InvalidRequest):
        proof.check(tmp_path / "nonexistent")


async def test_a_manifest_of_very_many_values_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path, key = await made(tmp_path, 1)
    many = b'{"calls":[' + b"[]," * (5 << 20) + b"[]]}"
    written(tmp_path / "x", [("manifest.json", many), *members(path)[1:]])
    tracemalloc.start()
    try:
        assert "more than" in str(proof.check(tmp_path / "x", {key}).problem)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


async def test_what_is_not_there_of_a_pruned_call_is_named(tmp_path: Path) -> None:
    """Whoever takes all files of a call out makes it look pruned: the report says which ones they were."""
    path, key = await made(tmp_path, 1, 3)
    whole = members(path)
    ids = json.loads(whole[0][1])["calls"]
    rest = [(name, data) for name, data in whole if ids[0] not in name]
    own = canonical.digest_bytes(b"1")
    rest = [(name, data) for name, data in rest if name != f"blobs/{own[7:]}"]
    report = proof.check(written(tmp_path / "x", rest), {key})
    assert (report.ok, report.pruned) == (True, 1)
    assert report.gone == [f"{what} of call {ids[0]}" for what in ("body", "stdout", f"artifact {own}")]
