"""``sandboxd``: the daemon, and what an operator asks it.

Every command lives in a module of its own kind and is imported when it is called, so that each costs
only what it uses. What we fail at is one line on stderr that says what to do, with status 1; a wrong
command line is status 2; with ``--json`` the problem document is printed on stdout as well.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from cyclopts import App, CycloptsError

import sandboxd
from sandboxd import errors
from sandboxd.cli import terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["build_app", "main"]

FAILED = 1
USAGE = 2
SHOWN = 200  # lines of problems of one error

# One line: the help breaks it to the width of the terminal.
EPILOGUE = (
    "Start here: `sandboxd doctor` says what this host can enforce, `sandboxd serve` runs the daemon, and "
    "`run-in-sandbox -- COMMAND` runs a command. Exit status: 0, 1 for an error, 2 for a wrong command line."
)

COMMANDS = {
    "serve": "daemon:serve",
    "doctor": "daemon:doctor",
    "ps": "calls:ps",
    "inspect": "calls:inspect",
    "logs": "calls:logs",
    "cancel": "calls:cancel",
    "forward": "forward:forward",
    "replay": "replay:replay",
    "bench": "bench:bench",
}
GROUPS = {
    "policy": (
        "What policies allow, and whether their files are right.",
        {
            "check": "policy:check",
            "show": "policy:show",
            "explain": "policy:explain",
            "list": "policy:list_policies",
            "schema": "policy:schema",
        },
    ),
    "image": (
        "The root file systems that calls run on; works on the store itself.",
        {
            "build": "image:build",
            "import": "image:import_image",
            "pull": "image:pull",
            "ls": "image:ls",
            "verify": "image:verify",
            "rm": "image:rm",
        },
    ),
    "secret": (
        "The daemon's store of secrets, which policies give to calls.",
        {
            "set": "secret:set_secret",
            "rotate": "secret:rotate",
            "ls": "secret:ls",
            "rm": "secret:rm",
        },
    ),
    "session": (
        "Lines of calls that share a workspace, and their checkpoints.",
        {
            "create": "session:create",
            "ls": "session:list_sessions",
            "show": "session:show",
            "rm": "session:delete",
            "checkpoints": "session:checkpoints",
            "fork": "session:fork",
            "checkpoint": "container:checkpoint",
            "end": "container:end",
            "rollback": "session:rollback",
            "discard": "session:discard",
            "diff": "checkout:diff",
            "pull": "checkout:pull",
            "push": "checkout:push",
            "lend": "checkout:lend",
            "files": "sessionfiles:files",
            "get": "sessionfiles:get",
            "put": "sessionfiles:put",
            "unlink": "sessionfiles:unlink",
            "export": "sessionfiles:export",
            "import": "sessionfiles:bring",
        },
    ),
    "journal": (
        "The chained records of all calls.",
        {
            "verify": "journal:verify",
            "head": "journal:head",
            "key": "journal:key",
            "export": "journal:export",
            "show": "journal:show",
            "reindex": "journal:reindex",
            "search": "search:search",
            "prune": "search:prune",
        },
    ),
}


def build_app() -> App:
    """The command line as a tree; nothing but the tree is imported."""
    app = App(
        name="sandboxd",
        help="Run each tool call of an agent in a container of its own, under a policy.",
        help_epilogue=EPILOGUE,
        version=sandboxd.__version__,
        help_format="plaintext",
        result_action="return_value",
    )
    for name, home in COMMANDS.items():
        app.command(f"sandboxd.cli.{home}", name=name)
    for name, (help_text, commands) in GROUPS.items():
        group = App(name=name, help=help_text, result_action="return_value")
        for command, home in commands.items():
            group.command(f"sandboxd.cli.{home}", name=command)
        app.command(group)
    return app


def _resolved(app: App, tokens: Sequence[str]) -> App:
    """The tree with those commands imported whose summaries a help page will list."""
    first, second = [*tokens, "", ""][:2]
    if first in GROUPS and second not in GROUPS[first][1]:
        for command in GROUPS[first][1]:
            app[first][command]
    elif first not in COMMANDS and first not in GROUPS:
        for command in COMMANDS:
            app[command]
    return app


def _explain(error: errors.SandboxdError) -> None:
    problems = error.details.get("problems")
    if isinstance(problems, list) and problems and all(isinstance(one, dict) for one in problems):
        for one in problems[:SHOWN]:
            where = ":".join(str(one.get(key, "?")) for key in ("file", "line", "column"))
            terminal.complain(f"{where}: {one.get('message', '')}")
        if len(problems) > SHOWN:
            terminal.complain(f"and {len(problems) - SHOWN} more problems")
        return
    terminal.complain(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the status to exit with."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    own = tokens[: tokens.index("--")] if "--" in tokens else tokens
    try:
        status = _resolved(build_app(), tokens)(tokens, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except CycloptsError as error:
        terminal.complain(" ".join(str(error).split()))
        terminal.complain("see `sandboxd --help`, or --help after a command")
        return USAGE
    except errors.SandboxdError as error:
        _explain(error)
        if "--json" in own:
            from sandboxd.cli.run import problem  # noqa: PLC0415 - only for an error

            terminal.print_json(problem(error))
        return FAILED
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader went away, as `head` does; there is nobody left to write to (see SIGPIPE in
        # the documentation of Python's signal module).
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as error:
        terminal.complain(f"{error.filename or 'the system'}: {error.strerror or error}")
        return FAILED
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
