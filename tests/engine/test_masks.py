"""A path of ``/proc`` that is to be masked and comes into being while a slot waits: its receipt says so.

This file is also the process that makes the slot, since an engine needs a mount namespace of its own.
``/proc/self/fd/900`` stands for what a kernel module would add: it is there when somebody wants it to be.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import anyio
import pytest
from itself import told_by

from sandboxd.config import Config
from sandboxd.engine.bundle import MASKED
from sandboxd.engine.host import EngineHost, enter_private_mounts, instance_name
from sandboxd.engine.probe import probe_shape
from sandboxd.receipt import mounted, read_receipt, take_reading

NUMBER = 900


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    seen: dict[str, list[str]] = json.loads(told_by(__file__, tmp_path_factory))
    return seen


def test_a_path_that_appears_is_seen(found: dict[str, list[str]]) -> None:
    assert found["before"] == []
    assert found["after"] == ["masked_paths"]
    assert found["without"] == []


async def main(state: Path) -> dict[str, list[str]]:
    """Read a slot before and after the path is there."""
    label = instance_name(state)
    config = Config.model_validate({"state": str(state), "runtime": "builtin"})
    shape = probe_shape()
    seen: dict[str, list[str]] = {}
    with EngineHost(config, RUN, label) as host:
        [engine] = host.engines()
        slot = await engine.create(shape)
        try:
            with take_reading(slot) as reading:

                def denied() -> list[str]:
                    found = reading.again(shape.limits) or read_receipt(slot, shape.limits)
                    return [one.name for one in found.controls if not one.enforced]

                seen["before"] = denied()
                os.dup2(0, NUMBER)
                seen["after"] = denied()
                os.close(NUMBER)
                seen["without"] = denied()
        finally:
            await engine.destroy(slot)
    return seen


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    mounted.__dict__["MASKED"] = (*MASKED, f"/proc/self/fd/{NUMBER}")
    RUN = enter_private_mounts(instance_name(directory))
    sys.stdout.write(json.dumps(anyio.run(main, directory)))
