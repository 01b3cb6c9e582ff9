"""A registry on this machine, for images that are pulled."""

from __future__ import annotations

import socket
import subprocess
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from daemons import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def answers(port: int) -> bool:
    with closing(socket.socket()) as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running_registry(directory: Path) -> Iterator[str]:
    """Host and port of a registry that keeps what it has below ``directory``."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = directory / "registry.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error}\n"
        f"storage: {{filesystem: {{rootdirectory: {directory}/blobs}}}}\n"
        f"http: {{addr: 127.0.0.1:{port}}}\n"
    )
    command = ["docker-registry", "serve", str(config)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: answers(port), "the registry listens")
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
