"""A daemon with faults of ours, each for as long as a file names it: none that the code expects to see."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandboxd import daemon
from sandboxd.cli.main import main
from sandboxd.engine import berth
from sandboxd.engine.builtin import BuiltInContainer
from sandboxd.maker.process import EngineProcess
from sandboxd.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.engine.base import Slot
    from sandboxd.plan import Shape
    from sandboxd.pool import Room

FAULTS = Path(sys.argv.pop(1))


def fault(name: str, kind: type[Exception], *, task: str = "", thread: str = "") -> None:
    """Go wrong, if the file says so; ``task`` and ``thread``: only in that one."""
    if name not in FAULTS.read_text().split() or thread not in threading.current_thread().name:
        return
    current = asyncio.current_task() if task else None
    if current is None or task in current.get_name():
        raise kind(f"fault of {name}")


class FaultyEngine(EngineProcess):
    async def create(self, shape: Shape, *, warm: bool = True) -> Slot:
        fault("create", ValueError, task="_add")
        return await super().create(shape, warm=warm)

    async def destroy(self, slot: Slot) -> None:
        await super().destroy(slot)
        fault("destroy", OSError, task="_discard")


class FaultyContainer(BuiltInContainer):
    def __init__(self, *arguments: Any, **more: Any) -> None:
        fault("berth", KeyError, thread="berths")
        super().__init__(*arguments, **more)


class FaultyPool(Pool):
    def __init__(
        self, *arguments: Any, room: Callable[[], Room], in_force: Callable[[Shape], bool], **more: Any
    ) -> None:
        def faulty_room() -> Room:
            fault("room", ZeroDivisionError, task="Pool.run")
            return room()

        def faulty(shape: Shape) -> bool:
            fault("in_force", TypeError)
            return in_force(shape)

        super().__init__(*arguments, room=faulty_room, in_force=faulty, **more)


if __name__ == "__main__":
    daemon.__dict__["Pool"] = FaultyPool
    daemon.__dict__["EngineProcess"] = FaultyEngine
    berth.__dict__["BuiltInContainer"] = FaultyContainer
    sys.exit(main())
