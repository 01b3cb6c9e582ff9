"""Lets the version of sandboxd that it runs with fill a state directory, and kills it: ``scripts/freeze``.

It stands outside of that version and has to do for all: what a version does not know is left out. What the
files of a session are is what a call in it says of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sandboxd import Client, errors

IMAGES = Path(os.environ.get("SANDBOXD_TEST_STATE", "/var/lib/sandboxd-test")) / "images"
SECRET = b"a-value-that-nobody-guesses"
LISTING = (
    "find . -mindepth 1 -printf '%y %m %U %G %l %p\\n' | LC_ALL=C sort;"
    " find . -type f -exec sha256sum {} + | LC_ALL=C sort -k 2"
)
POLICIES = {
    "files": 'version: 1\nname: files\nextends: default\nartifacts:\n  - {path: "out/**", max_size: 5MiB}\n',
    "told": "version: 1\nname: told\nextends: default\nsecrets:\n  - {name: TOKEN, as: file}\n",
    "again": (
        "version: 1\nname: again\nextends: default\nretry: {memory: {times: 1}}\nlimits: {memory: 64MiB,"
        " workspace: {size: 16MiB, inodes: 1k}, tmp: {size: 16MiB, inodes: 1k}}\n"
    ),
    "kept": "version: 1\nname: kept\nextends: default\nisolation: session\n",
}
WORK = (
    "mkdir -p dir/sub gone; echo one > dir/one; echo two > 'dir/name with space'; echo x > gone/x",
    "ln -s dir/one link; printf '#!/bin/sh\\n' > run; chmod 750 run; chmod 2770 dir/sub",
    "echo more >> dir/one; rm 'dir/name with space'; rm -r gone; mkdir gone; echo new > gone/new",
    "head -c 300000 /dev/zero | tr '\\0' y > large; truncate -s 1M holes; ln large other",
    "rm link; mkdir link; echo inside > link/file",
)


class Freezer:
    """Calls of one daemon."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self.state = work / "state"
        self.client = Client(work / "s", timeout=100)
        self._policies = work / "policies"
        self._daemon: subprocess.Popen[bytes] | None = None
        self.expected: dict[str, Any] = {"sessions": {}, "streams": {}}

    def start(self) -> None:
        """Start it as an operator does."""
        self.state.mkdir()
        (self.state / "images").symlink_to(IMAGES)
        self._policies.mkdir()
        for name, text in POLICIES.items():
            (self._policies / f"{name}.yaml").write_text(text)
        file = self._work / "sandboxd.yaml"
        file.write_text(
            f"state: {self.state}\nsocket: {{path: {self._work}/s, mode: '0600'}}\n"
            f"pool: {{min: 0, max: 0}}\npolicies: [{self._policies}]\n"
            "callers:\n  - {match: {uid: 0}, role: operator, policies: ['*'], callback: true}\n"
        )
        sandboxd = Path(sys.executable).with_name("sandboxd")
        with (self._work / "log").open("wb") as log:
            self._daemon = subprocess.Popen([sandboxd, "serve", "--config", file], stdout=log, stderr=log)
        for _ in range(400):
            with contextlib.suppress(errors.Unavailable):
                self.client.health()
                return
            time.sleep(0.05)
        raise SystemExit((self._work / "log").read_text())

    def kill(self) -> None:
        """Let it end as a host ends that loses its power, but for what the kernel has."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGKILL)
        self._daemon.wait()

    def run(self, command: str, **fields: Any) -> Any:
        """A call whose output is expected to stay."""
        done = self.client.run(["sh", "-c", command], **fields)
        self.expected["streams"][done.id] = {
            name: b"".join(getattr(self.client, name)(done.id)).decode()
            if content.size < 5000
            else content.digest
            for name, content in (("stdout", done.stdout), ("stderr", done.stderr))
            if content is not None
        }
        return done

    def has(self, policy: str) -> bool:
        """Whether this version knows a policy of ours."""
        return any(one.name == policy and not one.problems for one in self.client.policies())

    def list_files(self, session: str) -> None:
        """Let a call say what a session's files are, as it stands."""
        said = self.run(LISTING, session=session)
        info = self.client.session(session)
        self.expected["sessions"][info.id] = {
            "name": info.name,
            "labels": info.labels,
            "files": b"".join(self.client.stdout(said.id)).decode(),
            "checkpoints": [one.digest for one in self.client.checkpoints(session, limit=500).checkpoints],
            "head": info.head.digest,
        }


def fill(freezer: Freezer) -> None:
    """All that this version knows."""
    client = freezer.client
    old = [
        freezer.run(f"echo old {number}; mkdir out; echo {number} > out/f", policy="files")
        for number in range(3)
    ]
    time.sleep(2.1)
    client.prune(age=2_000_000)
    for call in old:
        freezer.expected["streams"].pop(call.id)
    freezer.expected["pruned"] = [call.id for call in old]
    freezer.run("echo once", key="once", labels={"team": "x"})
    freezer.run("echo said; echo loud >&2; exit 3")
    freezer.run("kill -9 $$")
    freezer.run("mkdir out; head -c 100000 /dev/zero > out/zeros; echo x > out/x", policy="files")
    freezer.run("head -c 1000000 /dev/zero | tr '\\0' z")
    client.run(["/no/such/program"])
    with contextlib.suppress(errors.Refused):
        client.run(["true"], policy="no-such-policy")
    if freezer.has("again"):
        freezer.run("tail /dev/zero", policy="again")
    if freezer.has("told"):
        client.set_secret("TOKEN", b"first-" + SECRET)
        client.rotate_secret("TOKEN", SECRET)
        freezer.run("sha256sum < /run/secrets/TOKEN; cat /run/secrets/TOKEN", policy="told")
    fill_sessions(freezer)
    if freezer.has("kept"):
        client.create_session("live", policy="kept")
        freezer.run("sleep 10000 & echo started > file; cd /tmp", session="live")
        freezer.run("cat /workspace/file; jobs; echo more >> file", session="live")
        if hasattr(client, "checkpoint_session"):
            client.checkpoint_session("live")
    time.sleep(2.5)  # what is done some time later is done for all until now, and for those to come it is not
    told = {"unix": str(freezer.state / "nobody.sock")}  # which nobody has made
    client.start(["sh", "-c", "echo before; sleep 10000"], key="flying", callback=told)
    client.start(["sh", "-c", "echo busy; sleep 10000"], key="busy", session="work")
    client.start(["sh", "-c", "cat dir/one"], key="waiting", session="work")
    for key in ("flying", "busy"):
        while not running(client, key):
            time.sleep(0.02)
    freezer.run("echo last > last; cat last", session="small")
    freezer.list_files("small")


def running(client: Client, key: str) -> bool:
    """Whether a call has written what it writes first."""
    found = [one for one in client.list().invocations if one.key == key]
    shown = client.get(found[0].id).stdout if found and found[0].state == "running" else None
    return shown is not None and shown.size > 0


def fill_sessions(freezer: Freezer) -> None:
    """Layers, merged ones too, forks, a rollback, quotas."""
    client = freezer.client
    client.create_session("work", labels={"team": "x"})
    for command in WORK:
        freezer.run(command, session="work")
    freezer.list_files("work")
    client.fork_session("work", "fork")
    freezer.run("echo fork > dir/one; rm -r link", session="fork")
    freezer.list_files("fork")
    client.create_session("small", size="10MiB", inodes=1000, ttl="9999d")
    for number in range(18):
        freezer.run(f"echo {number} > f{number % 7}", session="small")
    client.create_session("back")
    freezer.run("echo 1 > f", session="back")
    to = client.session("back").head.digest
    freezer.run("echo 2 > f; echo g > g", session="back")
    client.rollback_session("back", to)
    freezer.list_files("back")
    client.create_session("removed")
    freezer.run("echo gone > f", session="removed")
    client.delete_session("removed")


def described(freezer: Freezer, work: Path, commit: str) -> dict[str, Any]:
    """What is expected of the state."""
    for suffix in ("", "-wal"):  # whoever opens the original changes it
        shutil.copyfile(freezer.state / f"journal.sqlite3{suffix}", work / f"copy{suffix}")
    connection = sqlite3.connect(work / "copy")
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    head = connection.execute("SELECT n, digest FROM records ORDER BY n DESC LIMIT 1").fetchone()
    calls = connection.execute(
        "SELECT r.id, CAST(r.header AS TEXT), i.key, i.pruned FROM records r"
        " JOIN invocations i ON i.id = r.id ORDER BY n"
    ).fetchall()
    found = {
        "commit": commit,
        "schema": connection.execute("PRAGMA user_version").fetchone()[0],
        "head": f"{head[0]}:{head[1]}",
        "rows": {name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables},
        "calls": {
            id_: {"key": key, "pruned": pruned is not None}
            | {name: json.loads(header)["outcome"].get(name) for name in ("cause", "exit_code", "signal")}
            for id_, header, key, pruned in calls
        },
    }
    connection.close()
    return found | freezer.expected


def main(work: Path, commit: str) -> None:
    """Fill ``work/state``, and write ``manifest.json`` and ``name`` beside it."""
    freezer = Freezer(work)
    freezer.start()
    try:
        fill(freezer)
    finally:
        freezer.kill()
    found = described(freezer, work, commit)
    (work / "manifest.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    (work / "name").write_text(f"schema-{found['schema']}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
