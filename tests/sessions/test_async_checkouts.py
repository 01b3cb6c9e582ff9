"""Push and pull of the asynchronous client: what those of the blocking one do, and an end when asked."""

from __future__ import annotations

import asyncio
import os
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest
from anyio import from_thread
from sessioned import said, sh

from sandboxd import AsyncClient, errors
from sandboxd.client import checkout, place, pulling, pushing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from daemons import Daemon

    from sandboxd.models import SessionInfo

pytestmark = pytest.mark.usefixtures("agreements")


def ask(daemon: Daemon, kind: str, name: str, *arguments: Any, **fields: Any) -> Any:
    """A method of either client."""
    if kind == "sync":
        return getattr(daemon.client(), name)(*arguments, **fields)
    return anyio.run(partial(getattr(AsyncClient(daemon.socket), name), *arguments, **fields))


def filled(directory: Path) -> Path:
    (directory / "src").mkdir(parents=True)
    (directory / ".gitignore").write_text("*.o\n")
    for name in ("both", "gone", "src/main.c", "src/main.o"):
        (directory / name).write_text(f"{name}\n")
    (directory / "link").symlink_to("src/main.c")
    (directory / "large").write_bytes(bytes(range(256)) * 8192)
    os.mkfifo(directory / "fifo")
    return directory


def content(directory: Path) -> dict[str, Any]:
    return {
        str(one.relative_to(directory)): one.readlink() if one.is_symlink() else one.read_bytes()
        for one in directory.rglob("*")
        if one.is_symlink() or one.is_file()
    }


HOSTILE = """
echo theirs >both; echo new >new; mkdir -p .git/hooks; echo bad >.git/hooks/pre-commit; ln -s /etc out
mkfifo pipe; rm gone; echo changed >src/main.c
"""


def test_the_same_comes_of_both(daemon: Daemon, tmp_path: Path) -> None:
    def through(kind: str, directory: Path) -> list[Any]:
        made = daemon.client().create_session(policy="kept")
        try:
            steps = [ask(daemon, kind, "push", made.id, directory)]
            said(sh(daemon, made, HOSTILE))
            (directory / "both").write_text("mine\n")
            (directory / "mine").write_text("mine\n")
            steps.append(ask(daemon, kind, "push", made.id, directory))
            steps.append(ask(daemon, kind, "pull", made.id, directory, most=1 << 20))
            steps.append(ask(daemon, kind, "push", made.id, directory, force=True, git=True))
            steps.append(ask(daemon, kind, "pull", made.id, directory, force=True, git=True))
            steps.append(said(sh(daemon, made, "cat both mine new src/main.c; ls -A .")))
        finally:
            daemon.client().delete_session(made.id)
        for one in steps:
            if isinstance(one, pushing.Pushed):
                assert (one.checkpoint is None) == (not one.sent and not one.removed)
                one.checkpoint = None
        return steps

    blocking, tasks = filled(tmp_path / "blocking"), filled(tmp_path / "tasks")
    expected = through("sync", blocking)
    assert through("async", tasks) == expected
    assert content(tasks) == content(blocking)
    pushed, again, pulled, *_ = expected
    assert set(pushed.sent) == {".gitignore", "both", "gone", "large", "link", "src", "src/main.c"}
    assert [(one.path, one.reason) for one in pushed.left] == [("fifo", "it is a FIFO")]
    assert [one.path for one in again.refused] == ["both"]
    assert {"new", "gone", "src/main.c"} <= set(pulled.applied)
    assert {".git", ".git/hooks/pre-commit", "out", "pipe", "both"} <= {one.path for one in pulled.refused}


def test_a_session_on_the_directory(daemon: Daemon, tmp_path: Path) -> None:
    directory = filled(tmp_path / "work")

    async def work() -> None:
        client = AsyncClient(daemon.socket)
        made = await client.create_session(directory=directory, policy="kept")
        try:
            call = await client.run(
                ["sh", "-c", "echo theirs >both; rm gone"], session=made.id, policy="kept"
            )
            assert call.outcome is not None
            assert call.outcome.exit_code == 0
            assert (await client.push(made.id, directory)).sent == []
            assert set((await client.pull(made.id, directory)).applied) == {"both", "gone"}
        finally:
            await client.delete_session(made.id)

    anyio.run(work)
    assert (directory / "both").read_text() == "theirs\n"
    assert not (directory / "gone").exists()


def test_what_is_raised_comes_as_it_is(
    daemon: Daemon, session: SessionInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = filled(tmp_path / "work")
    for name in ("push", "pull"):
        with pytest.raises(errors.NotFound):
            ask(daemon, "async", name, "nobody", directory)
        with pytest.raises(FileNotFoundError):
            ask(daemon, "async", name, session.id, tmp_path / "nowhere")
    small = daemon.client().create_session(size="1MiB")
    try:
        with pytest.raises(errors.QuotaExceeded):
            ask(daemon, "async", "push", small.id, directory)
    finally:
        daemon.client().delete_session(small.id)
    real = checkout.chunks_of

    def changing(root: int, found: Any) -> Iterator[bytes]:
        (directory / "large").write_text("other\n")
        yield from real(root, found)

    monkeypatch.setattr(pushing, "chunks_of", changing)
    with pytest.raises(errors.StateConflict, match="changed while it was sent"):
        ask(daemon, "async", "push", session.id, directory)
    assert daemon.client().session(session.id).head == session.head
    with pytest.raises(errors.Unavailable):
        anyio.run(AsyncClient(tmp_path / "none").push, session.id, directory)


def by_scope(work: Callable[[], Any], begun: anyio.Event) -> None:
    async def run() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(work)
            await begun.wait()
            group.cancel_scope.cancel()

    anyio.run(run)


def by_asyncio(work: Callable[[], Any], begun: anyio.Event) -> None:
    async def run() -> None:
        task = asyncio.ensure_future(work())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


@pytest.mark.parametrize("cancelled", [by_scope, by_asyncio])
def test_a_push_that_is_cancelled_changes_nothing(
    daemon: Daemon,
    session: SessionInfo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cancelled: Callable[..., None],
) -> None:
    """In the middle of a body that would never end."""
    directory = filled(tmp_path / "work")
    begun = anyio.Event()
    ended = threading.Event()

    def endless(_: int, __: Any) -> Iterator[bytes]:
        try:
            while True:
                yield bytes(1 << 18)
                from_thread.run_sync(begun.set)
        finally:
            ended.set()

    with monkeypatch.context() as patched:
        patched.setattr(pushing, "chunks_of", endless)
        cancelled(partial(AsyncClient(daemon.socket).push, session.id, directory), begun)
    assert ended.is_set()
    assert daemon.client().session(session.id).head == session.head
    assert ask(daemon, "async", "push", session.id, directory).checkpoint is not None


@pytest.mark.parametrize("cancelled", [by_scope, by_asyncio])
def test_a_pull_that_is_cancelled_leaves_whole_files(
    daemon: Daemon,
    session: SessionInfo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cancelled: Callable[..., None],
) -> None:
    said(sh(daemon, session, "echo a >a; head -c 8388608 /dev/urandom >b; echo c >c"))
    begun = anyio.Event()
    pieces = 0

    def slowly(fd: int, data: bytes, offset: int) -> None:
        nonlocal pieces
        place.write_sparse(fd, data, offset)
        if len(data) > 100:
            pieces += 1
            from_thread.run_sync(begun.set)

    with monkeypatch.context() as patched:
        patched.setattr(pulling, "write_sparse", slowly)
        cancelled(partial(AsyncClient(daemon.socket).pull, session.id, tmp_path), begun)
    assert {one.name for one in tmp_path.iterdir()} - {"xdg"} == {"a"}
    seen = pieces
    pulled = ask(daemon, "async", "pull", session.id, tmp_path)
    assert (set(pulled.applied), pulled.refused) == ({"b", "c"}, [])
    assert pieces == seen


def test_a_cancelled_task_waits_for_what_its_thread_does_with_files(
    daemon: Daemon, session: SessionInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = filled(tmp_path / "work")
    begun = anyio.Event()
    done = []
    real = checkout.scan

    def long(*arguments: Any, **fields: Any) -> Any:
        from_thread.run_sync(begun.set)
        threading.Event().wait(0.3)
        done.append(1)
        return real(*arguments, **fields)

    monkeypatch.setattr(pushing, "scan", long)
    by_asyncio(partial(AsyncClient(daemon.socket).push, session.id, directory), begun)
    assert done == [1]
    assert daemon.client().session(session.id).head == session.head


def test_many_at_once_need_no_more_threads_than_there_are(
    daemon: Daemon, session: SessionInfo, tmp_path: Path
) -> None:
    """Those that read files for a push are not waited for by pushes that hold all the others."""
    directory = filled(tmp_path / "work")

    async def work() -> list[pushing.Pushed]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = 1
        client = AsyncClient(daemon.socket)
        found: list[pushing.Pushed] = []

        async def one() -> None:
            found.append(await client.push(session.id, directory))

        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(one)
        return found

    found = anyio.run(work)
    assert [one.refused for one in found] == [[]] * 4
    assert said(sh(daemon, session, "cat src/main.c")) == "src/main.c\n"
