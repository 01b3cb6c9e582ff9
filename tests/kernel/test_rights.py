"""Another's rights over files: one thread's, for a while, and nothing is left of them."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from sandboxd.kernel.rights import Rights

if TYPE_CHECKING:
    from pathlib import Path

CALLER = 4321


def test_rights_are_one_threads_and_only_for_a_while(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.write_text("content")
    closed.chmod(0o600)
    inside, looked = threading.Event(), threading.Event()
    seen: list[object] = []

    def other() -> None:
        inside.wait(10)
        seen.extend([closed.read_text(), os.getgroups()])
        looked.set()

    before = os.getgroups()
    thread = threading.Thread(target=other)
    thread.start()
    with Rights(CALLER, CALLER, (5000,)).held():
        assert os.getgroups() == [5000]
        with pytest.raises(PermissionError):
            closed.read_text()
        inside.set()
        assert looked.wait(10)
    thread.join()
    with pytest.raises(ZeroDivisionError), Rights(CALLER, CALLER).held():
        raise ZeroDivisionError
    assert seen == ["content", before]
    assert (closed.read_text(), os.getgroups()) == ("content", before)
