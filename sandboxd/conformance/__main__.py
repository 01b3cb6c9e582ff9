"""``python -m sandboxd.conformance``: see the package's first lines."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.conformance.expected import ENGINES
from sandboxd.conformance.options import Options, SubjectFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = 2
HERE = Path(__file__).parent
# Whether everything is gone is looked at when everything has run.
AREAS = (
    *("receipt", "limits", "outcomes", "attempts", "streams", "files", "requests", "records"),
    *(
        "network",
        "trust",
        "requests_of_http",
        "secrets",
        "ports",
        "sessions",
        "containers",
        "callbacks",
        "pool",
        "warm",
        "hostile",
        "cleanup",
    ),
)


def build_parser() -> argparse.ArgumentParser:
    """The options, for ``--help`` and for the test that compares them with the documentation."""
    parser = argparse.ArgumentParser(
        prog="python -m sandboxd.conformance",
        description="Hold an engine on this host to what sandboxd promises. Needs root and pytest.",
    )
    add = parser.add_argument
    add("--engine", choices=sorted(ENGINES), default="oci", help="the engine of the daemon (default: oci)")
    add("--runtime", default="auto", help="auto, builtin, crun, runc, or the path of one (engine oci)")
    add(
        "--images",
        type=Path,
        default=Options.images,
        metavar="DIR",
        help="an image store with base and python",
    )
    add(
        "--image",
        action="append",
        default=[],
        metavar="NAME=IMAGE",
        help="what policies name for base or python",
    )
    add("--config", default="", metavar="YAML", help="further lines of the daemon's configuration")
    add("--socket", type=Path, metavar="PATH", help="hold a running daemon to it; needs --policies")
    add(
        "--policies", type=Path, metavar="DIR", help="a directory that the running daemon reads policies from"
    )
    add("--report", type=Path, metavar="FILE", help="write the results: JSON, or JUnit where it ends in .xml")
    add("--label", default="", help="what the report calls this host and engine")
    add("--slow", type=float, default=1.0, metavar="FACTOR", help="stretch every time, as under emulation")
    add(
        "-k",
        dest="select",
        default="",
        metavar="EXPRESSION",
        help="the tests whose names match, as of pytest",
    )
    add("-x", dest="first", action="store_true", help="stop at the first failure")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; 0 if all of it passed, 1 if not, 2 if it could not run."""
    asked = build_parser().parse_args(arguments)
    if importlib.util.find_spec("pytest") is None:
        return _complain("pytest is not installed; pip install 'sandboxd[conformance]'")
    image = dict(one.partition("=")[::2] for one in asked.image)
    if unknown := image.keys() - {"base", "python"}:
        return _complain(f"--image {', '.join(sorted(unknown))}: the suite uses base and python")
    options = Options(
        engine=asked.engine,
        runtime=asked.runtime,
        images=asked.images,
        image={"base": "base", "python": "python"} | image,
        socket=asked.socket,
        policies=asked.policies,
        config=asked.config.rstrip("\n") + "\n" if asked.config else "",
        slow=asked.slow,
        label=asked.label,
    )
    # Ended by a signal, it stops its daemon and takes its directory away all the same.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(options, asked.report, asked.select, first=asked.first)
    except (SubjectFailed, errors.SandboxdError) as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return _complain("interrupted")


def _run(options: Options, file: Path | None, select: str, *, first: bool) -> int:
    # Whatever configuration and plugins of pytest are around, they are not the suite's.
    for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
        os.environ.pop(name, None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    import pytest  # noqa: PLC0415  -- an extra, and looked for above

    from sandboxd.conformance import plugin  # noqa: PLC0415
    from sandboxd.conformance.report import Report  # noqa: PLC0415
    from sandboxd.conformance.subject import open_subject  # noqa: PLC0415

    with open_subject(options) as subject:
        report = Report(subject)
        junit = file is not None and file.suffix == ".xml"
        status = pytest.main(
            [
                *("-q", "-rN", "--tb=short", "--strict-markers", "--import-mode=importlib"),
                *("-p", "no:cacheprovider"),
                *("-c", os.devnull, "--rootdir", str(HERE)),
                *(["-k", select] if select else []),
                *(["-x"] if first else []),
                *([f"--junitxml={file}"] if junit else []),
                *(str(HERE / f"test_{area}.py") for area in AREAS),
            ],
            plugins=[plugin, plugin.Suite(subject, report)],
        )
        if file is not None and not junit:
            report.write(file)
    return int(status) if status in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED} else USAGE


def _complain(what: str) -> int:
    print(f"conformance: {what}", file=sys.stderr)  # noqa: T201  -- a command line prints
    return USAGE


if __name__ == "__main__":
    sys.exit(main())
