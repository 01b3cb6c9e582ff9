"""psql and PostgreSQL, whose TLS begins with a question of its own, and which no rule looks into."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import socketserver
import struct
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import until
from networked import add_policy
from world import WEB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon
    from world import World

    from sandboxd.models import Invocation

NAME, OTHER = "db.example.test", "other.db.example.test"
PORT = 5432
RULES = f"""\
version: 1
name: {{name}}
extends: host
network:
  allow: [{{{{host: {NAME}, ports: [{PORT}]{{more}}}}}}, {{{{host: {OTHER}, ports: [{PORT}]}}}}]
"""


class Banner(socketserver.BaseRequestHandler):
    """Speaks first, and waits for an end."""

    def handle(self) -> None:
        self.request.sendall(b"220 welcome\r\n")
        self.request.recv(1)


@pytest.fixture(scope="module")
def programs(need: Callable[[object, str], None]) -> Path:
    """Where PostgreSQL's programs are."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    need(found, "postgresql")
    return found[-1].parent


@pytest.fixture(scope="module")
def database(world: World, programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A server of its own in a directory of its own, of a user who may do nothing; its certificate."""
    owner = pwd.getpwnam("nobody")
    place = tmp_path_factory.mktemp("postgres")
    for above in place.parents:  # of pytest's own, which are 0700
        if above.name.startswith("pytest-"):
            above.chmod(0o711)
    os.chown(place, owner.pw_uid, owner.pw_gid)
    data, password = place / "data", place / "password"
    password.write_text("a password\n")
    certificate = world.certificate(NAME)
    for kind in ("key", "crt"):
        copied = shutil.copy(f"{certificate}.{kind}", place / f"server.{kind}")
        os.chown(copied, owner.pw_uid, owner.pw_gid)
        Path(copied).chmod(0o600)
    user = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
    made = [str(programs / "initdb"), "-D", str(data), "-U", "tool", "-A", "scram-sha-256", "-N"]
    subprocess.run(
        [*user, *made, "--pwfile", str(password), "--locale=C"], check=True, capture_output=True, cwd=place
    )
    (data / "pg_hba.conf").write_text("hostssl postgres tool all scram-sha-256\nhost plain tool all trust\n")
    settings = {
        "listen_addresses": WEB,
        "port": PORT,
        "unix_socket_directories": "",
        "fsync": "off",
        "ssl": "on",
        "ssl_cert_file": place / "server.crt",
        "ssl_key_file": place / "server.key",
    }
    options = [each for name, value in settings.items() for each in ("-c", f"{name}={value}")]
    inside = ["ip", "netns", "exec", f"sandboxd-world-{os.getpid()}"]
    with (
        (place / "log").open("wb") as log,
        subprocess.Popen(
            [*inside, *user, str(programs / "postgres"), "-D", str(data), *options],
            stdout=log,
            stderr=log,
            cwd=place,
        ) as server,
    ):
        try:
            until(_answers, f"PostgreSQL listens: {place / 'log'}")
            world.records |= {NAME: [WEB], OTHER: [WEB]}
            yield Path(f"{certificate}.crt")
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(20)
            server.kill()


def _answers() -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((WEB, PORT)) == 0


@pytest.fixture(scope="module")
def psql(networked: Daemon, database: Path, programs: Path) -> Callable[..., Invocation]:
    """Run psql in a container."""
    add_policy(networked, "db", RULES.format(name="db", more=""))
    add_policy(networked, "db-http", RULES.format(name="db-http", more=", methods: [GET]"))
    certificate = database.read_text()

    def run(options: str, said: str, policy: str = "db") -> Invocation:
        connect = f"host={NAME} port={PORT} user=tool password='a password' connect_timeout=30 {options}"
        script = f'PGSYSCONFDIR=/nowhere {programs}/psql -XAtc "$0" "$1"; echo $?'
        return networked.run("sh", "-c", script, said, connect, policy=policy, inputs={"ca.pem": certificate})

    return run


def out(call: Invocation) -> list[str]:
    """What a call printed, by lines; its errors last."""
    assert call.stdout is not None, call.outcome
    assert call.stderr is not None
    return [*(call.stdout.text or "").splitlines(), call.stderr.text or ""]


SSL = "select ssl, version from pg_stat_ssl where pid = pg_backend_pid()"


def test_with_tls(psql: Callable[..., Invocation]) -> None:
    full = "sslmode=verify-full sslrootcert=ca.pem dbname=postgres"
    for options in ("dbname=postgres sslmode=require", full):
        call = psql(options, SSL)
        assert out(call)[0].startswith("t|TLS"), out(call)
        assert call.denials == []


def test_another_name_of_the_server_is_what_the_clients_own_check_is_for(
    psql: Callable[..., Invocation],
) -> None:
    call = psql(f"dbname=postgres sslmode=verify-full sslrootcert=ca.pem host={OTHER}", SSL)
    assert "does not match host name" in out(call)[-1]


def test_without_tls(psql: Callable[..., Invocation]) -> None:
    assert out(psql("dbname=postgres sslmode=disable", SSL))[0] == "2"  # the server's own refusal
    made = psql("dbname=postgres sslmode=require", "create database plain")
    assert out(made)[0] == "CREATE DATABASE", out(made)
    assert out(psql("dbname=plain sslmode=disable", SSL))[:2] == ["f|", "0"]


def test_a_lot_of_rows(psql: Callable[..., Invocation]) -> None:
    asked = (
        "select count(*), sum(length(x)) from (select repeat(i::text, 1000) x from generate_series(1, 9) i) y"
    )
    assert out(psql("dbname=postgres sslmode=require", asked))[0] == "9|9000"
    copied = psql(
        "dbname=postgres sslmode=require",
        "copy (select repeat('x', 999) from generate_series(1, 900)) to stdout",
    )
    assert len(out(copied)[0]) == 999
    assert len(out(copied)) == 902


def test_where_a_rule_looks_into_http_it_is_refused_and_does_not_hang(
    psql: Callable[..., Invocation],
) -> None:
    call = psql("dbname=postgres sslmode=require", SSL, policy="db-http")
    assert out(call)[0] == "2"
    assert "SSL" in out(call)[-1]


TALK = f"""
import socket
s = socket.create_connection(('{NAME}', {PORT}), timeout=20)
s.sendall(bytes.fromhex('{struct.pack(">II", 8, 80877103).hex()}'))
print(s.recv(1))
s.sendall(bytes.fromhex('160301'))  # and of what follows, a piece
s.settimeout(2)
try: print(s.recv(1))
except TimeoutError: print('waits')
"""


def test_the_question_for_tls_is_relayed_at_once(networked: Daemon, psql: Callable[..., Invocation]) -> None:
    del psql
    call = networked.run("python3", "-c", TALK, policy="db")
    assert out(call)[:2] == ["b'S'", "waits"], out(call)


BANNER = f"""
import socket, time
s = socket.create_connection(('{NAME}', PORT), timeout=50)
begun = time.monotonic()
try: print(s.recv(20))
except ConnectionResetError: print('reset after', 20 < time.monotonic() - begun < 45)
"""


def test_whoever_waits_for_the_server_to_begin_gets_what_it_says(
    world: World, networked: Daemon, psql: Callable[..., Invocation]
) -> None:
    del psql
    world.serve(WEB, 5433, Banner)
    add_policy(networked, "banner", RULES.replace(str(PORT), "5433").format(name="banner", more=""))
    call = networked.run("python3", "-c", BANNER.replace("PORT", "5433"), policy="banner")
    assert out(call)[0] == "b'220 welcome\\r\\n'", out(call)
    # where HTTP alone is spoken, nobody does: it is told so after a while
    call = networked.run("python3", "-c", BANNER.replace("PORT", str(PORT)), policy="db-http")
    assert out(call)[0] == "reset after True", out(call)
    [event] = [event.network for event in networked.client().events(call.id) if event.network]
    assert event.verdict == "failed"
    assert "said nothing for 30 seconds" in event.why
