"""Secrets: a call has those that its policy grants, as the policy says, and tells nobody."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from typing import TYPE_CHECKING

import pytest

from sandboxd import errors
from sandboxd.conformance.case import controls, outcome, text
from sandboxd.conformance.plugin import needs
from sandboxd.conformance.test_pool import filled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.conformance.subject import Subject

pytestmark = needs("a daemon of the suite's own")

FILE, ENV = "CONFORMANCE_FILE", "CONFORMANCE_ENV"
LOOK = """
import hashlib, json, os
path = '/run/secrets/CONFORMANCE_FILE'
found = {'file': hashlib.sha256(open(path, 'rb').read()).hexdigest(),
         'env': hashlib.sha256(os.environb[b'CONFORMANCE_ENV']).hexdigest(),
         'names': os.listdir('/run/secrets')}
status, above = os.stat(path), os.stat('/run/secrets')
found['modes'] = [oct(status.st_mode & 0o7777), oct(above.st_mode & 0o7777)]
found['mine'] = status.st_uid == os.getuid() and status.st_gid == os.getgid()
def refused(what):
    try: what()
    except OSError as error: return error.errno
    return 0
found['refused'] = [refused(what) for what in (
    lambda: open(path, 'wb'), lambda: os.unlink(path), lambda: os.chmod(path, 0o644),
    lambda: open('/run/secrets/MORE', 'wb'), lambda: os.rename(path, '/run/secrets/MORE'))]
found['init'] = refused(lambda: open('/proc/1/environ', 'rb').read())
print(json.dumps(found))
"""
TELL = """
import base64, os, sys, time, urllib.parse
value = open('/run/secrets/CONFORMANCE_FILE', 'rb').read()
env = os.environb[b'CONFORMANCE_ENV']
said = [value, env, base64.b64encode(value), base64.b64encode(b'x' + value), base64.urlsafe_b64encode(value),
        value.hex().encode(), env.hex().upper().encode(), urllib.parse.quote(value, safe='').encode()]
for out in (1, 2):
    for one in said:
        half = len(one) // 2
        os.write(out, b'<' + one[:half]); time.sleep(0.01); os.write(out, one[half:] + b'>\\n')
open('/workspace/' + env.decode(), 'w').close()
"""


def sha(value: bytes) -> str:
    """As the program prints it."""
    return hashlib.sha256(value).hexdigest()


@pytest.fixture
def values(subject: Subject) -> Iterator[dict[str, bytes]]:
    """Secrets that are stored for a test: bytes of a file, and a text for the environment."""
    given = {FILE: b"\1" + secrets.token_bytes(39) + b"\0/+", ENV: secrets.token_urlsafe(30).encode()}
    for name, value in given.items():
        with contextlib.suppress(errors.NotFound):
            subject.client.remove_secret(name)
        subject.client.set_secret(name, value)
    yield given
    for name in given:
        subject.client.remove_secret(name)


def test_a_call_has_what_its_policy_grants(subject: Subject, values: dict[str, bytes]) -> None:
    call = subject.run("python3", "-c", LOOK, policy="secrets")
    found = json.loads(text(call))
    assert (found["file"], found["env"]) == (sha(values[FILE]), sha(values[ENV]))
    assert found["names"] == [FILE]
    assert (found["modes"], found["mine"]) == (["0o400", "0o500"], True)
    assert found["refused"] == [30] * 5, "EROFS"
    assert found["init"] == 2, "ENOENT: hidden"
    versions = {name: subject.client.secret(name).version for name in values}
    assert [(one.name, one.version, one.as_) for one in call.secrets] == [
        (FILE, versions[FILE], "file"),
        (ENV, versions[ENV], "env"),
    ]
    told = controls(call)
    assert told["secrets"].in_force.endswith("ro nosuid nodev noexec")
    assert told[f"secret {FILE}"].in_force.endswith(f"1 link, version {versions[FILE]}")
    assert outcome(call).redacted == 0


def test_what_it_says_of_them_is_redacted(subject: Subject, values: dict[str, bytes]) -> None:
    call = subject.run("python3", "-c", TELL, policy="secrets")
    assert outcome(call).exit_code == 0, text(call, "stderr")
    for stream in ("stdout", "stderr"):
        lines = text(call, stream).splitlines()
        assert len(lines) == 8
        for line in lines:
            assert line.startswith(("<[redacted:CONFORMANCE_", "<eF[redacted:CONFORMANCE_", "<e")), line
            assert len(line) < 40
    assert [one.path for one in call.artifacts] == [f"[redacted:{ENV}]"]
    assert outcome(call).redacted == 17
    told = json.dumps([event.model_dump(mode="json") for event in subject.client.events(call.id)])
    assert values[ENV].decode() not in told


@pytest.mark.usefixtures("values")
def test_a_rotated_secret_is_new_for_the_next_call(subject: Subject) -> None:
    filled(subject, "secrets")
    before = subject.client.secret(FILE).version
    new = secrets.token_bytes(33)
    subject.client.rotate_secret(FILE, new)
    call = subject.run("python3", "-c", LOOK, policy="secrets")
    assert json.loads(text(call))["file"] == sha(new)
    assert call.secrets[0].version == (before or 0) + 1


def test_a_warm_interpreter_has_them_too(subject: Subject, values: dict[str, bytes]) -> None:
    filled(subject, "secrets-warm")
    call = subject.run("python3", "-c", LOOK, policy="secrets-warm")
    found = json.loads(text(call))
    assert (found["file"], found["env"]) == (sha(values[FILE]), sha(values[ENV]))


@pytest.mark.usefixtures("values")
def test_other_calls_have_none(subject: Subject) -> None:
    running = subject.start("sleep", "60", policy="secrets")
    subject.until(lambda: subject.client.get(running.id).state == "running", "it runs")
    code = (
        "import os\nprint(os.path.exists('/run/secrets'), [n for n in os.environ if 'CONFORMANCE' in n])\n"
        "print([p for p in os.listdir('/proc') if p.isdigit() and p not in ('1', str(os.getpid()))])"
    )
    assert text(subject.run("python3", "-c", code, policy="python")) == "False []\n[]\n"
    subject.client.cancel(running.id)


def test_what_is_not_there_is_refused_before_anything_runs(subject: Subject) -> None:
    with pytest.raises(errors.SecretMissing, match=f"secret set {FILE}") as refused:
        subject.run("true", policy="secrets")
    assert refused.value.details["secret"] == FILE
