"""Daemons that are robbed: of each runtime, one whose containers lack what a file names."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import daemons
import pytest
from daemons import needs_containers, start_daemon, until
from robbed_daemon import Robbed, script
from withheld_container import build_container
from withheld_init import build_init

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


TESTS = Path(__file__).parents[1]
POLICIES = {
    "lent": "mounts:\n  - {{source: {lent}, target: /data, mode: read-only}}\n",
    # every control that a policy may leave out
    "whole": (
        "filesystem: {{root: overlay, size: 16MiB}}\n"
        "limits:\n  file_size: 1MiB\n  io: {{read: 50MiB, write: 50MiB}}\n"
        "network: {{allow: [{{host: example.org, ports: [443], methods: [GET]}}]}}\n"
        "secrets: [{{name: TOKEN, as: file}}]\n"
    ),
}


@pytest.fixture(scope="module", params=["builtin", "crun", "runc"])
def robbed(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    need: Callable[[object, str], None],
) -> Iterator[Robbed]:
    """A daemon whose runtime takes away what the file ``withhold`` names."""
    needs_containers()
    name: str = request.param
    real = None if name == "builtin" else shutil.which(name)
    need(real or name == "builtin", name)
    directory = tmp_path_factory.mktemp(f"robbed-{name}")
    for path in (directory, *directory.parents):  # a container's root is nobody here
        if path.stat().st_mode & 0o001 == 0 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)
    (directory / "withhold").write_text("nothing")
    build_init(directory)
    container, runtime = None, Path(name)
    if real is None:
        container = build_container(directory)
    else:
        runtime = _write_runtime(directory, name, real)
    (directory / "lent").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(daemons, "SANDBOXD", script(directory, container))
        with start_daemon(directory, config=f"runtime: {runtime}\npool: {{min: 0, max: 0}}\n") as daemon:
            for policy, text in POLICIES.items():
                head = f"version: 1\nname: {policy}\nextends: tiny\n"
                (daemon.policies / f"{policy}.yaml").write_text(head + text.format(lent=directory / "lent"))
            client = daemon.client()
            client.set_secret("TOKEN", b"a secret that is stored")
            until(
                lambda: POLICIES.keys() <= {one.name for one in client.policies()}, "the policies are loaded"
            )
            yield Robbed(name, daemon, directory)


def _write_runtime(directory: Path, name: str, real: str) -> Path:
    runtime = directory / f"{name}-without"
    runtime.write_text(
        f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\nsys.path.insert(0, {str(TESTS)!r})\n"
        f"import withholding\nwithholding.main({real!r}, Path({str(directory)!r}))\n"
    )
    runtime.chmod(0o755)
    return runtime
