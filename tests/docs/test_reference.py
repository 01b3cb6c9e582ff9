"""The reference pages name everything that the code has, and nothing that it has not."""

from __future__ import annotations

import importlib
import inspect
import re
import signal
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING, Any, get_args

import pytest
from daemons import until
from pages import ROOT, code, page
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from sandboxd import AsyncClient, Client, artifacts, errors, models, units
from sandboxd.api.app import build
from sandboxd.cli import main as command_line
from sandboxd.cli.usage import build_parser
from sandboxd.config import Config
from sandboxd.images.recipe import Recipe
from sandboxd.plan import ImageRef, make_shape
from sandboxd.policy import load_policies, shipped_policies
from sandboxd.policy.floor import FORMATS
from sandboxd.policy.network import Network
from sandboxd.policy.retry import Raise, Retry
from sandboxd.policy.schema import FloorFile, PolicyFile
from sandboxd.policy.trust import BUNDLES, TRUSTED, VARIABLES
from sandboxd.supervisor.ending import Ended, Ending, Evidence, Stopped, limits_reached

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CALLS, POLICIES, API = page("docs/calls.md"), page("docs/policies.md"), page("docs/api.md")
SHIPPED = load_policies([shipped_policies()])
COMMANDS, CONFIGURATION = page("docs/command-line.md"), page("docs/configuration.md")


def leaves(model: type[BaseModel], stop: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted path of every key of a strict document, and its default."""
    for name, field in model.model_fields.items():
        path = prefix + (field.alias or name)
        inner = next(iter(_models(field.annotation)), None)
        many = "tuple[" in str(field.annotation)
        if inner is not None and path not in stop:
            named = "dict[" in str(field.annotation)
            yield from leaves(inner, stop, path + ("[]." if many else ".NAME." if named else "."))
        else:
            yield path, field.get_default(call_default_factory=True)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def shown(path: str, value: Any, formats: dict[str, Callable[[int], str]]) -> str:
    """A default as the tables write it."""
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "none"
    if path in formats:
        return f"`{formats[path](value)}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`" if value != ("*",) else '`["*"]`'
    return '`""`' if value == "" else f"`{value}`"


def test_every_key_of_a_policy_is_documented_with_its_default() -> None:
    formats = {f"limits.{path}": show for path, show in FORMATS.items()}
    formats |= {"filesystem.size": units.format_size, "filesystem.inodes": units.format_count}
    formats |= {"process.umask": lambda value: f'"{value:04o}"'}
    later = {"network", "secrets", "retry", "expose"}
    wanted = {path: shown(path, default, formats) for path, default in leaves(PolicyFile, later)}
    del wanted["network"]
    wanted |= {
        f"network.{key}": shown(key, default, {})
        for key, default in leaves(Network, {"allow", "deny", "budget"})
    }
    # what is not written for one stream is the other's, and truncate in the end
    wanted |= dict.fromkeys(("limits.stdout.on_limit", "limits.stderr.on_limit"), "`truncate`")
    found = {code(row[0])[0]: row[2] for row in POLICIES.rows("key") if len(row) == 4}
    assert found == wanted


def test_every_key_of_a_floor_is_documented() -> None:
    wanted = {path for path, _ in leaves(FloorFile, {"limits", "network"})}
    assert {code(row[0])[0] for row in POLICIES.rows("key") if len(row) == 2} == wanted


def test_every_key_of_the_configuration_is_documented_with_its_default() -> None:
    formats: dict[str, Callable[[int], str]] = {
        f"http.{name}": units.format_size for name in ("headers", "body", "spool")
    }
    formats |= {
        f"http.{name}": units.format_duration
        for name in ("header_timeout", "body_timeout", "body_time", "keep_alive")
    }
    formats |= {"budget.inputs": units.format_size, "pool.age": units.format_duration}
    formats |= {
        "callers[].sessions.size": units.format_size,
        "callers[].sessions.inodes": units.format_count,
        "callers[].sessions.container_idle": units.format_duration,
        "callers[].sessions.container_life": units.format_duration,
    }
    formats |= {
        "callbacks.NAME.timeout": units.format_duration,
        "callbacks.NAME.memory": units.format_size,
        "callbacks.NAME.cpus": units.format_cpus,
    }
    formats |= {"docker.timeout": units.format_duration}
    formats |= {"network.memory": units.format_size, "network.cpus": units.format_cpus}
    formats |= {"socket.mode": lambda value: f'"{value:04o}"', "budget.memory": lambda value: f"{value:.0%}"}
    wanted = {path: shown(path, default, formats) for path, default in leaves(Config, set())}
    found = {code(row[0])[0]: row[1] for row in CONFIGURATION.rows("key")}
    assert found.pop("callers") == "see below"
    assert found == wanted


def test_every_key_of_a_retry_is_documented() -> None:
    rows = POLICIES.rows("in `retry`")
    assert sorted(key for row in rows for key in code(row[0])) == sorted(Retry.model_fields)
    (raised,) = re.findall(r"`raise: \{([^}]*)\}`", POLICIES.section("## Retries"))
    assert raised.split(", ") == list(Raise.model_fields)


def test_every_key_of_a_recipe_is_documented() -> None:
    rows = page("docs/images.md").rows("key")
    assert [code(row[0])[0] for row in rows] == list(Recipe.__dataclass_fields__)


def test_every_shipped_policy_is_described() -> None:
    files = sorted(path.stem for path in shipped_policies().glob("*.yaml"))
    assert sorted(code(row[0])[0] for row in POLICIES.rows("policy")) == files


def test_the_page_of_system_calls_is_what_the_filters_are_made_of() -> None:
    script = ROOT / "tests" / "docs" / "syscall_tables.py"
    made = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=60)
    assert (ROOT / "docs" / "syscalls.md").read_text() == made.stdout, f"run {script.name} again"


def test_every_route_is_documented() -> None:
    service: Any = type("Service", (), {"config": Config(), "entrance": None, "session_entrance": None})()
    routes: Any = [
        route
        for route in build(service).app.routes
        if getattr(route, "path", "").startswith(("/v1/", "/metrics"))
    ]
    # A parameter may say what it matches, as in {path:path}; a reader needs its name.
    paths = [(re.sub(r":\w+}", "}", route.path), route.methods) for route in routes]
    assert len(paths) >= 15
    wanted = {f"{method} {path}" for path, methods in paths for method in methods or ("ANY",)}
    found = set(re.findall(r"\*\*`([A-Z]+ /[^`]+)`\*\*", API.prose))
    assert found == wanted


def error_classes(base: type[errors.SandboxdError] = errors.SandboxdError) -> Iterator[type[Any]]:
    yield base
    for each in base.__subclasses__():
        if each.__module__ == errors.__name__:
            yield from error_classes(each)


def test_every_code_is_documented() -> None:
    statuses = {code(row[0])[0]: row[1].split()[0] for row in API.rows("code")}
    for each in error_classes():
        assert f"`{each.code}`" in API.section("## Errors"), each.code
        if issubclass(each, errors.Refused) and each is not errors.Refused:
            assert statuses.pop(each.code) == str(each.status)
    assert statuses == {"internal": "500"}


SECTIONS = {
    **dict.fromkeys(("serve", "doctor"), "### The daemon"),
    **dict.fromkeys(("ps", "inspect", "logs", "cancel", "forward", "replay", "bench"), "### Calls"),
    "policy": "### Policies",
    "image": "### Images",
    "secret": "### Secrets",
    "session": "### Sessions",
    "journal": "### Journal",
}


def options(name: str) -> set[str]:
    """The options of a command of ``sandboxd``; what is given by its place has none."""
    app = command_line.build_app()
    for word in name.split():
        app = app[word]
    return {
        option
        for argument in app.assemble_argument_collection()
        if not argument.children
        and (argument.keys or argument.field_info.kind is inspect.Parameter.KEYWORD_ONLY)
        for option in argument.names
        if option.startswith("-")
    }


def test_every_command_and_option_is_documented() -> None:
    names = [*command_line.COMMANDS]
    names += [f"{group} {name}" for group, (_, members) in command_line.GROUPS.items() for name in members]
    assert {
        "--all",
        "-a",
        "--limit",
        "-n",
        "--policy",
        "--label",
        "--slots",
        "--json",
        "--socket",
    } == options("ps")
    for name in names:
        section = COMMANDS.section(SECTIONS[name.partition(" ")[0]])
        assert re.search(rf"`sandboxd {name}[` ]", section), name
        # Its row, and what the section says of all its commands.
        lines = section.splitlines()
        said = [line for line in lines if not line.startswith("|") or line.startswith(f"| `sandboxd {name}")]
        for option in options(name):
            assert re.search(rf"`{option}[` ]", "\n".join(said)), f"{name} {option}"


def test_every_option_of_run_in_sandbox_is_documented() -> None:
    wanted = {option for action in build_parser()._actions for option in action.option_strings}
    found = {text.split()[0] for row in COMMANDS.rows("option") for text in code(row[0])}
    assert found == wanted


def test_every_field_of_a_request_is_documented() -> None:
    assert [code(row[0])[0] for row in CALLS.rows("field")] == list(models.Request.model_fields)
    narrowing = next(row for row in CALLS.rows("field") if row[0] == "`limits`")
    assert code(narrowing[2]) == list(models.Narrowing.model_fields)


def test_every_cause_is_documented_with_its_exit_status() -> None:
    rows = {code(row[0])[0]: row[3] for row in CALLS.rows("cause")}
    assert list(rows) == [cause.value for cause in models.Cause]
    for cause in models.Cause:
        if rows[cause.value].isdecimal():
            outcome = models.Outcome(cause=cause, message="")
            assert outcome.exit_status() == int(rows[cause.value]), cause
    assert {cause for cause, status in rows.items() if not status.isdecimal()} == {
        "exited",
        "signalled",
        "exec_failed",
    }


def test_states_and_events_are_documented() -> None:
    assert set(code(CALLS.section("## States"))) >= {state.value for state in models.State}
    kinds = get_args(models.Event.model_fields["type"].annotation)
    assert [code(row[0])[0] for row in CALLS.rows("type")] == list(kinds)


def test_every_limit_that_can_be_reached_is_documented() -> None:
    limits = make_shape(SHIPPED.get("strict"), ImageRef("base", "sha256:")).limits
    all_of_it = Evidence(1, 1, 2**53, 1, 1, workspace_full=True, workspace_inodes_gone=True, tmp_full=True)
    endings: list[Ending] = [Stopped("wall"), Stopped("deadline"), Ended(signal.SIGXFSZ)]
    reached = {found.limit for ending in endings for found in limits_reached(ending, all_of_it, limits, None)}
    assert {code(row[0])[0] for row in CALLS.rows("in `limits_reached`")} == reached


def test_every_reason_to_withhold_a_file_is_documented() -> None:
    wanted = re.findall(r"^    (\w+)  ", artifacts.__doc__ or "", re.MULTILINE)
    assert [code(row[0])[0] for row in CALLS.rows("reason")] == wanted


EVERYTHING = """\
version: 1
name: everything
limits:
  file_size: 1MiB
  io: {read: 50MiB, write: 50MiB}
filesystem: {root: overlay, size: 16MiB}
mounts: [{source: SOURCE, target: /lent}]
network: {allow: [{host: example.org, ports: [443], methods: [GET]}]}
secrets: [{name: TOKEN, as: file}]
expose: [8080]
"""


def test_every_control_of_a_receipt_is_documented(daemon_factory: Any, tmp_path: Path) -> None:
    lent = tmp_path / "lent"
    lent.mkdir()
    (tmp_path / "own" / "policies").mkdir(parents=True)
    policy = tmp_path / "own" / "policies" / "everything.yaml"
    policy.write_text(EVERYTHING.replace("SOURCE", str(lent)))
    daemon = daemon_factory()
    daemon.client().set_secret("TOKEN", b"a secret that is stored")
    shared = "version: 1\nname: shared\nextends: default\nisolation: session\n"
    policy.with_name("shared.yaml").write_text(shared)
    until(lambda: "shared" in {one.name for one in daemon.client().policies()}, "it is in force")
    session = daemon.client().create_session()
    controls = []
    for policy_of, fields in (("everything", {}), ("shared", {"session": session.id})):
        call = daemon.run("true", policy=policy_of, **fields)
        assert call.receipt is not None, call.outcome
        controls += call.receipt.controls
    daemon.client().delete_session(session.id)
    said = (re.sub("^secret .*", "secret NAME", control.name) for control in controls)
    names = {re.sub("^mount /.*", "mount TARGET", name) for name in said}
    assert names == {name for row in CALLS.rows("control") for name in code(row[0])}


def test_what_programs_are_made_to_trust_is_documented() -> None:
    rows = {row[0]: set(code(row[1])) for row in page("docs/https.md").rows("") if len(row) == 2}
    assert rows["variables"] == {*VARIABLES, TRUSTED, "process.env"}
    assert rows["the image's bundle"] == set(BUNDLES)


def test_every_method_of_the_clients_is_documented() -> None:
    text = page("docs/python-client.md").prose
    for client in (Client, AsyncClient):
        methods = [name for name, _ in inspect.getmembers(client, inspect.isfunction) if name[0] != "_"]
        assert methods
        for name in methods:
            assert re.search(rf"`{name}\(", text), name


def test_the_layers_are_those_of_the_import_contract() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = project["tool"]["importlinter"]["contracts"]
    (block,) = page("docs/design.md").blocks("layers")
    assert block.text.splitlines() == contract["layers"]


def test_the_frames_of_the_control_protocol_are_described() -> None:
    protocol = importlib.import_module("sandboxd.init.protocol")
    found = {name for row in page("docs/design.md").rows("frame") for name in code(row[0])}
    assert found == {kind.name for kind in protocol.Type}


def test_the_state_directory_is_described(daemon: Any) -> None:
    assert daemon.run("echo", "output makes files").outcome.exit_code == 0
    text = page("docs/operating.md").section("## The state directory")
    for path in daemon.state.iterdir():
        name = re.sub(r"-(wal|shm)$", "", path.name)
        assert f"`{name}" in text, path
    (call, *_) = (daemon.state / "calls").iterdir()
    for path in call.iterdir():
        assert f"`{path.name}`" in text, path


@pytest.mark.parametrize("name", ["sandboxd", "run-in-sandbox"])
def test_the_readme_names_both_commands(name: str) -> None:
    assert name in page("README.md").text
