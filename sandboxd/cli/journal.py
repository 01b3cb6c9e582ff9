"""``sandboxd journal verify | head | key``: reads the records themselves, whether a daemon runs or not."""

from __future__ import annotations

import os
import re
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from cyclopts import Parameter

from sandboxd import errors
from sandboxd.cli import terminal
from sandboxd.cli.daemon import ConfigFile  # noqa: TC001 - cyclopts evaluates annotations
from sandboxd.cli.options import FORMAT, Format

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

    from sandboxd.journal.signing import KeyPlace
    from sandboxd.journal.verify import VerifyReport

__all__ = ["export", "head", "key", "records", "reindex", "show", "verify"]

FlatFormat = Annotated[Format, Parameter(name="*")]
State = Annotated[Path | None, Parameter(help="The state directory, before the configuration's.")]
Keys = Annotated[
    tuple[Path, ...],
    Parameter(
        name="--key",
        negative=(),
        help="A public key (PEM) that is believed, and no other is; may be repeated.",
    ),
]
MAX_HEAD = 4096  # bytes of a file with a head
SHOWN = 20  # lines of damage


class Records(NamedTuple):
    """The journal of a state directory, open for reading."""

    connection: sqlite3.Connection
    state: Path
    key: KeyPlace


@contextmanager
def records(config: Path | None, state: Path | None) -> Iterator[Records]:
    """Open the journal that the configuration, or the command line, names.

    Raises NotFound, NotPermitted, ConfigInvalid for one of a newer version.
    """
    from sandboxd.config import load_config  # noqa: PLC0415 - `--help` must not pay for it
    from sandboxd.journal import signing  # noqa: PLC0415 - same
    from sandboxd.journal.schema import check_known, connect_reader, mapped  # noqa: PLC0415 - same

    loaded = None if state is not None and config is None else load_config(config)
    directory = state or (loaded.state if loaded else Path())
    path = _present(directory)
    place = signing.place_of(loaded.journal.key if loaded else None, directory, os.environ)
    with mapped(), closing(connect_reader(path)) as connection:
        if not check_known(connection, path):
            raise errors.NotFound(f"the journal {path} is empty")
        yield Records(connection, directory, place)


def _present(state: Path) -> Path:
    path = state / "journal.sqlite3"
    try:
        present = path.is_file()
    except PermissionError:
        raise errors.NotPermitted(f"no permission for {path}: journal commands run as root") from None
    if not present:
        raise errors.NotFound(f"there is no journal at {path}; name its directory with --state or --config")
    return path


def verify(
    *,
    head: Annotated[
        str | None,
        Parameter(help="A file with a signed head, or a head as text, which has to be in the chain."),
    ] = None,
    key: Keys = (),
    bundle: Annotated[
        Path | None, Parameter(help="Check a bundle of `sandboxd journal export`; needs no journal.")
    ] = None,
    deep: Annotated[
        bool, Parameter(negative=(), help="Read every stream, artifact and file of a session too.")
    ] = False,
    config: ConfigFile = None,
    state: State = None,
    output: FlatFormat = FORMAT,
) -> int:
    """Check that no record was changed, moved or removed; exit status 1 if one was.

    Whoever can write the journal can cut off records, or write it anew, together with the heads in it: only
    --head, with what `sandboxd journal head` printed and was kept elsewhere, shows that. Without --key the
    node's own key is believed, which is beside the journal: name the one that you know.
    """
    from sandboxd.journal.verify import verify as check  # noqa: PLC0415 - `--help` must not pay for it

    if bundle is not None:
        if head is not None or deep or state is not None or config is not None:
            raise errors.InvalidRequest("--bundle goes with --key and --json alone", field="bundle")
        return _bundle(bundle, key, json=output.json)
    expected = None if head is None else _head_of(head)
    with records(config, state) as opened:
        keys = _known(opened, key)
        report = check(opened.connection, expected, keys=keys, deep=opened.state if deep else None)
        if deep:
            _look_at_sessions(opened, report)
    return told(report, json=output.json)


def _look_at_sessions(opened: Records, report: VerifyReport) -> None:
    from sandboxd.workspace.audit import examine  # noqa: PLC0415 - `--help` must not pay for it

    found = examine(opened.connection, opened.state)
    report.layers, report.unknown, report.note = found.layers, found.unknown, found.note
    report.damaged += found.damaged


def told(report: VerifyReport, *, json: bool) -> int:
    """Say what was found; returns the exit status."""
    if json:
        terminal.print_json(asdict(report) | {"ok": report.ok})
        return 0 if report.ok else 1
    if report.problem is not None:
        terminal.complain(f"{report.problem}; the {report.records} records before it are good")
    for damage in report.damaged[:SHOWN]:
        of = f"record {damage.n}, call {damage.id or 'unknown'}: " if damage.n else ""
        terminal.complain(f"{of}{damage.what}")
    if len(report.damaged) > SHOWN:
        terminal.complain(f"{len(report.damaged) - SHOWN} more differ; --json lists them")
    if report.remakable:
        terminal.complain("`sandboxd journal reindex` makes indexes again, with the daemon stopped")
    if report.problem is None:
        _tell_what_holds(report)
    return 0 if report.ok else 1


def _tell_what_holds(report: VerifyReport) -> None:
    read = f", {report.files} files were read" if report.files else ""
    read += f", {report.layers} layers of sessions were read" if report.layers else ""
    print(f"{report.records} records are as they were recorded{read}; head {report.head}")
    if report.note:
        print(report.note)
    if report.unknown:
        print(f"of {report.unknown} merged layers no digest was kept, by an earlier version")
    if report.signed:
        print(f"signed up to record {report.signed} with the key {report.key}")
    if report.signed < report.records:
        print(f"nothing signed vouches for records after {report.signed}")
    if report.pruned:
        print(f"{report.pruned} of them were pruned: only their headers are there")


def _bundle(path: Path, named: tuple[Path, ...], *, json: bool) -> int:
    from sandboxd.journal import proof, signing  # noqa: PLC0415 - `--help` must not pay for it

    report = proof.check(path, {signing.key_id(signing.read_public(one)) for one in named})
    if json:
        terminal.print_json(asdict(report) | {"ok": report.ok})
        return 0 if report.ok else 1
    if report.problem is not None:
        terminal.complain(report.problem)
    for what in report.damaged[:SHOWN]:
        terminal.complain(what)
    if report.problem is None:
        print(f"{report.calls} calls, {report.records} records, {report.files} files; head {report.head}")
        trust = "a key that you named" if named else "the key in the bundle: compare its id with the node's"
        print(f"signed with {report.key}, {trust}")
        for session in report.sessions:
            print(f"all calls of session {session} among these records are in it")
        if report.pruned:
            print(f"{report.pruned} of the calls have only their headers there, as after pruning")
        for what in report.gone[:SHOWN]:
            print(f"pruned: {what}")
        if len(report.gone) > SHOWN:
            print(f"{len(report.gone) - SHOWN} more are pruned; --json lists them")
        for what in report.absent[:SHOWN]:
            print(f"not in the bundle: {what}")
    return 0 if report.ok else 1


def export(
    *calls: Annotated[str, Parameter(help="Ids of calls.")],
    to: Annotated[Path, Parameter(name=["--output", "-o"], help="The file to write.")],
    session: Annotated[str | None, Parameter(help="All calls of a session, by its id or name.")] = None,
    all_calls: Annotated[bool, Parameter(name="--all", negative=(), help="All calls.")] = False,
    config: ConfigFile = None,
    state: State = None,
    output: FlatFormat = FORMAT,
) -> None:
    """Write calls with their records, output and artifacts into a file that verifies without a daemon."""
    from sandboxd.journal import bundle, signing  # noqa: PLC0415 - `--help` must not pay for it

    if not (calls or session or all_calls):
        raise errors.InvalidRequest("name calls, or give --session or --all", field="calls")
    with records(config, state) as opened:
        chosen = bundle.select(opened.connection, calls, session=session, everything=all_calls)
        key = signing.NodeKey.load(opened.key)
        done = bundle.export(opened.connection, opened.state, key, chosen, to)
    if output.json:
        terminal.print_json(asdict(done))
    else:
        print(f"{done.calls} calls and {done.records} records in {to}; head {done.head}")


def reindex(*, config: ConfigFile = None, state: State = None, output: FlatFormat = FORMAT) -> None:
    """Make indexes again when `sandboxd journal verify` says that one is damaged or differs from its records.

    The daemon has to be stopped. Nothing else is changed, and nothing at all where a record cannot be read.
    """
    from sandboxd.config import load_config  # noqa: PLC0415 - `--help` must not pay for it
    from sandboxd.journal import btrees, schema, sessioncalls  # noqa: PLC0415 - same
    from sandboxd.journal.lock import Lock  # noqa: PLC0415 - same

    directory = load_config(config).state if state is None else state
    path = _present(directory)
    try:
        lock = Lock(directory / "lock")
    except OSError as error:
        raise errors.HostFailed(f"{directory} cannot be locked: {error.strerror}") from error
    try:
        with (
            schema.mapped(),
            closing(schema.connect_writer(path)) as connection,
            closing(schema.connect_reader(path)) as reader,
        ):
            sessioncalls.check_records(reader)
            damaged = list(btrees.checked(reader, deep=True))
            made = btrees.remake(path, damaged)
            connection.execute("BEGIN IMMEDIATE")
            found = sessioncalls.fill(connection, reader)
            connection.execute("COMMIT")
            left = [one for one in btrees.checked(reader, deep=True) if one.name != "queue"]  # a daemon's
    finally:
        lock.release()
    if output.json:
        terminal.print_json({"records": found, "indexes": [one.name for one in made]})
    else:
        for one in made:
            print(f"the {one} was made again")
        print(f"{found} records are of a session; the index has them")
    if left:
        raise errors.JournalCorrupt(schema.damage_told(left))


def show(
    call: Annotated[str, Parameter(name="CALL", help="The id of a call, or the number of a record.")],
    *,
    config: ConfigFile = None,
    state: State = None,
    output: FlatFormat = FORMAT,
) -> int:
    """Show a record as it is in the chain, and whether what it names is as it was; exit status 1 if not."""
    import json  # noqa: PLC0415 - `--help` must not pay for it

    from sandboxd import canonical  # noqa: PLC0415 - same
    from sandboxd.journal.evidence import Evidence  # noqa: PLC0415 - same

    with records(config, state) as opened:
        row = opened.connection.execute(
            "SELECT r.n, r.digest, r.header, i.doc, i.pruned FROM records AS r"
            " LEFT JOIN invocations AS i ON i.id = r.id WHERE r.id = ? OR CAST(r.n AS TEXT) = ?",
            (call, call),
        ).fetchone()
        if row is None:
            raise errors.NotFound(f"there is no record of {call!r}; a call that still runs has none yet")
        n, digest, data, doc, pruned = row
        problems = [] if canonical.digest_bytes(data) == digest else ["the header no longer has its digest"]
        try:
            header = json.loads(data)
        except ValueError:
            raise errors.JournalCorrupt(f"record {n} cannot be read: it was changed") from None
        if doc is None and pruned is None:
            problems.append("the body is gone, and it was not retention that took it")
        if doc is not None:
            if canonical.digest_bytes(doc) != header.get("body"):
                problems.append("the body no longer has its digest")
            found = Evidence(opened.state).problems(header)
            problems += [f"{what} {problem}" for what, problem in found if problem]
    if output.json:
        terminal.print_json(
            {"n": n, "digest": digest, "header": header, "pruned": pruned, "problems": problems}
        )
        return 1 if problems else 0
    print(f"record {n}, {digest}")
    for name, value in header.items():
        print(f"{name + ':':20}{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    if pruned is not None:
        print(f"body, output and artifacts were pruned {terminal.age(pruned)} ago")
    for problem in problems:
        terminal.complain(f"record {n}: {problem}")
    return 1 if problems else 0


def head(*, config: ConfigFile = None, state: State = None, output: FlatFormat = FORMAT) -> None:
    """Print the head of the newest record, signed with the node's key, to be kept elsewhere.

    Where the key cannot be read here, it is the newest head that the daemon signed.
    """
    import time  # noqa: PLC0415 - `--help` must not pay for it

    from sandboxd.journal import chain, signing  # noqa: PLC0415 - same

    del output  # it is one line of JSON in any case
    with records(config, state) as opened:
        try:
            found = signing.NodeKey.load(opened.key).sign(
                chain.read_head(opened.connection), time.time_ns() // 1000
            )
        except errors.SandboxdError:
            row = opened.connection.execute("SELECT signed FROM heads ORDER BY n DESC LIMIT 1").fetchone()
            if row is None:
                raise
            found = row[0]
    print(found.decode())


def key(*, config: ConfigFile = None, state: State = None, output: FlatFormat = FORMAT) -> None:
    """Print the public key that heads are signed with."""
    from sandboxd.journal import signing  # noqa: PLC0415 - `--help` must not pay for it

    with records(config, state) as opened:
        public = _public(opened)
    if output.json:
        terminal.print_json({"id": signing.key_id(public), "public": signing.pem(public).decode()})
    else:
        print(signing.pem(public).decode(), end="")


def _head_of(text: str) -> str:
    if re.fullmatch(r"([0-9]+:)?sha256:[0-9a-f]{64}", text) or text.lstrip().startswith("{"):
        return text
    try:
        with Path(text).open("rb") as file:
            data = file.read(MAX_HEAD)
    except OSError as error:
        raise errors.InvalidRequest(
            f"--head {text!r} is no head, and no file with one: {error.strerror}", field="head"
        ) from None
    return data.decode("utf-8", "replace").strip()


def _public(opened: Records) -> bytes:
    """This node's public key, also where the key itself is the daemon's alone. Raises NotFound."""
    from sandboxd.journal import signing  # noqa: PLC0415 - `--help` must not pay for it

    try:
        return signing.NodeKey.load(opened.key).public
    except errors.NotFound:
        if not (opened.state / signing.PUBLIC).exists():
            raise
        return signing.read_public(opened.state / signing.PUBLIC)


def _known(opened: Records, named: tuple[Path, ...]) -> set[str]:
    """The ids of the keys whose heads are believed: those that were named alone, else all of this node's.

    What lies beside the journal is as trustworthy as the journal.
    """
    from sandboxd.journal import signing  # noqa: PLC0415 - `--help` must not pay for it

    if named:
        return {signing.key_id(signing.read_public(path)) for path in named}
    found = {signing.key_id(key) for key in signing.known(opened.state)}
    with suppress(errors.NotFound):  # an older state, or a copy of one without its key
        found.add(signing.key_id(_public(opened)))
    return found
