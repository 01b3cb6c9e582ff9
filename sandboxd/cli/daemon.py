"""``sandboxd serve | doctor``."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from importlib import import_module
from inspect import iscoroutinefunction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import anyio
from cyclopts import Parameter

from sandboxd.cli import terminal
from sandboxd.cli.options import FORMAT, Format

if TYPE_CHECKING:
    from collections.abc import Callable

    from sandboxd.engine.base import Check

__all__ = ["ConfigFile", "doctor", "serve"]

ConfigFile = Annotated[
    Path | None, Parameter(help="The daemon's configuration; else /etc/sandboxd/sandboxd.yaml, if it exists.")
]


def _call(module: str, name: str, *arguments: Any, **options: Any) -> Any:
    """Call a function of the composition root, which nothing but this command has a reason to import."""
    function: Callable[..., Any] = partial(getattr(import_module(module), name), *arguments, **options)
    return anyio.run(function) if iscoroutinefunction(function) else function()


def serve(
    *,
    config: ConfigFile = None,
    socket: Annotated[
        Path | None, Parameter(help="The socket to listen on, before the configuration's.")
    ] = None,
    state: Annotated[Path | None, Parameter(help="The state directory, before the configuration's.")] = None,
) -> int:
    """Run the daemon in the foreground until SIGTERM or SIGINT.

    It takes over a socket that systemd passes, and tells systemd when it is ready.
    """
    from sandboxd.config import load_config  # noqa: PLC0415 - `--help` must not pay for it

    result = _call("sandboxd.daemon", "serve", load_config(config), socket=socket, state=state)
    return result if isinstance(result, int) else 0


def doctor(*, config: ConfigFile = None, output: Annotated[Format, Parameter(name="*")] = FORMAT) -> int:
    """Say what this host can and cannot enforce, each line with what to do about it.

    Exit status 1 if something that no policy can do without is missing.
    """
    from sandboxd.config import load_config  # noqa: PLC0415 - `--help` must not pay for it

    checks: list[Check] = list(_call("sandboxd.doctor", "examine", load_config(config)))
    usable = all(check.ok for check in checks if check.required)
    if output.json:
        terminal.print_json({"usable": usable, "checks": [asdict(check) for check in checks]})
    else:
        rows = [
            (_verdict(check), check.name, check.found, "" if check.ok else check.advice) for check in checks
        ]
        terminal.print_rows(("", "CHECK", "FOUND", "WHAT TO DO"), rows, empty="nothing was checked")
    return 0 if usable else 1


def _verdict(check: Check) -> str:
    if check.ok:
        return "ok"
    return "MISSING" if check.required else "without"
