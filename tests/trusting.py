"""What a container whose rules look into HTTP has to have, whichever engine made it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from daemons import until

if TYPE_CHECKING:
    from daemons import Daemon

    from sandboxd.models import Invocation

PLACE = "/dev/.sandboxd-ca.pem"
DEBIAN = "/etc/ssl/certs/ca-certificates.crt"
RULES = "network: {allow: [{host: www.example.test, ports: [443], methods: [GET]}]}\n"
PLAIN = "network: {allow: [{host: www.example.test, ports: [443]}]}\n"
VARIABLES = {
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO",
    "PIP_CERT", "AWS_CA_BUNDLE", "CARGO_HTTP_CAINFO", "DENO_CERT",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
}  # fmt: skip
OURS = """
import hashlib, ssl
found = ssl.create_default_context().get_ca_certs(binary_form=True)
print(len(found), *["sha256:" + hashlib.sha256(one).hexdigest() for one in found][-1:])
"""
TRIES = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def mount(*words):
    if libc.mount(*words): raise OSError(ctypes.get_errno(), "")
def unmount(path):
    if libc.umount2(path, 2): raise OSError(ctypes.get_errno(), "")
for path in {places!r}:
    for attempt in (
        lambda: open(path, "ab"), lambda: open(path, "wb"), lambda: os.unlink(path),
        lambda: os.rename(path, path + "x"), lambda: os.rename("/workspace/mine", path),
        lambda: os.chmod(path, 0o777), lambda: os.chown(path, 0, 0), lambda: os.utime(path),
        lambda: os.setxattr(path, "user.x", b""), lambda: os.truncate(path, 0),
        lambda: os.open(path, os.O_RDWR), lambda: os.link(path, "/workspace/linked"),
        lambda: unmount(path.encode()), lambda: mount(b"/workspace/mine", path.encode(), None, 4096, None),
        lambda: mount(None, path.encode(), None, 32, None),
    ):
        open("/workspace/mine", "w").close()
        try: attempt()
        except OSError: continue
        print("done", path)
"""


def add(daemon: Daemon, name: str, text: str) -> None:
    """Write a policy and wait until it is in force as it is written."""
    client, path, text = (
        daemon.client(),
        daemon.policies / f"{name}.yaml",
        f"version: 1\nname: {name}\n{text}",
    )
    if path.exists() and path.read_text() == text:
        return
    before = {one.name: one.digest for one in client.policies()}
    path.write_text(text)

    def in_force() -> bool:
        found = {one.name: one.digest for one in client.policies()}
        return found.get(name) not in {None, before.get(name)}

    until(in_force, f"{name} is in force: {client.health().problems}")


def printed(call: Invocation) -> str:
    """What it wrote; it ran to its end."""
    assert call.outcome is not None
    assert call.outcome.cause == "exited", call.outcome
    assert call.stdout is not None
    return call.stdout.text or ""


def trust_of(call: Invocation) -> tuple[str, set[str]]:
    """Whom its container trusts, and where that is said: as the receipt has it, all of which is in force."""
    assert call.receipt is not None, call.outcome
    assert all(control.enforced for control in call.receipt.controls)
    [line] = [control for control in call.receipt.controls if control.name == "trust"]
    who, _, places = line.in_force.partition(" at ")
    assert re.fullmatch("sha256:[0-9a-f]{64}", who), line
    assert line.read_from == f"content of {places}"
    found = set(places.split(", "))
    names = {control.name for control in call.receipt.controls}
    assert {f"mount {place}" for place in found} <= names
    return who, found


def check_python(daemon: Daemon, policy: str) -> None:
    """A container with Python and Debian's bundle."""
    call = daemon.run("python3", "-c", OURS, policy=policy)
    who, places = trust_of(call)
    assert places == {PLACE, DEBIAN}
    count, last = printed(call).split()
    assert last == who
    call = daemon.run("sh", "-c", f"env; for f in {PLACE} {DEBIAN}; do grep -c BEGIN $f; done", policy=policy)
    *env, first, second = printed(call).splitlines()
    assert first == second == count
    assert int(count) > 100
    there = dict(line.partition("=")[::2] for line in env)
    assert {name for name, value in there.items() if value == PLACE} == VARIABLES
    assert trust_of(call)[0] == who  # one authority for all calls
    tried = daemon.run("python3", "-c", TRIES.format(places=[PLACE, DEBIAN]), policy=policy)
    assert printed(tried) == "", tried
    assert printed(daemon.run("python3", "-c", OURS, policy=policy)) == f"{count} {who}\n"


def check_absence(daemon: Daemon, policy: str) -> None:
    """A container whose rules speak of no HTTP."""
    call = daemon.run("sh", "-c", "env; ls -A /dev; cut -d' ' -f5 /proc/self/mountinfo", policy=policy)
    text = printed(call)
    assert PLACE not in text
    assert "ca.pem" not in text
    assert DEBIAN not in text
    assert not any(name in text for name in VARIABLES)
    assert call.receipt is not None
    assert "trust" not in {control.name for control in call.receipt.controls}


def host_mounts() -> list[str]:
    """Mounts of this host that are bundles of containers."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if "/ca0.pem" in line or PLACE in line]
