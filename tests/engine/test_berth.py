"""Berths: what is left of one that cannot be cleared away keeps no other."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from sandboxd import errors
from sandboxd.engine import berth

if TYPE_CHECKING:
    from pathlib import Path


def test_every_berth_is_cleared_away_though_one_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(berth, "READY", 0)  # the thread makes none
    cleared: list[int] = []

    def clear(number: int) -> None:
        cleared.append(number)
        if number == 1:
            raise errors.HostFailed("cgroup is busy")

    berths = berth.Berths(tmp_path, *[None] * 3)  # type: ignore[arg-type]
    berths.__enter__()
    for number in range(3):
        stack = ExitStack()
        stack.callback(clear, number)
        berths._ready.append(SimpleNamespace(stack=stack))  # type: ignore[arg-type]
    with pytest.raises(errors.HostFailed, match="busy"):
        berths.__exit__()
    assert sorted(cleared) == [0, 1, 2]
