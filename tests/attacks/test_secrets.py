"""Secrets against tools that tell them, callers that should not have them, and a daemon that dies.

What must not be anywhere is looked for everywhere, and the search is shown to find what is there.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from acting import acting_as
from daemons import SANDBOXD, berths_of, until

from sandboxd import errors
from sandboxd.api import secrets as routes
from sandboxd.engine.berth import READY
from sandboxd.secrets import MAX_VALUE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon

    from sandboxd.models import Invocation

NOBODY, SOMEBODY = 65_534, 54_321
POLICIES = {
    "both": (
        "extends: default\nsecrets: [{name: FILE_SECRET, as: file}, {name: ENV_SECRET, as: env}]\n"
        'artifacts: [{path: "**"}]\n'
    ),
    "plain": 'extends: default\nartifacts: [{path: "**"}]\n',
    "named": (
        "extends: default\nsecrets: [{name: FILE_SECRET, as: file}]\n"
        "network: {allow: [{host: allowed.test, ports: [443]}]}\n"
    ),
}
CALLERS = f"""
callers:
  - {{match: {{uid: 0}}, role: operator}}
  - {{match: {{uid: {NOBODY}}}, role: agent, secrets: ["FILE_*", "ENV_SECRET"]}}
  - {{match: {{uid: {SOMEBODY}}}, role: agent, secrets: ["FILE_SECRET"]}}
"""


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    from daemons import needs_containers, start_daemon  # noqa: PLC0415

    needs_containers()
    with start_daemon(tmp_path_factory.mktemp("keeper"), config=CALLERS) as daemon:
        with_policies(daemon)
        daemon.admit_everybody()
        yield daemon


def with_policies(daemon: Daemon) -> None:
    for name, text in POLICIES.items():
        (daemon.policies / f"{name}.yaml").write_text(f"version: 1\nname: {name}\n{text}")
    until(
        lambda: set(POLICIES) <= {one.name for one in daemon.client().policies()}, "the policies are loaded"
    )


def store(daemon: Daemon) -> dict[str, bytes]:
    """New values for the two secrets."""
    values = {
        "FILE_SECRET": base64.b85encode(secrets.token_bytes(30)),
        "ENV_SECRET": secrets.token_urlsafe(30).encode(),
    }
    for name, value in values.items():
        with suppress(errors.NotFound):
            daemon.client().remove_secret(name)
        daemon.client().set_secret(name, value)
    return values


def everywhere(daemon: Daemon, call: Invocation | None = None) -> Iterator[tuple[str, bytes]]:
    """All that the daemon keeps or tells, images left out: their files are nobody's secrets."""
    images = daemon.state / "images"
    for path in daemon.state.parent.rglob("*"):
        if path.is_file() and not path.is_socket() and images not in path.parents:
            yield str(path), path.read_bytes()
    for process in [psutil.Process(pid) for pid in daemon.processes]:
        for name in ("cmdline", "environ"):
            yield f"{name} of {process.pid}", Path(f"/proc/{process.pid}/{name}").read_bytes()
    if call is not None:
        client = daemon.client()
        yield "the invocation", client.get(call.id).model_dump_json().encode()
        with client.events(call.id) as events:
            yield "the events", b"".join(event.model_dump_json().encode() for event in events)
        for stream in (client.stdout, client.stderr):
            with stream(call.id) as pieces:
                yield "a stream", b"".join(pieces)
        argv = [str(SANDBOXD), "inspect", call.id, "--json", "--socket", str(daemon.socket)]
        yield "inspect", subprocess.run(argv, capture_output=True, check=True).stdout
    database = sqlite3.connect(f"file:{daemon.state}/journal.sqlite3?mode=ro", uri=True)
    try:
        for table in ("invocations", "refusals", "records"):
            with suppress(sqlite3.OperationalError):
                yield f"table {table}", repr(database.execute(f"SELECT * FROM {table}").fetchall()).encode()
    finally:
        database.close()


def places(daemon: Daemon, value: bytes, call: Invocation | None = None) -> list[str]:
    """Where a value is, in any form that says it."""
    forms = {
        value,
        value.hex().encode(),
        base64.b64encode(value)[:-4],
        base64.b64encode(b"x" + value)[3:-4],
        base64.b64encode(b"xx" + value)[4:-4],
        json.dumps(value.decode()).strip('"').encode(),
    }
    return [where for where, data in everywhere(daemon, call) if any(form in data for form in forms)]


TELL = r"""
value=$(cat /run/secrets/FILE_SECRET)
for one in "$value" "$ENV_SECRET"; do
  for out in 1 2; do
    printf '<%s>\n' "$one" >&$out
    printf '%s' "$one" | head -c 9 >&$out; sleep 0.02; printf '%s' "$one" | tail -c +10 >&$out; echo >&$out
    printf '%s' "$one" | base64 -w 0 >&$out; echo >&$out
    printf 'x%s' "$one" | base64 -w 7 >&$out
    printf 'xx%s' "$one" | base64 >&$out
    printf '%s' "$one" | od -An -v -tx1 | tr -d ' ' >&$out
    i=1
    while [ $i -le ${#one} ]; do printf '%s' "$one" | tail -c +$i | head -c 1 >&$out; i=$((i + 1)); done
    echo >&$out
  done
done
mkdir -p "/workspace/$ENV_SECRET"; echo > "/workspace/$ENV_SECRET/a"; echo > "/workspace/-$ENV_SECRET"
ln -s /etc "/workspace/link-$ENV_SECRET"
"""


def test_a_tool_that_tells_all_of_it(keeper: Daemon) -> None:
    values = store(keeper)
    call = keeper.run("sh", "-c", TELL, policy="both")
    assert call.outcome is not None
    assert call.outcome.exit_code == 0, call.stderr
    for value in values.values():
        assert places(keeper, value, call) == []
    assert call.outcome.redacted == 2 * 2 * 7 + 3
    assert call.stdout is not None
    assert (call.stdout.text or "").count("[redacted:ENV_SECRET]") == 7
    names = ["-[redacted:ENV_SECRET]", "[redacted:ENV_SECRET]/a"]
    assert sorted(one.path for one in call.artifacts) == names
    assert [one.path for one in call.withheld] == ["link-[redacted:ENV_SECRET]"]
    for name in names:
        with keeper.client().artifact(call.id, name) as pieces:
            assert b"".join(pieces) == b"\n"


def test_the_search_finds_what_is_there(keeper: Daemon) -> None:
    value = secrets.token_urlsafe(30)
    call = keeper.run("sh", "-c", f"echo {value}; echo > {value}", policy="plain")
    found = places(keeper, value.encode(), call)
    for place in ("the invocation", "the events", "a stream", "inspect", "table invocations"):
        assert place in found
    assert any(where.endswith("/stdout") for where in found)
    assert call.outcome is not None
    assert call.outcome.redacted is None


def test_two_names_that_become_one(keeper: Daemon) -> None:
    store(keeper)
    script = 'echo 1 > "a$ENV_SECRET"; echo 2 > "a$(printf %s "$ENV_SECRET" | od -An -v -tx1 | tr -d " \n")"'
    call = keeper.run("sh", "-c", script, policy="both")
    names = [one.path for one in call.artifacts]
    assert names == ["a[redacted:ENV_SECRET]", "a[redacted:ENV_SECRET]~2"]
    contents = set()
    for name in names:
        with keeper.client().artifact(call.id, name) as pieces:
            contents.add(b"".join(pieces))
    assert contents == {b"1\n", b"2\n"}


def test_what_a_program_prints_last_is_not_kept_back(keeper: Daemon) -> None:
    values = store(keeper)
    begun = values["ENV_SECRET"][:5].decode()
    call = keeper.run("sh", "-c", f"printf 'and then {begun}'", policy="both")
    assert call.stdout is not None
    assert call.stdout.text == f"and then {begun}"


def test_names_that_are_refused_say_nothing(keeper: Daemon) -> None:
    store(keeper)
    keeper.client().rotate_secret("FILE_SECRET", b"a-Secret-That-Fits-Into-A-Label")
    script = "getent hosts $(cat /run/secrets/FILE_SECRET).evil.test"
    call = keeper.run("sh", "-c", script, policy="named")
    names = [one.name for one in call.denials if one.kind == "name"]
    assert "[redacted:FILE_SECRET].evil.test" in names
    assert all("a-secret-that" not in where.lower() for where in map(str, call.denials))
    assert places(keeper, b"a-secret-that-fits-into-a-label", call) == []


def test_an_error_text_says_nothing(keeper: Daemon) -> None:
    values = store(keeper)
    name = values["ENV_SECRET"].decode()
    call = keeper.run(f"/no/{name}", policy="both")
    assert call.outcome is not None
    assert call.outcome.cause == "exec_failed"
    assert call.outcome.message.startswith("'/no/[redacted:ENV_SECRET]' could not be executed")


def test_who_may_have_which(keeper: Daemon) -> None:
    store(keeper)
    client = keeper.client()
    with acting_as(NOBODY):
        call = client.run(
            ["sh", "-c", 'test -n "$ENV_SECRET" && test -s /run/secrets/FILE_SECRET'], policy="both"
        )
    assert call.outcome is not None
    assert call.outcome.exit_code == 0
    with acting_as(SOMEBODY):
        assert client.run(["true"], policy="named").outcome is not None
        with pytest.raises(errors.NotPermitted, match="ENV_SECRET, which is not yours to have") as refused:
            client.run(["true"], policy="both")
        assert refused.value.details["secret"] == "ENV_SECRET"
        with pytest.raises(errors.NotPermitted):
            client.plan(["true"], policy="both")
    client.remove_secret("ENV_SECRET")
    with acting_as(SOMEBODY), pytest.raises(errors.NotPermitted):  # whether or not there is one
        client.run(["true"], policy="both")
    with pytest.raises(errors.SecretMissing, match="secret set ENV_SECRET"):
        client.run(["true"], policy="both")


@pytest.mark.parametrize("uid", [NOBODY, SOMEBODY])
def test_the_store_is_for_operators(keeper: Daemon, uid: int) -> None:
    store(keeper)
    client = keeper.client()
    with acting_as(uid):
        for ask in (
            client.secrets,
            lambda: client.secret("FILE_SECRET"),
            lambda: client.secret("NOT_THERE"),
            lambda: client.set_secret("NEW", b"a new value"),
            lambda: client.rotate_secret("FILE_SECRET", b"a new value"),
            lambda: client.remove_secret("FILE_SECRET"),
        ):
            with pytest.raises(errors.NotPermitted, match="only operators"):
                ask()
    assert {one.name for one in client.secrets()} == {"FILE_SECRET", "ENV_SECRET"}


def raw(daemon: Daemon, method: str, path: str, body: bytes, kind: str | None) -> tuple[int, bytes]:
    """A request as somebody with curl would send it."""
    connection = http.client.HTTPConnection("sandboxd")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(daemon.socket))
    try:
        connection.request(method, path, body, {} if kind is None else {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_no_refusal_repeats_a_value(keeper: Daemon) -> None:
    assert routes.MAX_BODY == MAX_VALUE
    value = b"WatchMe" + secrets.token_hex(16).encode()
    octets = "application/octet-stream"
    for status, method, path, body, kind in (
        (415, "PUT", "/v1/secrets/NEW", json.dumps({"value": value.decode()}).encode(), "application/json"),
        (400, "PUT", "/v1/secrets/new", value, octets),
        (404, "PUT", "/v1/secrets/..%2Fx", value, octets),
        (404, "PUT", "/v1/secrets/a/../../x", value, octets),
        (413, "PUT", "/v1/secrets/NEW", value * 2000, octets),
        (400, "PUT", "/v1/secrets/NEW", value[:7], None),
        (400, "PUT", "/v1/secrets/NEW?x=1", value, octets),
        (404, "POST", "/v1/secrets/NEW/rotate", value, octets),
        (405, "POST", "/v1/secrets/NEW", value, octets),
        (201, "PUT", "/v1/secrets/NEW", value, octets),
        (409, "PUT", "/v1/secrets/NEW", value, octets),
        (200, "POST", "/v1/secrets/NEW/rotate", value, None),
    ):
        found, answer = raw(keeper, method, path, body, kind)
        assert found == status, answer
        assert value not in answer
        assert value[:7] not in answer
    assert places(keeper, value) == []
    status, answer = raw(keeper, "GET", "/v1/secrets/NEW", b"", None)
    assert (status, sorted(json.loads(answer))) == (200, ["created", "name", "rotated", "version"])
    keeper.client().remove_secret("NEW")


def test_nothing_is_left_after_the_call(keeper: Daemon) -> None:
    values = store(keeper)

    def mounts() -> list[str]:
        lines = Path(f"/proc/{keeper.engine}/mountinfo").read_text().splitlines()
        return sorted(line.partition(" - ")[2] for line in lines)

    def descriptors() -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in keeper.processes]  # noqa: PTH208

    keeper.run("true", policy="both")
    settled(keeper)
    before = mounts(), descriptors()
    call = keeper.client().start(["sleep", "60"], policy="both")
    until(lambda: keeper.client().get(call.id).state == "running", "it runs")
    until(lambda: sleeping(keeper), "the command is executed")
    (tool,) = sleeping(keeper)
    inside = Path(f"/proc/{tool.pid}/root/run/secrets/FILE_SECRET")
    assert inside.read_bytes() == values["FILE_SECRET"]
    assert values["ENV_SECRET"] in Path(f"/proc/{tool.pid}/environ").read_bytes(), "as the documentation says"
    assert places(keeper, values["FILE_SECRET"]) == []
    assert not any(values["FILE_SECRET"] in line.encode() for line in mounts())
    keeper.client().cancel(call.id)
    settled(keeper)
    until(lambda: (mounts(), descriptors()) == before, "mounts and descriptors are as before")
    assert not inside.exists()


def settled(daemon: Daemon) -> None:
    """Wait until there is no container, and all that wait to become one."""
    until(lambda: not daemon.client().slots(), "the containers are gone")
    until(lambda: len(berths_of(daemon)) == READY, "the next ones are prepared")


def sleeping(daemon: Daemon) -> list[psutil.Process]:
    """The commands ``sleep 60`` in the daemon's containers."""
    found = []
    for process in psutil.Process(daemon.engine).children(recursive=True):
        with suppress(psutil.Error):
            found += [process] if process.cmdline() == ["sleep", "60"] else []
    return found


def test_a_key_gives_the_same_outcome_whatever_the_value(keeper: Daemon) -> None:
    store(keeper)
    client, key = keeper.client(), secrets.token_hex(8)
    first = client.run(["cat", "/run/secrets/FILE_SECRET"], policy="both", key=key)
    client.rotate_secret("FILE_SECRET", b"another value of it")
    again = client.run(["cat", "/run/secrets/FILE_SECRET"], policy="both", key=key)
    assert (again.id, again.secrets) == (first.id, first.secrets)
    other = client.run(["cat", "/run/secrets/FILE_SECRET"], policy="both")
    assert (other.plan, other.secrets[0].version) == (first.plan, first.secrets[0].version + 1)


def waiting(daemon: Daemon, policy: str) -> tuple[Invocation, Invocation]:
    """A call that runs, and one behind it, in a daemon of one container."""
    client = daemon.client()
    first = client.start(["sleep", "60"], policy="plain")
    until(lambda: client.get(first.id).state == "running", "it runs")
    return first, client.start(["cat", "/run/secrets/FILE_SECRET"], policy=policy)


def test_a_call_that_waits_has_what_there_is_when_it_starts(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config="budget: {slots: 1}\n")
    with_policies(daemon)
    store(daemon)
    client = daemon.client()
    first, second = waiting(daemon, "both")
    client.rotate_secret("FILE_SECRET", b"the value of the moment")
    client.cancel(first.id)
    ended = client.wait(second.id, timeout=30)
    assert [use.version for use in ended.secrets] == [2, 1]
    assert ended.stdout is not None
    assert ended.stdout.text == "[redacted:FILE_SECRET]"
    first, second = waiting(daemon, "both")
    client.remove_secret("FILE_SECRET")
    client.cancel(first.id)
    ended = client.wait(second.id, timeout=30)
    assert ended.outcome is not None
    assert (ended.outcome.cause, ended.outcome.exit_status()) == ("denied", 125)
    assert "FILE_SECRET" in ended.outcome.message
    assert ended.secrets == []


def test_a_prompt_appears_and_a_secret_that_is_written_slowly_does_not(keeper: Daemon) -> None:
    value = store(keeper)["ENV_SECRET"]
    script = """
    s=$ENV_SECRET; printf 'name? %s' "${s%"${s#?}"}"; read answer; echo "got $answer"
    for pauses in 1 2 3 4 5 6 7; do printf %s "${s%"${s#?}"}"; s=${s#?}; sleep 0.3; done
    echo "$s end"
    """
    client = keeper.client()
    call = client.start(["sh", "-c", script], policy="both", stdin="stream")
    prompt = b"name? " + value[:1]
    until(lambda: b"".join(client.stdout(call.id)) == prompt, "all of the prompt is there", seconds=10)
    client.write_stdin(call.id, b"it\n", eof=True)
    done = client.wait(call.id, timeout=60)
    said = b"".join(client.stdout(call.id))
    assert said == prompt + b"got it\n" + value[:3] + b"[redacted:ENV_SECRET] end\n"
    assert done.outcome is not None
    assert done.outcome.redacted == 1
    assert not [where for where, found in everywhere(keeper, done) if value[:7] in found]


def test_a_daemon_that_is_killed_while_it_stores(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory()
    with_policies(daemon)
    values = store(daemon)
    running = daemon.client().start(["sleep", "60"], policy="both")
    until(lambda: daemon.client().get(running.id).state == "running", "it runs")
    told: list[int] = []

    def rotate() -> None:
        with suppress(errors.SandboxdError, OSError):
            while True:
                value = b"the value of version %d" % (len(told) + 2)
                told.append(daemon.client().rotate_secret("FILE_SECRET", value).version or 0)

    thread = threading.Thread(target=rotate)
    thread.start()
    until(lambda: len(told) > 20, "it was rotated")
    os.kill(daemon.process.pid, signal.SIGKILL)
    daemon.process.wait()
    thread.join()
    again = daemon_factory(state=daemon.state, name="again")
    with_policies(again)
    interrupted = again.client().get(running.id)
    assert interrupted.outcome is not None
    assert interrupted.outcome.error is not None
    assert interrupted.outcome.error.code == "interrupted"
    assert [(use.name, use.version) for use in interrupted.secrets] == [("FILE_SECRET", 1), ("ENV_SECRET", 1)]
    info = again.client().secret("FILE_SECRET")
    assert info.version is not None
    assert told[-1] <= info.version <= told[-1] + 1
    assert not list((again.state / "secrets").glob(".*"))
    script = 'sha256sum < /run/secrets/FILE_SECRET; printf %s "$ENV_SECRET" | sha256sum'
    call = again.run("sh", "-c", script, policy="both")
    assert call.stdout is not None
    assert call.stdout.text is not None
    wanted = [b"the value of version %d" % info.version, values["ENV_SECRET"]]
    assert [line.split()[0] for line in call.stdout.text.splitlines()] == [sha(one) for one in wanted]


def sha(value: bytes) -> str:
    import hashlib  # noqa: PLC0415

    return hashlib.sha256(value).hexdigest()


def test_another_key_after_a_restart(daemon_factory: Callable[..., Daemon], tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o600)
    config = f"secrets: {{key: {key}}}\n"
    daemon = daemon_factory(config=config)
    with_policies(daemon)
    store(daemon)
    daemon.stop()
    key.write_bytes(b"z" * 32)
    again = daemon_factory(config=config, state=daemon.state, name="again")
    with_policies(again)
    client = again.client()
    assert again.run("true", policy="plain").outcome is not None
    for ask in (
        lambda: client.run(["true"], policy="both"),
        lambda: client.set_secret("NEW", b"a new value"),
        lambda: client.rotate_secret("FILE_SECRET", b"a new value"),
    ):
        with pytest.raises(errors.SecretsUnavailable, match="stored with another key"):
            ask()
    assert "secrets cannot be used" in again.log.read_text()
    doctor = subprocess.run(
        [SANDBOXD, "doctor", "--json", "--config", again.log.with_name("sandboxd.yaml")],
        capture_output=True,
        check=False,
    )
    (line,) = [one for one in json.loads(doctor.stdout)["checks"] if one["name"] == "secrets"]
    assert not line["ok"]
    assert "stored with another key" in line["found"]
    key.write_bytes(b"k" * 32)  # no restart is needed
    call = client.run(["sh", "-c", "test -s /run/secrets/FILE_SECRET"], policy="both")
    assert call.outcome is not None
    assert call.outcome.exit_code == 0


def test_containers_that_wait_have_nothing(daemon_factory: Callable[..., Daemon]) -> None:
    daemon = daemon_factory(config="pool: {min: 2, max: 2}\n")
    with_policies(daemon)
    values = store(daemon)
    client = daemon.client()
    ready: Callable[[], Any] = lambda: [one for one in client.slots() if one.state == "waiting"][1:]  # noqa: E731
    client.run(["true"], policy="both")
    until(ready, "two wait")
    places_inside = [
        Path(f"/proc/{process.pid}/root/run/secrets")
        for process in psutil.Process(daemon.engine).children(recursive=True)
        if Path(f"/proc/{process.pid}/root/run/secrets").is_dir()
    ]
    assert len(places_inside) >= 2
    for place in places_inside:
        assert list(place.iterdir()) == []
    call = client.run(["cat", "/run/secrets/FILE_SECRET"], policy="both")
    assert call.receipt is not None
    assert call.receipt.checked_at is not None, "it had waited"
    assert call.stdout is not None
    assert call.stdout.text == "[redacted:FILE_SECRET]"
    assert "secret FILE_SECRET" in {control.name for control in call.receipt.controls}
    for value in values.values():
        assert places(daemon, value, call) == []
