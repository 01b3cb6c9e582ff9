"""The two files of an image that a Docker Engine itself reads, as root, before a container runs.

To start one it opens ``/etc/passwd`` and ``/etc/group``: a FIFO in their place holds that request for ever, a
file of gigabytes fills the engine's memory. So they are looked at before, which opens nothing.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import requests

from sandboxd import errors

if TYPE_CHECKING:
    from docker import APIClient

__all__ = ["check_accounts"]

FILES = ("/etc/passwd", "/etc/group")
MAX_SIZE = 1 << 20  # bytes
MAX_LINKS = 8
# io/fs.FileMode of Go, by which the API tells what a file is
SYMLINK = 1 << 27
NOT_REGULAR = 1 << 31 | SYMLINK | 1 << 26 | 1 << 25 | 1 << 24 | 1 << 21 | 1 << 19


def check_accounts(client: APIClient, container: str, image: str) -> None:
    """Raise EngineFailed for an image whose files the engine must not open.

    ``container`` is not started, and has nothing mounted: to look into it, the engine would mount that.
    """
    for path in FILES:
        try:
            found = _stat(client, container, path)
            for _ in range(MAX_LINKS):
                if found is None or not found["mode"] & SYMLINK:
                    break
                found = _stat(client, container, found["linkTarget"])
            fine = found is None or not (found["mode"] & NOT_REGULAR or found["size"] > MAX_SIZE)
        except requests.exceptions.HTTPError:  # links without an end, or through what is no directory
            fine = False
        if not fine:
            raise errors.EngineFailed(
                f"image {image}: {path} is no regular file of at most 1 MiB; the engine would open it"
            )


def _stat(client: APIClient, container: str, path: str) -> dict[str, Any] | None:
    answer = client.head(
        f"{client.base_url}/v{client.api_version}/containers/{container}/archive",
        params={"path": path},
        timeout=client.timeout,
    )
    if answer.status_code == 404:
        return None
    answer.raise_for_status()
    found: dict[str, Any] = json.loads(base64.b64decode(answer.headers["X-Docker-Container-Path-Stat"]))
    return found
