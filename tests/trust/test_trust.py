"""Containers trust the daemon's authority where a rule looks into HTTP: the daemon's own engine."""

from __future__ import annotations

import base64
import os
import re
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from archives import shell_tar
from cryptography.hazmat.primitives.serialization import Encoding
from daemons import start_daemon, until, waited
from trusting import (
    DEBIAN,
    OURS,
    PLACE,
    PLAIN,
    RULES,
    VARIABLES,
    add,
    check_absence,
    check_python,
    host_mounts,
    printed,
    trust_of,
)

from sandboxd.egress.leaves import Leaves
from sandboxd.images import ImageStore
from sandboxd.policy import load_policies, shipped_policies
from sandboxd.policy.filesystem import mount_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon

    from sandboxd.images import Image


@pytest.fixture(scope="module", params=["builtin", "crun", "runc"])
def trusting(
    request: pytest.FixtureRequest,
    leak_session: object,
    need: Callable[[object, str], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Daemon]:
    """A daemon with policies of both kinds."""
    need(request.param == "builtin" or shutil.which(request.param), request.param)
    directory = tmp_path_factory.mktemp("trusting")
    with start_daemon(directory, config=f"runtime: {request.param}\n") as daemon:
        add(daemon, "look", f"extends: python\nwarm: !remove\n{RULES}")
        add(daemon, "net", f"extends: python\nwarm: !remove\n{PLAIN}")
        yield daemon
        assert host_mounts() == []


def test_programs_find_it(trusting: Daemon) -> None:
    check_python(trusting, "look")


def test_without_rules_of_http_there_is_none(trusting: Daemon) -> None:
    check_absence(trusting, "net")
    check_absence(trusting, "default")


@pytest.mark.parametrize(
    "rule",
    ["paths: [/x/**]", "headers: {X-A: b}", "websocket: true", "inject: {header: X-Token, value: abc}"],
)
def test_whatever_a_rule_says_of_http(trusting: Daemon, rule: str) -> None:
    rules = RULES.replace("methods: [GET]", rule)
    add(trusting, "other", f"extends: default\n{rules}")
    assert PLACE in trust_of(trusting.run("true", policy="other"))[1]


def test_a_denial_looks_inside_too(trusting: Daemon) -> None:
    denial = "network: {allow: [{host: a.test, ports: [80]}], deny: [{host: a.test, methods: [PUT]}]}\n"
    add(trusting, "denying", f"extends: default\n{denial}")
    assert PLACE in trust_of(trusting.run("true", policy="denying"))[1]


def test_the_hosts_own_programs(trusting: Daemon) -> None:
    add(trusting, "host-look", f"extends: default\nimage: host\n{RULES}")
    before = Path(DEBIAN).read_bytes() if Path(DEBIAN).exists() else None
    call = trusting.run("cat", PLACE, policy="host-look")
    _, places = trust_of(call)
    assert places == {PLACE, *([DEBIAN] if before is not None else [])}
    assert printed(call).encode().startswith(before or b"-----BEGIN")
    assert host_mounts() == []
    assert before is None or Path(DEBIAN).read_bytes() == before


def test_curl_and_openssl_find_it(trusting: Daemon) -> None:
    """They are this host's; whether they trust somebody is seen without a network."""
    add(trusting, "host-look", f"extends: default\nimage: host\n{RULES}")
    script = f"""
        tail -n 20 {PLACE} | sed -n '/BEGIN/,$p' >/tmp/ours.pem
        openssl verify /tmp/ours.pem; env -u SSL_CERT_FILE openssl verify -CAfile {DEBIAN} /tmp/ours.pem
        curl --version >/dev/null && curl -sv --connect-timeout 1 https://www.example.test/ 2>&1
    """
    text = printed(trusting.run("sh", "-c", script, policy="host-look"))
    assert text.startswith("/tmp/ours.pem: OK\n/tmp/ours.pem: OK\n"), text


def test_policy_and_request_have_their_own_way_with_variables(trusting: Daemon) -> None:
    add(trusting, "own", f"extends: default\n{RULES}process: {{env: {{PIP_CERT: /mine}}}}\n")
    call = trusting.run("env", policy="own", env={"SSL_CERT_FILE": "/asked", "DENO_CERT": ""})
    found = dict(line.partition("=")[::2] for line in printed(call).splitlines())
    assert (found["PIP_CERT"], found["SSL_CERT_FILE"], found["DENO_CERT"]) == ("/mine", "/asked", "")
    others = VARIABLES - {"PIP_CERT", "SSL_CERT_FILE", "DENO_CERT"}
    assert {name for name, value in found.items() if value == PLACE} == others


def test_a_root_that_can_be_written_has_it_too(trusting: Daemon) -> None:
    root = "filesystem: {root: overlay, size: 8MiB}\nprocess: {user: 0}\n"
    add(trusting, "overlay", f"extends: python\nwarm: !remove\n{root}{RULES}")
    check_python(trusting, "overlay")


def test_a_warm_interpreter_has_the_variables_from_its_start(trusting: Daemon) -> None:
    add(trusting, "warm-look", f"extends: python\nwarm: {{command: python3, preload: [ssl]}}\n{RULES}")
    code = f"print(open('/proc/self/environ').read().count('{PLACE}'))\n{OURS}"
    call = trusting.run("python3", "-c", code, policy="warm-look")
    started, _, last = printed(call).split()
    assert (int(started), last) == (len(VARIABLES), trust_of(call)[0])


def test_containers_share_no_inode_of_it(trusting: Daemon) -> None:
    """A lock on a file of one is none on that of another: else they could talk by it."""
    client = trusting.client()
    lock = f"import fcntl\nf = open('{PLACE}')\nfcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
    held = client.start(["python3", "-c", f"{lock}print('held', flush=True)\ninput()"], policy="look",
                        stdin="stream")  # fmt: skip
    until(lambda: (out := client.get(held.id).stdout) and out.size, "the lock is held")
    assert printed(trusting.run("python3", "-c", f"{lock}print('free')", policy="look")) == "free\n"
    client.cancel(held.id)


def test_what_an_operator_lends_is_not_covered(trusting: Daemon, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "ca-certificates.crt").write_text("the operator's\n")
    lent = f"mounts: [{{source: {tmp_path}, target: /etc/ssl/certs}}]\n"
    add(trusting, "lending", f"extends: default\n{lent}{RULES}")
    call = trusting.run("cat", DEBIAN, policy="lending")
    assert printed(call) == "the operator's\n"
    assert trust_of(call)[1] == {PLACE}


def test_the_table_that_examples_are_judged_by_is_what_a_container_has(trusting: Daemon) -> None:
    examples = f"examples: {{allows: [read {PLACE}], denies: [write {PLACE}]}}\n"
    add(trusting, "table", f"extends: python\nwarm: !remove\n{RULES}{examples}")
    policy = load_policies([shipped_policies(), trusting.policies]).get("table")
    table = {row.target for row in mount_table(policy.spec)}
    there = set(
        printed(trusting.run("cut", "-d ", "-f5", "/proc/self/mountinfo", policy="table")).splitlines()
    )
    assert there - table == {DEBIAN}  # which of its files is the bundle, an image alone knows
    assert PLACE in table & there


def key_in(authority_key: bytes, where: bytes) -> bool:
    """As PEM, or the number itself, in either order of its bytes."""
    body = b"".join(authority_key.splitlines()[1:-1])
    number = base64.b64decode(body)[36:68]  # PKCS #8 of P-256, RFC 5208 and 5915
    assert len(set(number)) > 8
    return any(part in where for part in (body[40:80], body[80:120], number, number[::-1]))


def memory_of(pid: int) -> Iterator[bytes]:
    """Its writable memory, in pieces."""
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb") as memory:
        for line in maps:
            found = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if found and "[v" not in line:
                first, end = (int(number, 16) for number in found.groups())
                with suppress(OSError, ValueError, OverflowError):
                    memory.seek(first)
                    yield memory.read(end - first)


PEM_KEY = re.compile(rb"-----BEGIN PRIVATE KEY-----\n(?:[A-Za-z0-9+/=]+\n)+-----END PRIVATE KEY-----")


def test_the_key_is_in_the_daemons_memory_and_nowhere_else(trusting: Daemon) -> None:
    """It is found where it should be, so that not to find it elsewhere says something."""
    client = trusting.client()
    call = client.start(["python3", "-c", "print('up', flush=True); input()"], policy="look", stdin="stream")
    until(lambda: (out := client.get(call.id).stdout) and out.size, "it runs")
    keys = {key for piece in memory_of(trusting.process.pid) for key in PEM_KEY.findall(piece)}
    assert len(keys) == 1
    key = keys.pop()
    held = set()
    descendants = psutil.Process(trusting.process.pid).children(recursive=True)
    for process in (psutil.Process(trusting.process.pid), *descendants):
        for name in ("environ", "cmdline"):
            assert not key_in(key, Path(f"/proc/{process.pid}/{name}").read_bytes()), process
        if any(key_in(key, piece) for piece in memory_of(process.pid)):
            held.add("egress" if "sandboxd.egress" in process.cmdline() else process.name())
    daemon = psutil.Process(trusting.process.pid).name()
    assert {daemon} <= held <= {daemon, "egress"}
    for top in (trusting.state, trusting.log.parent):
        for path, _, names in os.walk(top):
            for name in names:
                file = Path(path, name)
                if file.is_file() and not file.is_symlink() and "images" not in path:
                    assert not key_in(key, file.read_bytes()), file
    client.cancel(call.id)


def test_each_daemon_has_another(trusting: Daemon, tmp_path: Path) -> None:
    with start_daemon(tmp_path) as other:
        add(other, "look", f"extends: default\n{RULES}")
        here, there = (one.run("true", policy="look") for one in (trusting, other))
        assert trust_of(here)[0] != trust_of(there)[0]


def test_a_certificate_made_with_its_key_is_believed_for_its_name_alone(trusting: Daemon) -> None:
    [key] = {key for piece in memory_of(trusting.process.pid) for key in PEM_KEY.findall(piece)}
    add(trusting, "host-look", f"extends: default\nimage: host\n{RULES}")
    bundle = printed(trusting.run("cat", PLACE, policy="host-look"))
    authority = bundle[bundle.rindex("-----BEGIN CERTIFICATE-----") :]
    connection = Leaves(authority, key.decode()).connection("www.example.test", ())
    leaf = connection.get_certificate(as_cryptography=True)
    assert leaf is not None
    for name, status in (("www.example.test", 0), ("other.example.test", 2)):
        call = trusting.run(
            *("openssl", "verify", "-x509_strict", "-verify_hostname", name, "leaf.pem"),
            policy="host-look",
            inputs={"leaf.pem": leaf.public_bytes(Encoding.PEM)},
        )
        assert call.outcome is not None
        assert call.outcome.exit_code == status, call


def test_a_container_that_waits_has_it(tmp_path: Path) -> None:
    with start_daemon(tmp_path, config="pool: {min: 1, max: 2}\n") as daemon:
        add(daemon, "look", f"extends: default\n{RULES}")
        first = daemon.run("true", policy="look")
        until(
            lambda: [
                one for one in daemon.client().slots() if one.policy == "look" and one.state == "waiting"
            ],
            "a container waits",
        )
        second = daemon.run("cat", PLACE, policy="look")
        assert waited(second)
        assert trust_of(second) == trust_of(first)
        assert "BEGIN CERTIFICATE" in printed(second)


SECRET = "not for the tool\n"


def fifo(path: Path) -> None:
    os.mkfifo(path)


def private(path: Path) -> None:
    path.write_text(SECRET)
    path.chmod(0o600)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 10 * 2**30)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


HOSTILE: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "absolute": (lambda path: path.symlink_to("/etc/shadow"), set()),
    "escaping": (lambda path: path.symlink_to("../" * 40 + "etc/shadow"), set()),
    "by proc": (lambda path: path.symlink_to("/proc/1/root/etc/shadow"), set()),
    "magic": (lambda path: path.symlink_to("/proc/self/fd/0"), set()),
    "environ": (lambda path: path.symlink_to("/proc/1/environ"), set()),
    "init": (lambda path: path.symlink_to("/dev/.sandboxd"), set()),
    "null": (lambda path: path.symlink_to("/dev/null"), set()),
    "ours": (lambda path: path.symlink_to(PLACE), set()),
    "lent": (lambda path: path.symlink_to("/data/secret"), set()),
    "lent to all": (lambda path: path.symlink_to("/data/shown"), set()),
    "tmp": (lambda path: path.symlink_to("/tmp/x"), set()),
    "fifo": (fifo, set()),
    "directory": (lambda path: path.mkdir(), set()),
    "loop": (loop, set()),
    "dangling": (lambda path: path.symlink_to("/nowhere"), set()),
    "long": (lambda path: path.symlink_to("a" * 255 + "/b" * 500), set()),
    "private": (private, set()),
    "control characters": (lambda path: path.symlink_to("/x\n\x1b"), set()),
    "not utf-8": (lambda path: path.symlink_to(os.fsdecode(b"/x\xff")), set()),
    "empty": (lambda path: path.touch(), {DEBIAN}),
    "another of its files": (lambda path: path.symlink_to("/etc/passwd"), {"/etc/passwd"}),
    "device": (lambda path: os.mknod(path, 0o600 | 0o020000, os.makedev(1, 1)), set()),
}
"""What an image has in the place of its bundle, and where that is mounted over."""


@pytest.fixture(scope="module")
def hostile(
    leak_session: object, need: Callable[[object, str], None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Daemon, Image]]:
    """A daemon with an image of its own, whose tree is changed by the tests."""
    need(os.geteuid() == 0, "root")
    directory = tmp_path_factory.mktemp("hostile")
    directory.chmod(0o755)
    archive = directory / "image.tar"
    archive.write_bytes(shell_tar())
    image = ImageStore(directory / "state/images").import_(archive, name="hostile")
    assert image.rootfs is not None
    (directory / "data").mkdir(mode=0o755)
    for name, mode in (("secret", 0o600), ("shown", 0o644)):
        (directory / "data" / name).write_text(SECRET)
        (directory / "data" / name).chmod(mode)
    (image.rootfs / "etc/ssl/certs").mkdir(parents=True)
    (image.rootfs / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (image.rootfs / "etc/shadow").write_text(SECRET)
    (image.rootfs / "etc/shadow").chmod(0o600)
    for name in ("x\n\x1b", os.fsdecode(b"x\xff")):
        (image.rootfs / name).touch()
    with start_daemon(directory) as daemon:
        lent = f"mounts: [{{source: {directory}/data, target: /data}}]\n"
        add(daemon, "hostile", f"extends: tiny\nimage: hostile\n{lent}{RULES}")
        yield daemon, image


@contextmanager
def in_its_place(image: Image, make: Callable[[Path], object]) -> Iterator[Path]:
    assert image.rootfs is not None
    path = image.rootfs / DEBIAN[1:]
    make(path)
    try:
        yield path
    finally:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            path.rmdir()


@pytest.mark.parametrize("what", HOSTILE)
def test_whatever_an_image_has_there_leads_nowhere(hostile: tuple[Daemon, Image], what: str) -> None:
    daemon, image = hostile
    make, covered = HOSTILE[what]
    began = time.monotonic()
    with in_its_place(image, make):
        call = daemon.run("/usr/bin/cat", PLACE, *covered, policy="hostile")
    assert trust_of(call)[1] == {PLACE, *covered}
    text = printed(call)
    assert "-----BEGIN CERTIFICATE-----" in text
    assert SECRET not in text
    assert text.count("BEGIN") == 1 + len(covered)  # ours alone
    for line in Path("/etc/shadow").read_text().splitlines():
        assert line not in text
    assert host_mounts() == []
    assert time.monotonic() - began < 20


def test_a_bundle_that_is_none_is_named(hostile: tuple[Daemon, Image]) -> None:
    daemon, image = hostile
    with in_its_place(image, sparse):
        outcome = daemon.run("/usr/bin/true", policy="hostile").outcome
    assert outcome is not None
    assert outcome.error is not None
    assert (outcome.error.code, outcome.error.details["control"]) == ("control_not_enforced", "trust")
    assert "10GiB at /etc/ssl/certs/ca-certificates.crt" in outcome.error.message


def test_directories_that_lead_elsewhere(hostile: tuple[Daemon, Image]) -> None:
    daemon, image = hostile
    assert image.rootfs is not None
    certs = image.rootfs / "etc/ssl/certs"
    certs.rmdir()
    (image.rootfs / "opt").mkdir()
    (image.rootfs / "opt/ca-certificates.crt").write_text("# of the image\n")
    try:
        for target, covered in (("../" * 30 + "opt", {"/opt/ca-certificates.crt"}), ("/data", ()), ("/", ())):
            certs.symlink_to(target)
            call = daemon.run("/usr/bin/cat", PLACE, policy="hostile")
            certs.unlink()
            assert trust_of(call)[1] == {PLACE, *covered}
            assert printed(call).startswith("# of the image\n") is bool(covered)
    finally:
        certs.mkdir()


def test_more_than_one_bundle_of_an_image(hostile: tuple[Daemon, Image]) -> None:
    """Each keeps what it had; what is one file by two names is one file."""
    daemon, image = hostile
    assert image.rootfs is not None
    alpine, fedora = image.rootfs / "etc/ssl/cert.pem", image.rootfs / "etc/pki/tls/certs"
    fedora.mkdir(parents=True)
    alpine.symlink_to("certs/ca-certificates.crt")
    (fedora / "ca-bundle.crt").write_text("# another")  # without an end of line
    try:
        with in_its_place(image, lambda path: path.write_text("# the first\n")):
            other = "/etc/pki/tls/certs/ca-bundle.crt"
            call = daemon.run("/usr/bin/cat", PLACE, DEBIAN, "/etc/ssl/cert.pem", other, policy="hostile")
        assert trust_of(call)[1] == {PLACE, DEBIAN, other}
        text = printed(call)
        assert text.count("# the first\n") == 3
        assert text.count("# another\n") == 1
        assert text.count("BEGIN CERTIFICATE") == 4
    finally:
        alpine.unlink()
        shutil.rmtree(image.rootfs / "etc/pki")
