"""The bytes that travel beside a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandboxd.kernel import files
from sandboxd.kernel import tar as tars

if TYPE_CHECKING:
    from sandboxd.engine.base import Slot

__all__ = ["Payload"]


@dataclass(frozen=True)
class Payload:
    """Inputs are paths, contents and modes; ``tar`` is unpacked after them."""

    inputs: tuple[tuple[str, bytes, int], ...] = ()
    tar: bytes | None = None
    stdin: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes that it holds in memory."""
        return sum(len(data) for _, data, _ in self.inputs) + len(self.tar or b"") + len(self.stdin or b"")

    @property
    def has_files(self) -> bool:
        """Whether anything of it goes into the workspace."""
        return bool(self.inputs) or self.tar is not None

    def fill(self, slot: Slot) -> None:
        """Put the files into a slot's workspace. Blocks. Raises TooLarge, InvalidRequest, OSError."""
        owner = slot.shape.process
        uid, gid = slot.id_base + owner.uid, slot.id_base + owner.gid
        # in a session an input takes the place of a file that an earlier call left
        replace = slot.stacked is not None
        files.write_inputs(slot.workspace_fd, self.inputs, uid, gid, replace=replace)
        if self.tar is not None:
            limits = tars.Limits(size=slot.shape.limits.workspace_size)
            tars.unpack_tar(slot.workspace_fd, self.tar, uid, gid, limits)
