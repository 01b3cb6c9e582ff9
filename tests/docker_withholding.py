"""A runtime for a Docker Engine: runc, with a bundle that lacks what the file ``withhold`` names."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any


def main(directory: str) -> None:
    """Edit the bundle, where one is named, and become runc."""
    wanted = (Path(directory) / "withhold").read_text().strip()
    arguments = sys.argv[1:]
    if "create" in arguments and "--bundle" in arguments:
        file = Path(arguments[arguments.index("--bundle") + 1]) / "config.json"
        config = json.loads(file.read_text())
        _withhold(config, wanted, directory)
        file.write_text(json.dumps(config))
    runc = shutil.which("runc")
    assert runc is not None
    os.execv(runc, [runc, *arguments])


def _withhold(config: dict[str, Any], wanted: str, directory: str) -> None:
    linux = config["linux"]
    at = {mount["destination"]: mount for mount in config["mounts"]}
    kind, _, what = wanted.partition("_")
    match what, wanted:
        case "namespace", _:
            name = {"net": "network"}.get(kind, kind)
            linux["namespaces"] = [one for one in linux["namespaces"] if one["type"] != name]
            if kind == "uts":
                config["hostname"] = ""
            if kind == "net":
                linux.pop("sysctl", None)
        case "size", _:
            options = at[f"/{kind}"]["options"]
            at[f"/{kind}"]["options"] = ["size=1k" if one.startswith("size=") else one for one in options]
        case _, "shm_absent" | "workspace_absent":
            config["mounts"].remove(at["/dev/shm" if kind == "shm" else "/workspace"])
        case _, "lent_other":
            at["/lent"]["source"] = directory
        case _, "host_device":
            node = {"type": "c", "path": "/dev/kmsg", "major": 1, "minor": 11, "fileMode": 0o666}
            linux.setdefault("devices", []).append({**node, "uid": 0, "gid": 0})
        case _:
            changes: dict[str, tuple[dict[str, Any], str, Any]] = {
                "masked_paths": (linux, "maskedPaths", linux["maskedPaths"][1:]),
                "read_only_paths": (linux, "readonlyPaths", linux["readonlyPaths"][1:]),
                "seccomp_outer": (linux, "seccomp", {"defaultAction": "SCMP_ACT_ALLOW"}),
                "hostname": (config, "hostname", "other"),
            }
            if wanted in changes:
                where, key, value = changes[wanted]
                where[key] = value
