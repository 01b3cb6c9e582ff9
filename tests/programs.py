"""C programs that tests compile on the host and give to a call as executable inputs."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from sandboxd.models import Bytes, Input

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Programs"]


@dataclass(frozen=True)
class Programs:
    """Static programs in a directory of their own, so that any image runs them."""

    folder: Path

    @classmethod
    def compile(cls, folder: Path, sources: Iterable[Path]) -> Self:
        """Compile each source to ``folder``, under its name without the suffix."""
        flags = ["-O1", "-Wall", "-Werror", "-static", "-pthread"]
        for source in sources:
            subprocess.run(["gcc", *flags, "-o", str(folder / source.stem), str(source)], check=True)
        return cls(folder)

    def input(self, *names: str) -> list[Input]:
        """The programs as the executables ``./NAME`` of a call's workspace."""
        return [
            Input(path=name, content=Bytes.of((self.folder / name).read_bytes()), mode=0o755)
            for name in names
        ]
