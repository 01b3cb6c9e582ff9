"""The secrets of one call: files that are read back, and what changes while it runs."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from daemons import needs_containers

from sandboxd import errors
from sandboxd.engine.probe import probe_shape
from sandboxd.excerpt import excerpt
from sandboxd.models import Artifact, Cause, Failure, NetworkEvent, Outcome, Withheld
from sandboxd.network.questions import Question
from sandboxd.plan import Grant
from sandboxd.secrets import SecretStore, place_of
from sandboxd.supervisor.secrets import CallSecrets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.anyio
SHAPE = replace(
    probe_shape(),
    secrets=(Grant("FILE", "file"), Grant("ENV", "env"), Grant("PROXIED", "proxy"), Grant("OTHER", "file")),
)
VALUES = {
    "FILE": b"value of file\0",
    "ENV": b"value of env",
    "PROXIED": b"value of proxied",
    "OTHER": b"some other",
}


@pytest.fixture
def store(tmp_path: Path) -> SecretStore:
    found = SecretStore.open(tmp_path / "secrets", place_of(None, tmp_path, {}))
    for name, value in VALUES.items():
        found.set(name, value)
    return found


@pytest.fixture
def mounted() -> Iterator[Any]:
    """What ``put`` looks at of a slot: a process in a mount namespace of its own, and the tmpfs there."""
    needs_containers()
    script = (
        "mount -t tmpfs none /run; mkdir /run/secrets; mount -t tmpfs none /run/secrets; echo; exec sleep 60"
    )
    with subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with descriptor(f"/proc/{process.pid}/root/run/secrets") as fd:
            yield SimpleNamespace(secrets_fd=fd, tool_pid=process.pid, id_base=100_000, shape=SHAPE)
        process.terminate()


def written_anew(file: Path) -> None:
    """With another value; not by O_CREAT, which protected_regular of proc(5) may forbid here."""
    with file.open("r+b") as opened:
        opened.write(b"value of file\1")


def replaced_by_a_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o400)


@contextmanager
def descriptor(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


async def test_files_are_read_back(store: SecretStore, mounted: Any) -> None:
    with CallSecrets(store, SHAPE) as found:
        await found.take()
        controls = {control.name: control for control in found.put(mounted)}
        assert {name: control.enforced for name, control in controls.items()} == {
            "secret FILE": True, "secret OTHER": True, "secret_files": True,
        }  # fmt: skip
        ids = f"{100_000 + SHAPE.process.uid}:{100_000 + SHAPE.process.gid}"
        assert controls["secret FILE"].in_force == f"0400 {ids}, 1 link, version 1"
        assert [(use.name, use.version, use.as_) for use in found.uses] == [
            ("FILE", 1, "file"), ("OTHER", 1, "file"),
        ]  # fmt: skip
        assert found.environment() == [b"ENV=value of env"]
        assert not any(b"value of" in repr(control).encode() for control in controls.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.chmod(0o440), "0440 "),
        (lambda file: os.chown(file, 0, 0), " 0:0,"),
        (lambda file: os.link(file, file.with_name("MORE")), "2 link"),
        (written_anew, "something else"),
        (replaced_by_a_fifo, "something else"),
    ],
)
async def test_a_file_that_is_not_as_it_should_be(
    store: SecretStore, mounted: Any, change: Any, said: str
) -> None:
    from pathlib import Path as RealPath  # noqa: PLC0415

    from sandboxd.receipt import Parked  # noqa: PLC0415

    with CallSecrets(store, SHAPE) as found:
        await found.take()
        found.put(mounted)
        change(RealPath(f"/proc/{mounted.tool_pid}/root/run/secrets/FILE"))
        ids = (100_000 + SHAPE.process.uid, 100_000 + SHAPE.process.gid)
        with Parked(mounted.tool_pid) as process:
            control = found._read_back(process, "FILE", ids)
        assert not control.enforced
        assert said in control.in_force


async def test_files_elsewhere_and_files_more(store: SecretStore, mounted: Any, tmp_path: Path) -> None:
    with CallSecrets(store, SHAPE) as found, descriptor(str(tmp_path)) as elsewhere:
        await found.take()
        mounted.secrets_fd, right = elsewhere, mounted.secrets_fd
        with pytest.raises(errors.ControlNotEnforced, match="cannot be read back"):
            found.put(mounted)
        mounted.secrets_fd = right
        with descriptor(f"/proc/self/fd/{right}") as directory:
            os.close(os.open("MORE", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
        (control,) = [one for one in found.put(mounted) if not one.enforced]
        assert control.name == "secret_files"
        assert (control.asked, control.in_force) == ("FILE OTHER", "FILE MORE OTHER")


async def test_a_proxied_secret_that_is_rotated_while_the_call_runs(store: SecretStore) -> None:
    told: list[tuple[str, int | None, bytes]] = []
    with CallSecrets(store, SHAPE) as found:
        assert found.proxied == {}
        await found.take()
        found.on_rotated(lambda *what: told.append(what))
        assert found.proxied == {"PROXIED": (1, b"value of proxied")}
        await anyio.to_thread.run_sync(store.rotate, "PROXIED", b"the second value")
        await anyio.to_thread.run_sync(store.rotate, "FILE", b"not of this call")
        with anyio.fail_after(5):
            while not told:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert told == [("PROXIED", 2, b"the second value")]
        assert found.proxied == {"PROXIED": (2, b"the second value")}
        assert found.redactor is not None
        both = "value of proxied, the second value"
        assert found.redactor.text(both) == "[redacted:PROXIED], [redacted:PROXIED]"
        assert found.redactor.text("not of this call") == "not of this call", "it has the first version"
        await anyio.to_thread.run_sync(store.remove, "PROXIED")
        with anyio.fail_after(5):
            while len(told) < 2:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert told[1] == ("PROXIED", None, b"")
        assert found.proxied == {}
        found.note_use("PROXIED", "proxy", 2)
        found.note_use("PROXIED", "proxy", 2)
        assert [(use.name, use.version, use.as_) for use in found.uses] == [("PROXIED", 2, "proxy")]
    assert store._watching == {}


async def test_what_is_rotated_while_it_is_taken_is_not_missed(store: SecretStore) -> None:
    with CallSecrets(store, SHAPE) as found:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(found.take)
            await anyio.lowlevel.checkpoint()
            for number in range(20):
                await anyio.to_thread.run_sync(store.rotate, "PROXIED", b"value number %d" % number)
        await anyio.sleep(0.05)
        assert found.proxied["PROXIED"] == (21, b"value number 19")


async def test_values_are_wiped_in_the_end(store: SecretStore) -> None:
    found = CallSecrets(store, SHAPE)
    await found.take()
    kept = dict(found._values)
    found.close()
    found.close()
    assert [bytes(value.data) for value in kept.values()] == [bytes(len(value)) for value in VALUES.values()]


async def test_texts(store: SecretStore) -> None:
    with CallSecrets(store, SHAPE) as found:
        error = Failure(
            code="host", message="no value of env", details={"value of env": ["value of proxied", 1]}
        )
        given = Outcome(cause=Cause.FAILED, message="of value of env", error=error)
        assert found.outcome(given) is given
        await found.take()
        told = found.outcome(given)
        assert told.message == "of [redacted:ENV]"
        assert told.error is not None
        assert told.error.message == "no [redacted:ENV]"
        assert told.error.details == {"[redacted:ENV]": ["[redacted:PROXIED]", 1]}
        assert told.redacted == 4
        released = [
            Artifact(path=path, size=1, digest="sha256:0")
            for path in ("a", "value of env", "[redacted:ENV]", "d/%FFvalue of env", "100%25ab/value of env")
        ]
        assert [one.path for one in found.artifacts(released)] == [
            "a", "[redacted:ENV]~2", "[redacted:ENV]", "d/%FF[redacted:ENV]", "100%25ab/[redacted:ENV]",
        ]  # fmt: skip
        withheld = [Withheld(path="value of env", reason="symlink", detail="to value of env")]
        (one,) = found.withheld(withheld)
        assert (one.path, one.detail) == ("[redacted:ENV]", "to [redacted:ENV]")


LONG = 2048  # characters of a path, and
WHY = 384  # of a reason, that a process tells


@pytest.mark.parametrize("encode", [bytes.decode, bytes.hex, quote])
async def test_what_was_cut_amid_a_secret_has_no_beginning_of_it(
    store: SecretStore, encode: Callable[[bytes], str]
) -> None:
    """At whatever place the cut is: of path, reason and name, in events and in questions."""
    secret = encode(VALUES["PROXIED"])
    with CallSecrets(store, SHAPE) as found:
        await found.take()
        for inside in range(1, len(secret)):
            path = excerpt("/" + "-" * (LONG - 2 - inside) + secret + "-" * 100, LONG)
            why = excerpt("-" * (WHY - 1 - inside) + secret + "-" * 100, WHY)
            assert path.endswith(secret[:inside] + "…"), "else it is not cut there"
            event = NetworkEvent(verdict="denied", path=path, why=why, name=why)
            asked = Question(
                number=1, protocol="http", name=why, address="", port=80, method="GET", path=path, rule=None
            )
            for told in (found.event(event), found.question(asked)):
                assert told.path == "/" + "-" * (LONG - 2 - inside) + "…"
                assert told.name == "-" * (WHY - 1 - inside) + "…"
            assert found.event(event).why == "-" * (WHY - 1 - inside) + "…"


async def test_a_question_has_no_secret(store: SecretStore) -> None:
    asked = Question(
        number=7, protocol="https", name="value of env.test", address="198.18.0.1", port=443, method="GET",
        path="/value%20of%20env/value of proxied", rule="p.yaml:3",
    )  # fmt: skip
    with CallSecrets(store, SHAPE) as found:
        assert found.question(asked) is asked
        await found.take()
        told = found.question(asked)
    assert (told.name, told.path) == ("[redacted:ENV].test", "/[redacted:ENV]/[redacted:PROXIED]")
    kept = {"number", "protocol", "address", "port", "method", "rule"}
    assert told.model_dump(include=kept) == asked.model_dump(include=kept)
