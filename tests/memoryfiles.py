"""The files of sessions in memory: each session has the same, and changes are noted and not made."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from sandboxd import canonical, errors, models

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sandboxd.api.identity import Caller
    from sandboxd.workspace.edit import Condition
    from sandboxd.workspace.layertar import Export

CONTENT = b"0123456789"


class MemoryFiles:
    """Implements ``FileService``. There is a file ``digits``; ``broken`` cannot be read."""

    def __init__(self) -> None:
        self.conditions: list[Condition] = []
        self.matches: list[frozenset[str] | None] = []
        self.open = 0

    async def diff(self, caller: Caller, named: str, **_: object) -> models.SessionDiff:
        raise errors.NotFound(named)

    async def list(self, caller: Caller, named: str, path: str, **_: object) -> models.FileList:
        raise errors.NotFound(path)

    @contextlib.asynccontextmanager
    async def read(
        self, caller: Caller, named: str, path: str, **_: object
    ) -> AsyncIterator[tuple[models.FileInfo, Callable[[int, int], AsyncIterator[bytes]]]]:
        if path not in {"digits", "broken"}:
            raise errors.NotFound(path)

        async def pieces(start: int, length: int) -> AsyncIterator[bytes]:
            if path == "broken":
                raise errors.HostFailed("the disk is gone")
            for at in range(start, start + length):
                yield CONTENT[at : at + 1]

        info = models.FileInfo(
            path=path, kind="file", mode=0o644, uid=0, gid=0, size=len(CONTENT), mtime=0,
            digest=canonical.digest_bytes(CONTENT),
        )  # fmt: skip
        self.open += 1
        try:
            yield info, pieces
        finally:
            self.open -= 1

    async def write(
        self, caller: Caller, named: str, path: str, chunks: AsyncIterator[bytes], **fields: Any
    ) -> models.FileWritten:
        self.conditions.append(fields["condition"])
        async for _chunk in chunks:
            pass
        raise errors.NotFound(path)

    async def make_directory(
        self, caller: Caller, named: str, path: str, *, condition: Condition
    ) -> models.FileWritten:
        self.conditions.append(condition)
        raise errors.NotFound(path)

    async def remove(self, caller: Caller, named: str, path: str, **fields: Any) -> models.FileWritten:
        self.conditions.append(fields["condition"])
        raise errors.NotFound(path)

    @contextlib.asynccontextmanager
    async def export(
        self, caller: Caller, named: str, **_: object
    ) -> AsyncIterator[tuple[Export, AsyncIterator[bytes]]]:
        raise errors.NotFound(named)
        yield

    async def bring(
        self, caller: Caller, named: str, chunks: AsyncIterator[bytes], **fields: Any
    ) -> models.CheckpointInfo:
        self.matches.append(fields["match"])
        async for _chunk in chunks:
            pass
        raise errors.NotFound(named)
