"""``sandboxd journal verify | head``: reads the records themselves, whether a daemon runs or not."""

from __future__ import annotations

from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sandboxd import errors
from sandboxd.cli import terminal
from sandboxd.cli.daemon import ConfigFile  # noqa: TC001 - cyclopts evaluates annotations
from sandboxd.cli.options import FORMAT, Format

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

__all__ = ["head", "verify"]

FlatFormat = Annotated[Format, Parameter(name="*")]
State = Annotated[Path | None, Parameter(help="The state directory, before the configuration's.")]


@contextmanager
def _records(config: Path | None, state: Path | None) -> Iterator[sqlite3.Connection]:
    from sandboxd.config import load_config  # noqa: PLC0415 - `--help` must not pay for it
    from sandboxd.journal.schema import connect_reader, mapped  # noqa: PLC0415 - same

    path = (state or load_config(config).state) / "journal.sqlite3"
    try:
        present = path.is_file()
    except PermissionError:
        raise errors.NotPermitted(f"no permission for {path}: journal commands run as root") from None
    if not present:
        raise errors.NotFound(f"there is no journal at {path}; name its directory with --state or --config")
    with mapped(), closing(connect_reader(path)) as connection:
        yield connection


def verify(
    *,
    head: Annotated[
        str | None, Parameter(help="A head that was exported earlier, which has to be in the chain.")
    ] = None,
    config: ConfigFile = None,
    state: State = None,
    output: FlatFormat = FORMAT,
) -> int:
    """Check that no record was changed, moved or removed; exit status 1 if one was.

    Records that were cut off at the end can only be noticed with --head: export the head from time to
    time (`sandboxd journal head`) and keep it elsewhere.
    """
    from sandboxd.journal import chain  # noqa: PLC0415 - `--help` must not pay for it

    with _records(config, state) as connection:
        report = chain.verify(connection, head)
    if output.json:
        terminal.print_json(asdict(report) | {"ok": report.ok})
    elif report.ok:
        print(f"{report.records} records are as they were recorded; head {report.head}")
    else:
        terminal.complain(f"{report.problem}; the {report.records} records before it are good")
    return 0 if report.ok else 1


def head(*, config: ConfigFile = None, state: State = None, output: FlatFormat = FORMAT) -> None:
    """Print the number and the digest of the newest record, to be kept elsewhere."""
    from sandboxd.journal import chain  # noqa: PLC0415 - `--help` must not pay for it

    with _records(config, state) as connection:
        found = chain.read_head(connection)
    if output.json:
        terminal.print_json(asdict(found))
    else:
        print(found)
