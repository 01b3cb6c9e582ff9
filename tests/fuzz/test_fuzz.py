"""Parsers of hostile bytes under a coverage-guided fuzzer: for seconds, or in scripts/nightly minutes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = int(os.environ.get("SANDBOXD_FUZZ_SECONDS", "5"))


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this Python"
)
@pytest.mark.timeout(60 + 2 * SECONDS)
@pytest.mark.parametrize("name", ["hello", "refused", "messages", "http2"])
def test_nothing_else_is_raised(name: str, tmp_path: Path) -> None:
    target = Path(__file__).with_name("target.py")
    options = [f"-max_total_time={SECONDS}", "-max_len=2000", "-timeout=5", "-rss_limit_mb=1024"]
    done = subprocess.run(
        [sys.executable, target, name, *options, f"-artifact_prefix={tmp_path}/"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "DONE" in done.stderr or "Done" in done.stderr, done.stderr[-1000:]
