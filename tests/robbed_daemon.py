"""A daemon that is robbed between a container's making and its use, and whose own runtime can be another.

It is the real one but for two things. The built-in runtime's program is the one that it is told, as the
configuration does for an OCI runtime. And between the two moments at which limits are written and the
receipt is read it lets ``meddling.py`` do what the file ``withhold`` names: nobody outside can be sure to
meet so short a time.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anyio import to_thread
from daemons import berths_of
from meddling import LIVE

from sandboxd import errors
from sandboxd.cli.main import main as command_line
from sandboxd.engine import berth, builtin, host
from sandboxd.engine.oci import OciEngine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from daemons import Daemon

    from sandboxd.engine.base import Slot
    from sandboxd.models import Invocation
    from sandboxd.plan import Shape

PREFIX = "live "  # of what is done to a container that is up


def main(directory: Path, container: Path | None) -> int:
    """Be ``sandboxd``; ``container`` takes the place of the built-in runtime's program."""

    class RobbedEngine(OciEngine):
        async def create(self, shape: Shape, *, warm: bool = True) -> Slot:
            slot = await super().create(shape, warm=warm)
            wanted = (directory / "withhold").read_text()
            if wanted.startswith(PREFIX):
                try:
                    await to_thread.run_sync(LIVE[wanted.removeprefix(PREFIX)][0], slot)
                except Exception as error:
                    await self.destroy(slot)
                    raise errors.EngineFailed(f"it cannot be taken away: {error!r}") from error
            return slot

    host.__dict__["OciEngine"] = RobbedEngine
    if container is not None:
        builtin.__dict__["CONTAINER"] = container
    berth.READY = 0  # one that waits was made before the test said what it should lack
    return command_line()


def script(directory: Path, container: Path | None) -> Path:
    """Write the program that a test starts as its daemon."""
    file = directory / "robbed-sandboxd"
    given = f"Path({str(directory)!r}), {f'Path({str(container)!r})' if container else None}"
    file.write_text(
        f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\nsys.path.insert(0, "
        f"{str(Path(__file__).parent)!r})\nimport robbed_daemon\nsys.exit(robbed_daemon.main({given}))\n"
    )
    file.chmod(0o755)
    return file


@dataclass
class Robbed:
    """A daemon whose containers lack what ``withheld`` names."""

    runtime: str
    daemon: Daemon
    directory: Path

    @contextmanager
    def withheld(self, what: str) -> Iterator[None]:
        """For the time of a ``with`` block."""
        file = self.directory / "withhold"
        file.write_text(what)
        try:
            yield
        finally:
            file.write_text("nothing")

    def run(self, what: str, *argv: str, policy: str) -> Invocation:
        """A call in a container that lacks this."""
        with self.withheld(what):
            return self.daemon.run(*(argv or ("echo", "ran")), policy=policy)

    def children(self) -> set[str]:
        """The engine's children, those that wait for a container to make aside."""
        found: set[str] = set()
        for task in Path(f"/proc/{self.daemon.engine}/task").iterdir():
            found |= set((task / "children").read_text().split())
        return found - {str(pid) for pid in berths_of(self.daemon)}
