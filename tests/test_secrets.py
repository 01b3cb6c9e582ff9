"""The store of secrets: what it keeps, what it refuses, and what is left after whatever happens to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd import errors, redaction
from sandboxd.secrets import MAX_VALUE, KeyPlace, SecretStore, place_of, store
from sandboxd.secrets.record import Damaged, Known, Record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VALUE, OTHER = b"the first value\0\xff\n", b"the second value"


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., SecretStore]:
    def again(key: Path | None = None) -> SecretStore:
        return SecretStore.open(tmp_path / "secrets", place_of(key, tmp_path, {}))

    return again


def taken(found: SecretStore, name: str = "TOKEN") -> tuple[int, bytes]:
    value = found.take([name])[name]
    return value.version, bytes(value.data)


def test_versions_and_values(opened: Callable[..., SecretStore], tmp_path: Path) -> None:
    found = opened()
    assert found.list() == []
    info = found.set("TOKEN", VALUE)
    assert (info.name, info.version, info.created == info.rotated) == ("TOKEN", 1, True)
    assert taken(found) == (1, VALUE)
    with pytest.raises(errors.StateConflict, match="version 1; rotate it"):
        found.set("TOKEN", OTHER)
    assert found.rotate("TOKEN", OTHER).version == 2
    assert taken(found) == (2, OTHER)
    again = opened()
    assert taken(again) == (2, OTHER)
    again.remove("TOKEN")
    for gone in (again, opened()):
        assert gone.list() == []
        with pytest.raises(errors.NotFound):
            gone.get("TOKEN")
        with pytest.raises(errors.SecretMissing, match="secret set TOKEN") as missing:
            gone.take(["TOKEN"])
        assert missing.value.details["secret"] == "TOKEN"
    with pytest.raises(errors.NotFound):
        again.rotate("TOKEN", OTHER)
    assert again.set("TOKEN", VALUE).version == 3, "a number is used once"
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"secrets": 0o700, "secrets.key": 0o600, "TOKEN": 0o600}


def test_nothing_of_a_value_is_on_disk(opened: Callable[..., SecretStore], tmp_path: Path) -> None:
    opened().set("TOKEN", b"a value to look for")
    opened().rotate("TOKEN", b"another value to look for")
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    for value in (b"value to look for", b"dmFsdWUgdG8gbG9vayBmb3"):
        assert not any(value in data for data in files)


@pytest.mark.parametrize("name", ["../x", "x", "", "A/B", "A" * 129, "_A", "1A", "A\n", "A.B", "Ä", "A\0"])
def test_names(opened: Callable[..., SecretStore], tmp_path: Path, name: str) -> None:
    found = opened()
    for asked in (found.set, found.rotate):
        with pytest.raises(errors.InvalidRequest, match="GITHUB_TOKEN"):
            asked(name, VALUE)
    with pytest.raises(errors.NotFound):
        found.remove(name)
    assert [path.name for path in tmp_path.iterdir()] == ["secrets"]


@pytest.mark.parametrize("value", [b"", b"short77", b"\n\n\n\n\n\n\n\nshort\r\n\r\n"])
def test_short_values(opened: Callable[..., SecretStore], value: bytes) -> None:
    assert store.SHORTEST == redaction.SHORTEST
    with pytest.raises(errors.InvalidRequest, match="at least 8 bytes") as refused:
        opened().set("TOKEN", value)
    assert "short" not in str(refused.value).replace("shorter", "")


def test_large_values(opened: Callable[..., SecretStore]) -> None:
    found = opened()
    found.set("TOKEN", b"x" * MAX_VALUE)
    assert taken(found) == (1, b"x" * MAX_VALUE)
    with pytest.raises(errors.TooLarge, match="64KiB"):
        found.rotate("TOKEN", b"x" * (MAX_VALUE + 1))
    for number in range(4):
        found.set(f"MORE{number}", b"x" * MAX_VALUE)
    found.check(["TOKEN", "MORE0", "MORE1", "MORE2", "MORE2"])
    with pytest.raises(errors.SecretUnfit, match="256KiB"):
        found.check(["TOKEN", "MORE0", "MORE1", "MORE2", "MORE3"])


def test_a_variable_holds_no_nul(opened: Callable[..., SecretStore]) -> None:
    found = opened()
    found.set("TOKEN", VALUE)
    found.set("TEXT", OTHER)
    found.check(["TOKEN", "TEXT"], environment=["TEXT"])
    with pytest.raises(errors.SecretUnfit, match=r"TOKEN has a NUL byte.*as: file"):
        found.check(["TOKEN", "TEXT"], environment=["TOKEN"])


def test_values_are_wiped(opened: Callable[..., SecretStore]) -> None:
    found = opened()
    found.set("TOKEN", VALUE)
    value = found.take(["TOKEN"])["TOKEN"]
    value.wipe()
    assert bytes(value.data) == bytes(len(VALUE))


def key_file(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_keys_by_configuration_and_by_systemd(tmp_path: Path, opened: Callable[..., SecretStore]) -> None:
    key = bytes(range(32))
    raw, text = key_file(tmp_path / "raw", key), key_file(tmp_path / "hex", key.hex().encode() + b"\n")
    opened(raw).set("TOKEN", VALUE)
    assert taken(opened(text)) == (1, VALUE)
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    assert place_of(None, tmp_path, environ) == KeyPlace(tmp_path / "secrets.key", own=True)
    key_file(credentials / "sandboxd-secrets-key", key, 0o400)
    place = place_of(None, tmp_path, environ)
    assert place == KeyPlace(credentials / "sandboxd-secrets-key", own=False)
    assert taken(SecretStore.open(tmp_path / "secrets", place)) == (1, VALUE)
    assert place_of(raw, tmp_path, environ) == KeyPlace(raw, own=False)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "is not there: put it back, or make one"),
    "too short": (lambda path: key_file(path, b"x" * 31), "has 31 bytes: a key is 32 bytes"),
    "too long": (lambda path: key_file(path, b"x" * 1000), "has 256 or more bytes"),
    "no digits": (lambda path: key_file(path, b"x" * 64), "has 64 bytes"),
    "open": (lambda path: key_file(path, bytes(32), 0o640), "can be read by others (mode 0640): chmod 0600"),
    "a FIFO": (lambda path: os.mkfifo(path, 0o600), "is no regular file"),
    "a directory": (lambda path: path.mkdir(mode=0o700), "is no regular file"),
    "somebody's": (
        lambda path: os.chown(key_file(path, bytes(32)), 1234, 0),
        "belongs to uid 1234: chown root",
    ),
    "another": (lambda path: key_file(path, b"y" * 32), "was stored with another key"),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_key_changes_nothing(how: str, tmp_path: Path, opened: Callable[..., SecretStore]) -> None:
    good = key_file(tmp_path / "good", b"k" * 32)
    opened(good).set("TOKEN", VALUE)
    before = (tmp_path / "secrets" / "TOKEN").read_bytes()
    make, said = WRONG[how]
    make(tmp_path / "bad")
    found = opened(tmp_path / "bad")
    assert [info.name for info in found.list()] == ["TOKEN"]
    for asked in (
        lambda: found.set("NEW", OTHER),
        lambda: found.rotate("TOKEN", OTHER),
        lambda: found.take(["TOKEN"]),
        lambda: found.check(["TOKEN"]),
    ):
        with pytest.raises(errors.SecretsUnavailable) as refused:
            asked()
        assert said in str(refused.value)
        assert said in (found.problem() or "")
    assert [path.name for path in (tmp_path / "secrets").iterdir()] == ["TOKEN"]
    assert (tmp_path / "secrets" / "TOKEN").read_bytes() == before
    assert taken(opened(good)) == (1, VALUE)
    assert opened(good).problem() is None
    found.remove("TOKEN")  # which needs no key
    assert opened(good).list() == []


def test_a_lost_key_is_not_made_anew(tmp_path: Path, opened: Callable[..., SecretStore]) -> None:
    found = opened()
    assert found.problem() is None
    found.set("TOKEN", VALUE)
    (tmp_path / "secrets.key").rename(tmp_path / "away")
    for again in (found, opened()):
        with pytest.raises(errors.SecretsUnavailable, match="put it back, or remove every secret"):
            again.set("NEW", OTHER)
        assert not (tmp_path / "secrets.key").exists()
    (tmp_path / "away").rename(tmp_path / "secrets.key")
    assert taken(found) == (1, VALUE)
    (tmp_path / "secrets.key").unlink()
    found.remove("TOKEN")
    assert found.set("NEW", OTHER).version == 1, "with nothing to lose, there is a new key"
    assert taken(found, "NEW") == (1, OTHER)


def altered(change: Callable[[dict[str, object]], object]) -> Callable[[bytes], bytes]:
    def alter(data: bytes) -> bytes:
        content = json.loads(data)
        change(content)
        return json.dumps(content).encode()

    return alter


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "no object": lambda data: b"[]",
    "deep": lambda data: b"[" * 100_000,
    "of another format": altered(lambda content: content.update(format=2)),
    "a key more": altered(lambda content: content.update(more=1)),
    "of another type": altered(lambda content: content.update(version="1")),
    "a boolean": altered(lambda content: content.update(version=True)),
    "of another name": altered(lambda content: content.update(name="OTHER")),
    "of another size": altered(lambda content: content.update(size=3)),
    "no version": altered(lambda content: content.update(version=0)),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_hinders_nothing_else(
    how: str, tmp_path: Path, opened: Callable[..., SecretStore]
) -> None:
    found = opened()
    found.set("TOKEN", VALUE)
    found.set("GOOD", OTHER)
    file = tmp_path / "secrets" / "TOKEN"
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[how](whole))
    broken = file.read_bytes()
    found = opened()
    assert {info.name: info.problem is None for info in found.list()} == {"GOOD": True, "TOKEN": False}
    assert taken(found, "GOOD") == (1, OTHER)
    found.rotate("GOOD", VALUE)
    for asked in (lambda: found.take(["TOKEN"]), lambda: found.set("TOKEN", OTHER)):
        with pytest.raises(errors.SecretsUnavailable, match=r"TOKEN is damaged .*secret rm TOKEN"):
            asked()
    assert file.read_bytes() == broken, "nothing is written over"
    file.write_bytes(whole)
    assert taken(opened()) == (1, VALUE)
    file.write_bytes(broken)
    found.remove("TOKEN")
    again = opened().set("TOKEN", OTHER).version
    assert again is not None
    assert again > 1_700_000_000, "no number that it may have had is another's"
    assert opened().rotate("TOKEN", VALUE).version == again + 1


@pytest.mark.parametrize("field", ["version", "created", "rotated", "has_nul", "nonce", "value"])
def test_what_is_in_plain_is_bound_to_the_value(
    field: str, tmp_path: Path, opened: Callable[..., SecretStore]
) -> None:
    found = opened()
    found.set("TOKEN", VALUE)
    file = tmp_path / "secrets" / "TOKEN"
    content = json.loads(file.read_bytes())
    old = content[field]
    if isinstance(old, str):
        content[field] = ("B" if old[0] == "A" else "A") + old[1:]
    else:
        content[field] = not old if isinstance(old, bool) else old + 1
    file.write_text(json.dumps(content))
    with pytest.raises(errors.SecretsUnavailable, match="not what was stored"):
        opened().take(["TOKEN"])


def test_one_record_does_not_stand_for_another(tmp_path: Path, opened: Callable[..., SecretStore]) -> None:
    found = opened()
    found.set("TOKEN", VALUE)
    old = (tmp_path / "secrets" / "TOKEN").read_bytes()
    found.set("OTHER", OTHER)
    (tmp_path / "secrets" / "OTHER").write_bytes(old.replace(b"TOKEN", b"OTHER"))
    with pytest.raises(errors.SecretsUnavailable, match="OTHER is damaged"):
        opened().take(["OTHER"])
    found.rotate("TOKEN", OTHER)
    (tmp_path / "secrets" / "TOKEN").write_bytes(old)
    with pytest.raises(errors.SecretsUnavailable, match="put back to an earlier version"):
        found.take(["TOKEN"])


def test_files_that_lead_elsewhere(tmp_path: Path, opened: Callable[..., SecretStore]) -> None:
    found = opened()
    found.set("TOKEN", VALUE)
    directory = tmp_path / "secrets"
    (directory / "TOKEN").rename(tmp_path / "moved")
    (directory / "LINK").symlink_to(tmp_path / "moved")
    os.mkfifo(directory / "FIFO")
    (directory / "DIR").mkdir()
    (directory / "notes.txt").write_text("what somebody left")
    found = opened()
    assert {info.name: info.problem is not None for info in found.list()} == {
        "DIR": True, "FIFO": True, "LINK": True,
    }  # fmt: skip
    assert (directory / "notes.txt").exists()


@given(st.binary(max_size=400), st.integers(0, 400), st.integers(0, 50))
def test_any_bytes_are_a_record_or_damaged(noise: bytes, at: int, cut: int) -> None:
    key, known = b"k" * 32, Known("TOKEN", 3, 5, 6, "", len(VALUE), has_nul=True)
    good = Record.seal(known, VALUE, key).encode()
    for data in (noise, good[:at] + noise + good[at + cut :]):
        try:
            found = Record.decode(data, "TOKEN").unseal(key)
        except Damaged:
            continue
        assert found == VALUE


def test_many_writers_at_once(opened: Callable[..., SecretStore]) -> None:
    found = opened()
    told: list[object] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for turn in range(10):
            value = f"the value of {number} at {turn}".encode()
            try:
                told.append(found.set("TOKEN", value).version)
            except errors.StateConflict:
                told.append(found.rotate("TOKEN", value).version)
            found.take(["TOKEN"])["TOKEN"].wipe()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == list(range(1, 81))  # type: ignore[type-var]
    assert taken(opened())[0] == 80


def test_a_thousand_secrets(opened: Callable[..., SecretStore], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # of this test's disk, not of what it tests
    found = opened()
    for number in range(1000):
        found.set(f"S{number}", f"the value of {number}".encode())
    again = opened()
    assert len(again.list()) == 1000
    assert taken(again, "S777") == (1, b"the value of 777")
    assert again.rotate("S999", OTHER).version == 2
    again.remove("S0")
    assert len(opened().list()) == 999


WRITER = """
import sys
from pathlib import Path
from sandboxd.secrets import SecretStore, place_of
state = Path(sys.argv[1])
store = SecretStore.open(state / "secrets", place_of(None, state, {}))
try: store.set("TOKEN", b"the value of version 1" * 100)
except Exception: pass
print(store.get("TOKEN").version, flush=True)
while True:
    version = store.get("TOKEN").version + 1
    print(store.rotate("TOKEN", b"the value of version %d" % version * 100).version, flush=True)
    there = any(one.name == "OTHER" for one in store.list())
    store.remove("OTHER") if there else store.set("OTHER", b"otherother")
"""


def test_a_kill_at_any_moment_loses_nothing(tmp_path: Path, opened: Callable[..., SecretStore]) -> None:
    last = 0
    for turn in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        with process:
            told = [int(process.stdout.readline())]
            time.sleep(0.002 * turn)
            process.send_signal(signal.SIGKILL)
            told += [int(line) for line in process.stdout if line.endswith("\n")]
        found = opened()
        version, value = taken(found)
        assert version >= told[-1] >= last, "what was told has happened"
        assert value == b"the value of version %d" % version * 100
        assert not [path for path in (tmp_path / "secrets").iterdir() if path.name.startswith(".")]
        last = version


def test_a_full_disk(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a file system of a size needs root")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", place], check=True)
    try:
        found = SecretStore.open(place / "secrets", place_of(None, place, {}))
        found.set("TOKEN", VALUE)
        found.set("LARGE", b"x" * MAX_VALUE)
        found.set("OTHER", b"y" * 1000)
        with (place / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        for write, name in ((found.rotate, "OTHER"), (found.set, "NEW"), (found.rotate, "LARGE")):
            with pytest.raises(errors.HostFailed, match="no space is left"):
                write(name, b"z" * MAX_VALUE)
        again = SecretStore.open(place / "secrets", place_of(None, place, {}))
        for one in (found, again):
            assert [info.name for info in one.list()] == ["LARGE", "OTHER", "TOKEN"]
            assert taken(one, "OTHER") == (1, b"y" * 1000)
            assert taken(one, "TOKEN") == (1, VALUE)
        (place / "filler").unlink()
        assert found.rotate("OTHER", OTHER).version == 2
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.anyio
async def test_who_watches_is_told(opened: Callable[..., SecretStore]) -> None:
    import anyio  # noqa: PLC0415
    import anyio.to_thread  # noqa: PLC0415

    found = opened()
    found.set("TOKEN", VALUE)
    found.set("OTHER", VALUE)
    told: list[str] = []
    with found.watched(["TOKEN"], told.append):
        await anyio.to_thread.run_sync(found.rotate, "OTHER", OTHER)
        await anyio.to_thread.run_sync(found.rotate, "TOKEN", OTHER)
        await anyio.to_thread.run_sync(found.remove, "TOKEN")
        await anyio.sleep(0.05)
        assert told == ["TOKEN", "TOKEN"]
    found.rotate("OTHER", VALUE)
    await anyio.sleep(0.05)
    assert told == ["TOKEN", "TOKEN"]
    assert found._watching == {}
