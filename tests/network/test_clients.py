"""The programs that people run: they need no settings for what is allowed, and find no way to what is not."""

from __future__ import annotations

import functools
import shutil
import subprocess
import zipfile
from http.server import SimpleHTTPRequestHandler
from typing import TYPE_CHECKING

import pytest
from networked import add_policy
from world import FILES, OTHER
from world import FILES_NAME as NAME

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from daemons import Daemon
    from world import World

    from sandboxd.models import Invocation


RULES = f"""\
version: 1
name: {{name}}
extends: {{parent}}
{{more}}network:
  allow: [{{{{host: {NAME}, ports: [80, 443]}}}}]
"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves files."""

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def served(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that is served, by HTTP and HTTPS, with a repository and a package index in it."""
    root: Path = tmp_path_factory.mktemp("served")
    (root / "page").write_text("a page\n")
    work = root / "work"
    commands: list[list[str | Path]] = [
        ["git", "init", "-q", work],
        [
            "git",
            "-C",
            work,
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            "commit",
            "-qm",
            "c",
            "--allow-empty",
        ],
        ["git", "clone", "-q", "--bare", work, root / "repo.git"],
        ["git", "-C", root / "repo.git", "update-server-info"],
    ]
    for command in commands:
        subprocess.run(command, check=True, capture_output=True)
    wheel = root / "simple" / "tiny-thing" / "tiny_thing-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_thing.py", "print('installed')\n")
        info = "tiny_thing-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    handler = functools.partial(Quiet, directory=str(root))
    world.records[NAME] = [FILES]
    world.serve(FILES, 80, handler)
    world.serve(FILES, 443, handler, tls=NAME)
    return root


@pytest.fixture(scope="module")
def run(networked: Daemon, world: World, served: Path) -> Callable[..., Invocation]:
    """Run a shell script whose workspace has the server's certificate, ``ca.pem``."""
    del served
    add_policy(networked, "host-net", RULES.format(name="host-net", parent="host", more=""))
    add_policy(
        networked, "python-net", RULES.format(name="python-net", parent="python", more="warm: !remove\n")
    )
    for parent in ("host", "python"):
        rules = RULES.format(
            name=f"{parent}-http", parent=parent, more="warm: !remove\n" * (parent == "python")
        )
        add_policy(networked, f"{parent}-http", rules.replace("443]", "443], methods: [GET]"))
    certificate = world.certificate(NAME).with_name(f"{NAME}.pem.crt").read_text()

    def script(text: str, policy: str = "host-net") -> Invocation:
        inputs = {"ca.pem": certificate}
        return networked.run("sh", "-c", text, policy=policy, inputs=inputs)

    return script


def out(call: Invocation, status: int = 0) -> str:
    """What a call printed, once it ended like this."""
    assert call.outcome is not None
    assert call.stdout is not None
    assert call.stderr is not None
    assert call.outcome.exit_code == status, (call.outcome, call.stdout.text, call.stderr.text)
    return call.stdout.text or ""


def denied(call: Invocation) -> set[str]:
    """What it was refused."""
    return {denial.name for denial in call.denials}


def test_curl(run: Callable[..., Invocation]) -> None:
    assert out(run(f"curl -sS http://{NAME}/page")) == "a page\n"
    assert out(run(f"curl -sS --cacert ca.pem https://{NAME}/page")) == "a page\n"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (f"http://{OTHER}/", f"{OTHER}:80"),
        ("http://other.example.test/", "other.example.test"),
        (f"http://{NAME}:8080/", f"{NAME}:8080"),
        (f"--resolve {NAME}:80:{OTHER} http://{NAME}/", f"{OTHER}:80"),
        (f"--connect-to ::{OTHER}: http://{NAME}/", f"{OTHER}:80"),
        (f"-x http://{OTHER}:3128 http://{NAME}/", f"{OTHER}:3128"),
        (f"--socks5-hostname {OTHER}:1080 http://{NAME}/", f"{OTHER}:1080"),
        (f"--doh-url https://{OTHER}/dns-query http://{NAME}/", f"{OTHER}:443"),
        (
            f"--cacert ca.pem --connect-to other.example.test:443:{NAME}:443 https://other.example.test/",
            f"{NAME}:443",
        ),
    ],
)
def test_curl_finds_no_other_way(
    run: Callable[..., Invocation], world: World, arguments: str, name: str
) -> None:
    world.reached.clear()
    call = run(f"curl -sS --max-time 20 {arguments}; echo $?")
    assert out(call).strip() not in {"0", "28"}  # 28: it hung
    assert denied(call) == {name}
    assert not [address for address, _ in world.reached if address == OTHER]


def test_git(run: Callable[..., Invocation]) -> None:
    assert "1" in out(run(f"git clone -q http://{NAME}/repo.git && git -C repo rev-list --count HEAD"))
    clone = f"git -c http.sslCAInfo=$PWD/ca.pem clone -q https://{NAME}/repo.git"
    assert out(run(f"{clone} && git -C repo rev-list --count HEAD")) == "1\n"
    call = run("git clone -q https://github.example.test/repo.git")
    out(call, 128)
    assert denied(call) == {"github.example.test"}


def test_pip(run: Callable[..., Invocation]) -> None:
    install = f"pip install -q --cert ca.pem --index-url https://{NAME}/simple/ --target lib tiny-thing"
    assert out(run(f"{install} 2>&1 && PYTHONPATH=lib python3 -m tiny_thing", "python-net")) == "installed\n"


def test_requests(run: Callable[..., Invocation]) -> None:
    code = f"import requests; print(requests.get('https://{NAME}/page', verify='ca.pem').text, end='')"
    assert out(run(f'python3 -c "{code}"', "python-net")) == "a page\n"


def test_openssl(run: Callable[..., Invocation]) -> None:
    connect = f"echo | openssl s_client -connect {NAME}:443 -CAfile ca.pem -verify_return_error"
    assert "Verify return code: 0 (ok)" in out(run(f"{connect} 2>&1 || true"))  # it may be reset in the end
    call = run(f"{connect} -servername other.example.test 2>&1 | grep -c 'unrecognized name'")
    assert out(call) == "1\n"
    assert denied(call) == {f"{NAME}:443"}


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this host")
def test_node(run: Callable[..., Invocation]) -> None:
    code = f"fetch('https://{NAME}/page').then(r => r.text()).then(t => process.stdout.write(t))"
    call = run(f'NODE_EXTRA_CA_CERTS=ca.pem node -e "{code}"')
    assert out(call) == "a page\n"


PIP = (
    f"pip install -q --index-url https://{NAME}/simple/ --target lib tiny-thing 2>&1"
    " && PYTHONPATH=lib python3 -m tiny_thing"
)
URLLIB = f"import urllib.request as u; print(u.urlopen('https://{NAME}/page').read().decode())"
REQUESTS = f"import requests; print(requests.get('https://{NAME}/page').text)"
ISSUER = "| grep -o 'sandboxd CA' | head -1"


@pytest.mark.parametrize(
    ("script", "parent", "printed"),
    [
        (f"curl -sS https://{NAME}/page", "host", "a page"),
        (f"curl -sS --http2 -o /dev/null -w '%{{http_version}}' https://{NAME}/page", "host", "1.1"),
        (f"git clone -q https://{NAME}/repo.git && git -C repo rev-list --count HEAD", "host", "1"),
        (f'python3 -c "{URLLIB}"', "python", "a page"),
        (f'python3 -c "{REQUESTS}"', "python", "a page"),
        (PIP, "python", "installed"),
        (f"echo | openssl s_client -connect {NAME}:443 2>&1 {ISSUER}", "host", "sandboxd CA"),
        (f"curl -sS -X POST -d x -o /dev/null -w '%{{http_code}}' https://{NAME}/page", "host", "403"),
        (f"node -e \"fetch('https://{NAME}/page').then(r => r.text()).then(console.log)\"", "host", "a page"),
    ],
)  # fmt: skip
def test_programs_need_no_settings_where_rules_look_into_https(
    run: Callable[..., Invocation], script: str, parent: str, printed: str
) -> None:
    if script.startswith("node") and shutil.which("node") is None:
        pytest.skip("no node on this host")
    assert out(run(script, f"{parent}-http")).strip() == printed


def test_a_name_that_another_host_is_fronted_by_is_seen_where_rules_look_into_https(
    run: Callable[..., Invocation],
) -> None:
    call = run(f"curl -sS -H 'Host: hidden.example.test' https://{NAME}/page", "host-http")
    assert "421" in out(call)
    assert "hidden.example.test" in call.denials[0].detail
    # where they do not, nothing but the name of the connection is seen: SECURITY.md
    assert (
        out(run(f"curl -sS --cacert ca.pem -H 'Host: hidden.example.test' https://{NAME}/page")) == "a page\n"
    )
