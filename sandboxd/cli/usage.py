"""The options of ``run-in-sandbox`` and the help that teaches them; and text made safe to print."""

from __future__ import annotations

import argparse
import os
import re
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["USAGE", "build_parser", "parse", "visible"]

USAGE = 125
"""The status of a usage error: 2 would be taken for the tool's own, as env(1) and timeout(1) know."""

DESCRIPTION = """\
Run one command in a sandbox of its own and behave as that command would: its output, its standard
input with -i, and its exit status are passed through. What it may do is written in a policy."""

EPILOG = """\
examples:
  run-in-sandbox -- python3 -c 'print(6 * 7)'
  run-in-sandbox --policy python --input data.csv --input src:app -- python3 app/main.py data.csv
  run-in-sandbox --policy build --input . --artifacts out --timeout 5m -- make
  tar c . | run-in-sandbox -i -- tar tv
  run-in-sandbox --json --timeout 10s -- ./tests | jq .outcome

  The command starts in /workspace, which holds the inputs and is thrown away afterwards; files that the
  policy releases are saved with --artifacts. Only what the policy names is available: often no network,
  never this machine's files.

exit status:
  0-255   the command's own
  124     a time limit or an output limit ended it
  125     it was refused, denied, or sandboxd failed: see the message, or --json for its code
  126     the command could not be executed
  127     the command was not found in the sandbox's image
  128+N   signal N ended it
  130     it was cancelled, such as by Ctrl-C
  137     it ran out of memory (or was killed: --json tells them apart)

socket:
  --socket, else SANDBOXD_SOCKET, else /run/sandboxd/sandboxd.sock, else
  $XDG_RUNTIME_DIR/sandboxd/sandboxd.sock. `sandboxd doctor` says what is missing if nothing answers."""

ONE_CALL = {
    "argv": "with --batch the commands are in its file",
    "key": "--key is for one call; write a `key` into each request of --batch that needs one",
    "input": "--input is for one call; write `inputs` or `tar` into the requests of --batch",
    "interactive": "-i is for one call; write `stdin` into the requests of --batch",
    "artifacts": "--artifacts is for one call; get the files of a batch by the `id` of each result",
    "workspace": "--workspace is for one call; for a batch see `sandboxd session create --from DIR`, "
    "and --session",
    "pull": "--pull is for one call; after a batch in a session see `sandboxd session pull`",
    "upload": "--upload is for one call; for a batch see `sandboxd session create --upload`",
}
"""What does not go with --batch, and what to do about it."""

# C0 and C1 controls, and what reorders or hides text; a backslash is left, so that plain paths stay plain.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_NUMBER = re.compile(r"\d+(\.\d+)?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")
PRIORITIES = range(-10, 11)
"""Those that a request may have: ``models.Request`` has them too, and takes long to import."""


def visible(text: str, most: int = 2000) -> str:
    r"""Text of a tool or a stranger made safe for a terminal: control characters become ``\xNN``."""
    cut = text if len(text) <= most else text[:most] + "…"
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), cut)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """With a width of its own, and colours only for help: what argparse would ask takes long to import."""

    def __init__(self, prog: str) -> None:
        columns = os.environ.get("COLUMNS", "")
        try:
            width = int(columns) if columns.isdecimal() else os.get_terminal_size().columns
        except OSError:  # not a terminal
            width = 0
        super().__init__(prog, width=(width or 80) - 2)

    def _set_color(self, color: bool, **_options: object) -> None:  # noqa: FBT001  -- argparse's, of Python 3.14
        self._color = color

    def __getattr__(self, name: str) -> object:
        if name not in {"_theme", "_decolor"} or "_color" not in self.__dict__:
            raise AttributeError(name)
        getattr(super(), "_set_color")(self._color)  # noqa: B009  -- earlier Pythons lack it
        return self.__dict__[name]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {visible(message)}\n{self.prog}: see `{self.prog} --help`\n")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _duration(text: str) -> str:
    """A bare number is seconds, as timeout(1) has it; the daemon judges the rest."""
    return f"{text}s" if _NUMBER.fullmatch(text) else text


def _size(text: str) -> str:
    """A bare number is bytes."""
    return f"{text}B" if text.isdecimal() else text


def _priority(text: str) -> int:
    if not _INTEGER.fullmatch(text) or int(text) not in PRIORITIES:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a whole number from {PRIORITIES[0]} to {PRIORITIES[-1]}"
        )
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The parser; every option has a help text, which a test holds."""
    parser = _Parser(
        prog="run-in-sandbox",
        usage="%(prog)s [options] -- COMMAND [ARGUMENT…]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--policy", metavar="P", help="the policy to run under (default: default); `sandboxd policy list`")
    add("--input", metavar="SRC[:DST]", action="append", default=[],
        help="copy a file or a directory into the workspace, as DST or under its own name; `.` puts the "
             "content of this directory there; may be repeated")  # fmt: skip
    add("--artifacts", metavar="DIR", help="save the files that the policy releases below DIR")
    add(
        "--timeout",
        metavar="T",
        type=_duration,
        help="end it after T of running: 10s, 500ms, 5m; below the policy's",
    )
    add(
        "--deadline",
        metavar="T",
        type=_duration,
        help="end it after T from now, waiting in the queue included",
    )
    add("--memory", metavar="S", type=_size, help="give it less memory than the policy does: 64MiB")
    add("--env", metavar="K=V", type=_pair, action="append", default=[],
        help="set a variable; nothing of this environment is passed on by itself; repeatable")  # fmt: skip
    add("--cwd", metavar="D", help="the directory to start in (default: /workspace)")
    add("-i", "--interactive", action="store_true", help="pass standard input on; else it is empty")
    add("--session", metavar="S", help="run in a session, whose workspace lasts between calls")
    add("--workspace", metavar="DIR",
        help="run on a directory of yours, which is lent and not copied; what changes is said")  # fmt: skip
    add("--pull", action="store_true", help="with --workspace: bring what changed into the directory")
    add("--upload", action="store_true",
        help="with --workspace: lend nothing, but copy it, without what git ignores there")  # fmt: skip
    add(
        "--key", metavar="K", help="idempotency key: the same key and request give the same outcome, run once"
    )
    add(
        "--callback",
        metavar="C",
        help="whom to tell of its end: a program of the configuration by name, or a socket by its path",
    )
    add(
        "--priority",
        metavar="N",
        type=_priority,
        help="-10 to 10 (default: 0): which of your calls that wait goes first; others' are not passed",
    )
    add("--label", metavar="K=V", type=_pair, action="append", default=[],
        help="a label to find the call by; may be repeated")  # fmt: skip
    add(
        "--json",
        action="store_true",
        help="print one JSON object, the invocation, and nothing else on stdout",
    )
    add(
        "--batch",
        metavar="FILE",
        help="run the requests of FILE (- for standard input), one JSON object a line, and print what came "
        "of each, one a line, as it ends; --policy, --session, --timeout, --deadline, --memory, --cwd, "
        "--callback, --priority, --env and --label are for each that does not say so itself",
    )
    add("--parallel", metavar="N", type=int, help="with --batch: so many at the same time (default: 8)")
    add("--socket", metavar="S", help="the daemon's socket")
    add("argv", metavar="COMMAND", nargs=argparse.REMAINDER, help="the command and its arguments")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. Exits with 125 for a usage error."""
    parser = build_parser()
    # argparse removes `--` from a remainder in ways that differ between Python versions: cut it here.
    own = list(arguments)
    command: list[str] = []
    if "--" in own:
        cut = own.index("--")
        own, command = own[:cut], own[cut + 1 :]
    options = parser.parse_args(own)
    if options.argv and "--" in arguments:
        # `run-in-sandbox sh -c x -- y`: the command began before the `--`, which is its own.
        options.argv = [*options.argv, "--", *command]
    else:
        options.argv = [*options.argv, *command]
    if options.parallel is not None and options.batch is None:
        parser.error("--parallel is for --batch")
    if options.batch is not None:
        given = [why for name, why in ONE_CALL.items() if getattr(options, name) not in (None, False, [])]
        return parser.error(given[0]) if given else options
    if not options.argv:
        parser.error("which command? Write it after --, such as: run-in-sandbox -- python3 -V")
    if options.workspace is not None and options.session is not None:
        parser.error("--workspace makes a session of its own; leave out --session")
    if options.pull and options.workspace is None:
        parser.error("--pull brings changes into the directory of --workspace, which is missing")
    if options.upload and options.workspace is None:
        parser.error("--upload copies the directory of --workspace, which is missing")
    return options
