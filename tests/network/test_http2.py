"""HTTP/2 through rules that look into it, between a real client and a real server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
from daemons import until
from networked import add_policy, start_networked
from world import WEB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from daemons import Daemon
    from world import World

NAME = "h2.http.test"
PORT = 8443
POLICY = f"""\
version: 1
name: h2
extends: host
network:
  allow:
    - host: {NAME}
      ports: [{PORT}]
      methods: [GET]
      paths: [/open, /large]
      inject: {{header: X-Given, value: on the way}}
"""


@pytest.fixture(scope="module")
def h2(
    world: World, tmp_path_factory: pytest.TempPathFactory, need: Callable[[object, str], None]
) -> Iterator[Daemon]:
    """A daemon whose containers may make some requests of nghttpd."""
    need(shutil.which("nghttpd"), "nghttpd")
    directory = tmp_path_factory.mktemp("h2")
    (directory / "open").write_text("a page\n")
    (directory / "large").write_bytes(bytes(20 * 2**20))
    world.records[NAME] = [WEB]
    certificate = world.certificate(NAME)
    inside = ["ip", "netns", "exec", f"sandboxd-world-{os.getpid()}"]
    argv = [
        "nghttpd",
        "-v",
        "-a",
        WEB,
        "-d",
        str(directory),
        str(PORT),
        f"{certificate}.key",
        f"{certificate}.crt",
    ]
    with (directory / "log").open("wb") as log, subprocess.Popen([*inside, *argv], stdout=log) as server:
        try:
            until(_answers, "nghttpd listens")
            with start_networked(directory / "d", authorities=f"{certificate}.crt") as daemon:
                add_policy(daemon, "h2", POLICY)
                yield daemon
        finally:
            server.terminate()


def _answers() -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((WEB, PORT)) == 0


def test_both_sides_speak_the_version_that_the_server_chose(h2: Daemon) -> None:
    get = "curl -sS -o {} -w '%{{http_version}} %{{http_code}} %{{size_download}}\\n' {}"
    url = f"https://{NAME}:{PORT}"
    script = "; ".join(
        [
            get.format("-", f"{url}/open"),
            get.format("/dev/null", f"{url}/large"),
            get.format("/dev/null", f"-X DELETE {url}/open"),
            get.format("/dev/null", f"{url}/open/../other"),
            get.format("/dev/null", f"-H 'Host: other.http.test:{PORT}' {url}/open"),
            get.format("/dev/null", f"--http1.1 {url}/open"),
        ]
    )
    call = h2.run("sh", "-c", script, policy="h2")
    assert call.stdout is not None
    assert call.stderr is not None
    lines = (call.stdout.text or "").splitlines()
    assert lines[0] == "a page", call.stderr.text
    # the last for want of a server that speaks that
    answers = ["2 200", "2 200", "2 403", "2 403", "2 421", "1.1 502"]
    assert [line.rsplit(" ", 1)[0] for line in lines[1:]] == answers
    assert lines[2].endswith(f" {20 * 2**20}")
    seen = [event.network for event in h2.client().events(call.id) if event.network is not None]
    asked = [(event.verdict, event.path, event.status) for event in seen if event.method]
    assert asked[:3] == [("allowed", "/open", 200), ("allowed", "/large", 200), ("denied", "/open", 0)]
    assert call.usage is not None
    assert call.usage.requests == 3
