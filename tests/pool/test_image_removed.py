"""An image can be removed while slots of it wait."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from daemons import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from daemons import Daemon


def test_slots_do_not_keep_their_image(daemon_factory: Callable[..., Daemon], tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("bin", "dev", "proc", "tmp", "workspace", "etc", "usr"):
        (tree / name).mkdir(parents=True)
    (tmp_path / "nothing.c").write_text("int main(void) { return 0; }\n")
    subprocess.run(["cc", "-static", "-o", tree / "bin/nothing", tmp_path / "nothing.c"], check=True)
    subprocess.run(["tar", "-C", tree, "-cf", tmp_path / "tree.tar", "."], check=True)
    state = tmp_path / "state"
    (state / "images").mkdir(parents=True)  # a store of its own
    sandboxd = str(Path(sys.executable).with_name("sandboxd"))

    def image(*arguments: str) -> None:
        command = [sandboxd, "image", *arguments, "--state", str(state)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr

    image("import", str(tmp_path / "tree.tar"), "--name", "small")
    daemon = daemon_factory(config="pool: {min: 2, max: 2}\n", state=state)
    policy = daemon.policies / "small.yaml"
    policy.write_text("version: 1\nname: small\nextends: default\nimage: small\n")
    client = daemon.client()
    until(lambda: "small" in [one.name for one in client.policies()], "the policy is loaded")

    def ready() -> set[str]:
        return {slot.id for slot in client.slots() if slot.id and slot.state == "waiting"}

    assert daemon.run("/bin/nothing", policy="small").outcome is not None
    until(lambda: len(ready()) == 2, "slots of it wait")
    old = ready()
    policy.unlink()
    image("rm", "small")
    until(lambda: not client.slots(), "they are gone")
    image("import", str(tmp_path / "tree.tar"), "--name", "small")
    policy.write_text("version: 1\nname: small\nextends: default\nimage: small\n")
    until(lambda: "small" in [one.name for one in client.policies()], "the policy is loaded again")
    found = daemon.run("/bin/nothing", policy="small")
    assert found.outcome is not None
    assert found.outcome.exit_code == 0
    until(lambda: len(ready()) == 2, "slots of the new one wait")
    assert not old & ready()
