"""State directories that released versions left behind, as ``scripts/freeze`` made them: see there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["FROZEN", "STATES", "expected", "thawed"]

STATES = Path(__file__).parent / "states"
FROZEN = sorted((path.stem for path in STATES.glob("schema-*.json")), key=lambda name: int(name[7:]))
"""Those of which it is written down what they have."""


def thawed(name: str, where: Path) -> Path:
    """A copy of a frozen state."""
    where.mkdir(parents=True, exist_ok=True)
    tar: list[str | Path] = [
        "tar",
        "--extract",
        "--xz",
        "--file",
        STATES / f"{name}.tar.xz",
        "--directory",
        where,
    ]
    keep = ["--numeric-owner", "--preserve-permissions", "--xattrs", "--xattrs-include=*"]
    subprocess.run([*tar, *keep], check=True)
    return where


def expected(name: str) -> dict[str, Any]:
    """What it has: ``freeze.described`` says of what."""
    found: dict[str, Any] = json.loads((STATES / f"{name}.json").read_text())
    return found
