"""Sessions in containers that waited: the files are put there when the call comes, and read back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from daemons import until, waited
from sessioned import give_policies, said, sh

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon


def test_a_container_that_waited_gets_the_files_of_its_call(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config="pool: {min: 2, max: 4}\n")
    give_policies(daemon)
    client = daemon.client()
    one, other = client.create_session("one"), client.create_session("other")
    sh(daemon, one, "echo one > f")
    sh(daemon, other, "echo other > f")

    def ready() -> bool:
        return any(slot.state == "waiting" and slot.policy == "kept" for slot in client.slots())

    for named, text in (("one", "one\n"), ("other", "other\n"), ("one", "one\n")):
        until(ready, "a container waits")
        found = sh(daemon, named, "cat f; touch g; rm g")
        assert said(found) == text
        assert waited(found)
        assert found.receipt is not None
        assert found.receipt.checked_at is not None  # and was not read in full again
        controls = {control.name: control for control in found.receipt.controls}
        assert controls["workspace"].in_force.endswith("above 1 layers, writable, nosuid, nodev")
        assert all(control.enforced for control in controls.values())
        assert len(controls) == len(found.receipt.controls)
    until(ready, "a container waits")
    alone = client.run(["ls", "-A"], policy="kept")
    assert said(alone) == ""
    assert waited(alone)
