"""Runs with the bench's own interpreter: calls sandlock for each line of standard input, and answers."""

from __future__ import annotations

import json
import sys

from sandlock import Sandbox

for line in sys.stdin:
    asked = json.loads(line)
    try:
        sandbox = Sandbox(
            chroot=asked["root"],
            fs_readable=["/"],
            fs_writable=["/tmp", "/dev/null"],  # noqa: S108
            max_memory=asked["memory"],
            max_processes=asked["pids"],
            clean_env=True,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin"},
        )
        done = sandbox.run(asked["argv"])
        said = "ok" if done.exit_code == 0 else f"{done.error or done.reason} {done.stderr!r}"
    except Exception as error:  # noqa: BLE001 - whatever it is, the report quotes it
        said = f"{type(error).__name__}: {error}"
    print(" ".join(str(said).split()), flush=True)
