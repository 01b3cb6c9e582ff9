"""A process of its own that makes a slot, tampers with it after that, and prints what its receipt then says.

An engine needs a mount namespace of its own, which only a process without threads can enter.
Arguments: the runtime, the state directory, and ``waiting`` for slots that are read when they are made and
compared later. Output: JSON, the name of each tampering to the controls that the receipt denies.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from meddling import LIVE, RLIMITS, ZERO, may_raise_rlimits

from sandboxd import errors
from sandboxd.config import Config
from sandboxd.engine.host import EngineHost, enter_private_mounts, instance_name
from sandboxd.engine.probe import probe_shape
from sandboxd.httprule import HttpRule
from sandboxd.network.authority import Authority
from sandboxd.plan import Grant, Root
from sandboxd.policy import seccomp
from sandboxd.reach import Allow, NetworkRules
from sandboxd.receipt import read_receipt, reading, take_reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.engine.base import Slot
    from sandboxd.engine.oci import OciEngine
    from sandboxd.models import Receipt

SHAPE = probe_shape()
WHOLE = replace(  # with every control that a shape may lack
    SHAPE,
    root=Root("overlay", 2**20, 64),
    limits=replace(SHAPE.limits, file_size=2**20, io_read=50 * 2**20, io_write=50 * 2**20),
    network=NetworkRules((Allow("example.org", (443,), "here", HttpRule(("GET",))),), ()),
    secrets=(Grant("TOKEN", "file"),),
)


def denied(slot: Slot) -> list[str]:
    """The controls that are not in force."""
    return denied_by(read_receipt(slot, SHAPE.limits))


def denied_by(receipt: Receipt) -> list[str]:
    """The controls that this one denies."""
    return [control.name for control in receipt.controls if not control.enforced]


@contextmanager
def written(path: str, value: str) -> Iterator[None]:
    """A file of a cgroup with another value."""
    file = Path(path)
    before = file.read_text()
    file.write_text(value)
    try:
        yield
    finally:
        file.write_text(before)


@contextmanager
def raised(slot: Slot, control: str) -> Iterator[None]:
    """A limit that somebody raised; memory counts swap too, which has to be raised first."""
    _, file = slot.cgroup.read_limits()[control]
    if control == "memory" and file.endswith("memory.limit_in_bytes"):
        swap = Path(file).with_name("memory.memsw.limit_in_bytes")
        if swap.exists():
            with written(str(swap), "2147483648"), written(file, "1073741824"):
                yield
            return
    value = {"memory": "1073741824", "pids": "5000", "cpu": "400000"}[control]
    with written(file, f"{value} 100000" if file.endswith("cpu.max") else value):
        yield


@contextmanager
def joined(slot: Slot) -> Iterator[None]:
    """A process more in the cgroup."""
    with subprocess.Popen(["/bin/sleep", "60"]) as process:
        for file in slot.cgroup.procs_files:
            Path(file).write_text(str(process.pid))
        try:
            yield
        finally:
            process.kill()


@contextmanager
def interface(slot: Slot) -> Iterator[None]:
    """A second network interface."""
    enter = ["nsenter", "-t", str(slot.init_pid), "-n", "ip", "link"]
    subprocess.run([*enter, "add", "veth0", "type", "veth", "peer", "name", "veth1"], check=True)
    try:
        yield
    finally:
        subprocess.run([*enter, "del", "veth0"], check=True)


def other_filter(slot: Slot) -> list[str]:
    """What the receipt says when another filter than the slot's was asked for."""
    wider = replace(SHAPE, syscalls=seccomp.resolve("default", (), ()))
    return denied(replace(slot, shape=wider))


def other_rlimit(slot: Slot, number: int) -> list[str]:
    """What the receipt says when another rlimit than the process has was asked for."""
    asked = reading.__dict__["rlimits"]
    changed = tuple(
        replace(limit, soft=limit.soft + (limit.resource == number)) for limit in asked(WHOLE.limits)
    )
    reading.__dict__["rlimits"] = lambda _: changed
    try:
        return denied_by(read_receipt(slot, WHOLE.limits))
    finally:
        reading.__dict__["rlimits"] = asked


async def waiting(engine: OciEngine) -> dict[str, list[str]]:
    """Meddle with slots that were read before."""
    found: dict[str, list[str]] = {}
    for name, (meddle, control) in LIVE.items():
        slot = await engine.create(WHOLE)
        try:
            with take_reading(slot) as before:
                found["nothing"] = denied_by(before.again(WHOLE.limits) or read_receipt(slot, WHOLE.limits))
                if control not in {line.name for line in before.receipt.controls} | {"process"}:
                    found[name] = ["absent"]
                elif control in ZERO and not may_raise_rlimits():
                    found[name] = other_rlimit(slot, RLIMITS[control][1])
                else:
                    meddle(slot)
                    try:
                        found[name] = denied_by(
                            before.again(WHOLE.limits) or read_receipt(slot, WHOLE.limits)
                        )
                    except errors.ControlNotEnforced as error:
                        found[name] = [error.details["control"]]
        finally:
            await engine.destroy(slot)
    return found


async def main(config: Config, run: Path, name: str) -> dict[str, list[str]]:
    """Make a slot, tamper, and take it away."""
    found: dict[str, list[str]] = {}
    authority = Authority.make()
    with EngineHost(config, run, name, (0,), (authority.certificate, authority.fingerprint)) as host:
        [engine] = host.engines()
        if sys.argv[3:] == ["waiting"]:
            return await waiting(engine)
        slot = await engine.create(SHAPE)
        try:
            found["nothing"] = denied(slot)
            for control in ("memory", "pids", "cpu"):
                with raised(slot, control):
                    found[control] = denied(slot)
            with joined(slot):
                found["joined"] = denied(slot)
            with interface(slot):
                found["interface"] = denied(slot)
            found["filter"] = other_filter(slot)
            found["nothing again"] = denied(slot)
            descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        finally:
            await engine.destroy(slot)
            await engine.destroy(slot)  # safe to call twice
        slots = [await engine.create(SHAPE) for _ in range(3)]
        found["ranges"] = [str(one.id_base) for one in slots]
        found["namespaces"] = [str(one.user_namespace) for one in slots]
        for one in slots:
            await engine.destroy(one)
        again = await engine.create(SHAPE)
        found["leaked"] = [str(len(os.listdir("/proc/self/fd")) - descriptors)]  # noqa: PTH208
        await engine.destroy(again)
        found["left"] = [str(path) for path in (run / "slots").iterdir()] + host.clean_leftovers()
    return found


if __name__ == "__main__":
    state = Path(sys.argv[2])
    settings = Config.model_validate({"state": sys.argv[2], "runtime": sys.argv[1]})
    label = instance_name(state)
    seen = anyio.run(main, settings, enter_private_mounts(label), label)
    sys.stdout.write(json.dumps(seen))
