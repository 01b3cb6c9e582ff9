"""The line of a receipt on ports that are exposed: where the caller is let in is where the tool is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from daemons import until

from sandboxd.receipt.parked import Parked
from sandboxd.receipt.reading import expose_control


@pytest.mark.parametrize(("before", "enforced"), [([], True), (["unshare", "--net"], False)])
def test_another_network_namespace_than_the_tools_is_no_way_in(before: list[str], *, enforced: bool) -> None:
    with subprocess.Popen([*before, "sleep", "60"]) as tool:
        try:
            comm = Path(f"/proc/{tool.pid}/comm")
            until(lambda: comm.read_text() == "sleep\n", "it runs")
            with Parked(tool.pid) as process:
                control = expose_control((8080, 9000), os.getpid(), process)
        finally:
            tool.kill()
    assert control.enforced is enforced
    here = Path("/proc/self/ns/net").readlink()
    assert control.in_force == f"8080, 9000 to the caller, in {here}"
    assert (control.asked == control.in_force) is enforced
