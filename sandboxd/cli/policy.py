"""``sandboxd policy check | show | explain | list | schema``.

Files are checked here, without a daemon. The other commands ask the daemon for the policies that are in
force; ``--local`` reads the files that a daemon with this configuration would read.
"""

from __future__ import annotations

from io import StringIO
from pathlib import Path  # noqa: TC003 - cyclopts evaluates annotations
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sandboxd import errors
from sandboxd.cli import terminal
from sandboxd.cli.daemon import ConfigFile  # noqa: TC001 - cyclopts evaluates annotations
from sandboxd.cli.options import FORMAT, REMOTE, Format, Remote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sandboxd.models import PolicyInfo, PolicyProblem
    from sandboxd.policy import Policy, PolicySet

__all__ = ["check", "explain", "list_policies", "load", "schema", "show"]

BUILT_IN = "(built-in default)"  # the file of an origin that nobody wrote
Name = Annotated[str, Parameter(help="The policy's name.")]
Local = Annotated[
    bool,
    Parameter(negative="", help="Read the policy files here instead of asking a daemon (needs no daemon)."),
]
FlatFormat = Annotated[Format, Parameter(name="*")]
FlatRemote = Annotated[Remote, Parameter(name="*")]


def load(config: Path | None, beside: Sequence[Path] = ()) -> PolicySet:
    """The policies that a daemon would load, and those in the directories ``beside``."""
    from sandboxd.config import load_config  # noqa: PLC0415 - only when files are read here
    from sandboxd.policy import load_policies, shipped_policies  # noqa: PLC0415 - same

    settings = load_config(config)
    directories = [shipped_policies(), *settings.policies, *beside]
    floor = settings.floor if settings.floor is not None and settings.floor.exists() else None
    try:
        return load_policies(list(dict.fromkeys(directories)), floor, host_network=settings.network.host)
    except OSError as error:
        raise errors.ConfigInvalid(f"cannot read {error.filename}: {error.strerror}") from None


def check(
    files: Annotated[list[Path], Parameter(help="Policy files; `floor.yaml` is checked as a floor.")],
    /,
    *,
    config: ConfigFile = None,
    output: FlatFormat = FORMAT,
) -> int:
    """Check policy files, without a daemon: every problem of every file as FILE:LINE:COLUMN: MESSAGE.

    A file may extend the shipped policies, the configured ones, and those beside it. What is allowed and
    discouraged is a note on standard error. Exit status 1 if there is any problem.
    """
    from sandboxd.policy import advice, check_text  # noqa: PLC0415 - `--help` must not pay for it
    from sandboxd.policy.source import read  # noqa: PLC0415 - same

    base = load(config, [file.resolve().parent for file in files])
    problems: list[PolicyProblem] = []
    notes: list[PolicyProblem] = []
    for file in files:
        text, unreadable = read(file)
        problems += unreadable if text is None else check_text(text, str(file), base)
        notes += [] if text is None else advice(text, str(file))
    if output.json:
        found = {"problems": problems, "notes": notes}
        terminal.print_json({name: [terminal.wire(one) for one in listed] for name, listed in found.items()})
    else:
        for problem in problems:
            terminal.print_text(str(problem))
        for note in notes:
            terminal.complain(str(note))
    return 1 if problems else 0


def _infos(remote: Remote, config: Path | None, *, local: bool) -> list[PolicyInfo]:
    if not local:
        return list(remote.client().policies())
    policies = load(config)
    return [policies.get(name).info(problems=policies.problems_of(name)) for name in policies.names()]


def list_policies(*, local: Local = False, config: ConfigFile = None, remote: FlatRemote = REMOTE) -> None:
    """List the policies that you may use; what is wrong with policy files is on stderr."""
    infos = _infos(remote, config, local=local)
    if remote.json:
        terminal.print_json({"policies": [terminal.wire(info) for info in infos]})
        return
    rows = [
        (one.name, one.image, one.description, f"{len(one.problems)} problems" if one.problems else "")
        for one in infos
    ]
    terminal.print_rows(("NAME", "IMAGE", "DESCRIPTION", ""), rows, empty="no policy is in force for you")
    # Also of files that never were good, which no policy of the list stands for.
    for problem in load(config).problems if local else remote.client().health().problems:
        terminal.complain(str(problem))


def show(name: Name, *, local: Local = False, config: ConfigFile = None, remote: FlatRemote = REMOTE) -> None:
    """Print a policy as it is in force: everything it inherits filled in, as YAML."""
    info = load(config).get(name).info(resolved=True) if local else remote.client().policy(name)
    if remote.json:
        terminal.print_json(terminal.wire(info))
        return
    terminal.print_text(f"# {info.file}\n# {info.digest}\n{dump(info.resolved or {})}")


def dump(value: Any) -> str:
    """A JSON-compatible value as YAML, in its own order."""
    from ruamel.yaml import YAML  # noqa: PLC0415 - only to print

    text = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # its annotation is None
    yaml.width = 110
    yaml.dump(value, text)
    return text.getvalue().rstrip("\n")


def explain(
    name: Name,
    /,
    *argv: Annotated[str, Parameter(help="After --: the command to explain the policy for.")],
    local: Local = False,
    config: ConfigFile = None,
    remote: FlatRemote = REMOTE,
) -> None:
    """Print every control of a policy with the file and the line that set it; nothing runs.

    With a command, also the command and its environment as they would be.
    """
    if local:
        document: dict[str, Any] = {"explain": _explained(load(config).get(name), argv)}
    else:
        document = terminal.wire(remote.client().plan(list(argv) or ["true"], policy=name))
    if not argv:  # a plan needs a command, and nobody gave one
        document["explain"] = [one for one in document["explain"] if one.get("control") != "command"]
    if remote.json:
        terminal.print_json(document)
        return
    rows = [
        (one.get("control"), one.get("value"), _place(one), one.get("note") or "")
        for one in document["explain"]
    ]
    terminal.print_rows(("CONTROL", "VALUE", "SET AT", ""), rows, empty="the policy sets nothing")


def _explained(policy: Policy, argv: Sequence[str]) -> list[dict[str, Any]]:
    from sandboxd.models import Request  # noqa: PLC0415 - only when files are read here
    from sandboxd.narrowing import make_plan  # noqa: PLC0415 - same
    from sandboxd.plan import ImageRef, make_shape  # noqa: PLC0415 - same
    from sandboxd.policy import explain  # noqa: PLC0415 - same

    if not argv:
        return explain(policy)
    # which image the name stands for is the daemon's to say, and no row is about it
    shape = make_shape(policy, ImageRef(policy.image, ""))
    return explain(policy, make_plan(policy, shape, Request(argv=list(argv))))


def _place(line: dict[str, Any]) -> str:
    if line.get("line"):
        return f"{line.get('file')}:{line['line']}"
    return "built in" if line.get("file") == BUILT_IN else str(line.get("file"))


def schema() -> None:
    """Print the JSON Schema of policy files, for editors."""
    from sandboxd.policy.jsonschema import schema_text  # noqa: PLC0415 - `--help` must not pay for it

    print(schema_text().rstrip("\n"))
