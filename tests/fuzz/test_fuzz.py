"""Parsers of hostile bytes under a coverage-guided fuzzer: for seconds, or in scripts/nightly minutes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = int(os.environ.get("SANDBOXD_FUZZ_SECONDS", "5"))


SIGNED = b"""/a?b=c
host:example.amazonaws.com
x-amz-date:20150830T123600Z
date:Sun, 30 Aug 2015 12:36:00 GMT
authorization:AWS4-HMAC-SHA256 Credential=x/20150830/r/s3/aws4_request, SignedHeaders=host, Signature=0
x-amz-content-sha256:UNSIGNED-PAYLOAD"""


def _seeds(directory: Path, name: str) -> list[Path]:
    """Something to begin with, where that is long to find."""
    if name != "sigv4":
        return []
    corpus = directory / "corpus"
    corpus.mkdir()
    (corpus / "signed").write_bytes(SIGNED)
    (corpus / "dated").write_bytes(SIGNED.replace(b"x-amz-date:", b"x-other:"))
    return [corpus]


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this Python"
)
@pytest.mark.timeout(60 + 2 * SECONDS)
@pytest.mark.parametrize("name", ["hello", "refused", "messages", "sigv4", "http2"])
def test_nothing_else_is_raised(name: str, tmp_path: Path) -> None:
    target = Path(__file__).with_name("target.py")
    options = [f"-max_total_time={SECONDS}", "-max_len=2000", "-timeout=5", "-rss_limit_mb=1024"]
    done = subprocess.run(
        [sys.executable, target, name, *options, f"-artifact_prefix={tmp_path}/", *_seeds(tmp_path, name)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "DONE" in done.stderr or "Done" in done.stderr, done.stderr[-1000:]
