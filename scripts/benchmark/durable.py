"""What it costs that a call is on disk before it is told: the same calls where a sync is for nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sandboxes
from measure import in_turn

from sandboxd import Client

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["durable"]


def durable(images: Path, quick: bool, until: float, tell: Callable[[str], None]) -> dict[str, Any]:  # noqa: FBT001
    """Milliseconds of warm calls by two daemons, one with its state on disk, the other on a tmpfs."""
    memory = tempfile.TemporaryDirectory(prefix="sandboxd-bench-", dir="/dev/shm")
    with (
        memory as name,
        sandboxes.start(images, sandboxes.WARM) as on_disk,
        sandboxes.start(images, sandboxes.WARM, directory=Path(name)) as in_memory,
    ):
        clients = {"disk": Client(on_disk.socket), "tmpfs": Client(in_memory.socket)}
        found = in_turn(
            {where: lambda client=client: client.run(["true"]) for where, client in clients.items()},
            20 if quick else 400,
            until,
        )
    tell(f"{found}\n")
    return found
