"""Policies follow their files: real edits, as editors make them, watched for real."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sandboxd import errors
from sandboxd.reload import PolicyStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

HEAD = "version: 1\nname: p\n"


def write(directory: Path, text: str, name: str = "p") -> Path:
    path = directory / f"{name}.yaml"
    path.write_text(text)
    return path


@asynccontextmanager
async def watching(store: PolicyStore) -> AsyncIterator[None]:
    task = asyncio.create_task(store.watch())
    await asyncio.sleep(0.1)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110, the store has no event, as nobody needs one
            await asyncio.sleep(0.02)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def test_a_bad_edit_keeps_the_last_good_policy(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + "limits: {pids: 10}\n")
    store = PolicyStore([tmp_path])
    good = store.current.get("p")
    path.write_text(HEAD + "limits: {pids: ten}\n")
    assert store.reload().get("p").digest == good.digest
    assert [(problem.file, problem.line) for problem in store.problems] == [(str(path), 3)]
    assert store.current.problems_of("p") == store.problems
    path.write_text(HEAD + "limits: {pids: 11}\n")
    assert store.reload().get("p").spec.limits.pids == 11
    assert store.problems == ()


def test_a_bad_parent_keeps_its_children(tmp_path: Path) -> None:
    write(tmp_path, HEAD + "limits: {pids: 10}\n")
    write(tmp_path, "version: 1\nname: q\nextends: p\n", "q")
    store = PolicyStore([tmp_path])
    write(tmp_path, "nonsense")
    store.reload()
    assert store.current.names() == ["p", "q"]
    assert {problem.code for problem in store.problems} == {"wrong_type", "bad_parent"}


def test_a_file_that_never_was_good_is_no_policy(tmp_path: Path) -> None:
    store = PolicyStore([tmp_path])
    write(tmp_path, HEAD + "x: 1\n")
    store.reload()
    with pytest.raises(errors.PolicyInvalid, match=r"not in force.*p\.yaml:"):
        store.current.get("p")


def test_a_set_that_a_call_holds_does_not_change(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD)
    store = PolicyStore([tmp_path])
    held = store.current
    path.unlink()
    store.reload()
    assert held.names() == ["p"]
    assert store.current.names() == []


def test_a_tighter_floor_drops_a_kept_policy_that_exceeds_it(tmp_path: Path) -> None:
    write(tmp_path, HEAD + "limits: {pids: 10}\n")
    store = PolicyStore([tmp_path])
    write(tmp_path, HEAD + "limits: {pids: ten}\n")
    store.reload()
    write(tmp_path, "version: 1\nlimits: {pids: 9}\n", "floor")
    store.reload()
    assert store.current.names() == []
    assert {problem.code for problem in store.problems} == {"bad_value", "wider_than_floor"}


def test_a_wrong_floor_keeps_everything_as_it_was(tmp_path: Path) -> None:
    write(tmp_path, HEAD)
    floor = write(tmp_path, "version: 1\nlimits: {pids: 64}\n", "floor")
    store = PolicyStore([tmp_path])
    floor.write_text("version: 1\nlimits: {pids: \n")
    store.reload()
    assert store.current.names() == ["p"]
    assert [problem.file for problem in store.problems] == [str(floor)]
    assert store.current.floors[0].spec.limits.pids == 64


@pytest.mark.anyio
async def test_edits_are_followed(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + "limits: {pids: 10}\n")
    store = PolicyStore([tmp_path])

    def pids(number: int) -> Callable[[], bool]:
        return lambda: "p" in store.current.policies and store.current.get("p").spec.limits.pids == number

    async with watching(store):
        path.write_text(HEAD + "limits: {pids: 11}\n")
        await until(pids(11))

        # as vim and most others save: a new file in place of the old one
        beside = tmp_path / ".p.yaml.new"
        beside.write_text(HEAD + "limits: {pids: 12}\n")
        beside.replace(path)
        await until(pids(12))

        # a save in two parts: half a file is not a policy, and takes none away
        with path.open("w") as file:
            file.write(HEAD + "limits: {pids: [")
            file.flush()
            await until(lambda: bool(store.problems))
            assert pids(12)()
            file.seek(0)
            file.truncate()
            file.write(HEAD + "limits: {pids: 13}\n")
        await until(pids(13))
        assert store.problems == ()

        path.unlink()
        await until(lambda: store.current.names() == [])

        write(tmp_path, HEAD + "limits: {pids: 14}\n")
        await until(pids(14))


@pytest.mark.anyio
async def test_what_inotify_does_not_report_is_seen_all_the_same(tmp_path: Path) -> None:
    later = tmp_path / "later"
    target = tmp_path / "target.txt"
    target.write_text(HEAD)
    store = PolicyStore([later])
    assert store.current.names() == []
    async with watching(store):
        later.mkdir()
        (later / "p.yaml").symlink_to(target)
        await until(lambda: store.current.names() == ["p"])
        first = store.current.get("p").digest
        target.write_text(HEAD + "limits: {pids: 3}\n")
        await until(lambda: store.current.get("p").digest != first)
        (later / "p.yaml").unlink()
        later.rmdir()
        await until(lambda: store.current.names() == [])
        later.mkdir()
        write(later, HEAD)
        await until(lambda: store.current.names() == ["p"])


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.anyio
async def test_watching_ends_without_a_trace(tmp_path: Path) -> None:
    write(tmp_path, HEAD)
    store = PolicyStore([tmp_path])
    async with watching(store):
        pass
    await asyncio.sleep(0.5)
    before = open_descriptors()
    for _ in range(3):
        async with watching(store):
            write(tmp_path, HEAD + "# edited\n")
    # inotify's own thread closes its descriptor, a moment after it was told to
    await until(lambda: open_descriptors() <= before)
