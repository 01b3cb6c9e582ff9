"""Paths in policies and requests: host sources, container targets, and patterns of artifacts.

All functions are lexical; nothing here looks at a file system.
"""

from __future__ import annotations

import posixpath

from sandboxd import errors, globs

__all__ = [
    "MAX_PATH",
    "RESERVED",
    "SECRETS",
    "absolute",
    "artifact_pattern",
    "mount_source",
    "mount_target",
    "within",
]

MAX_PATH = 4095  # PATH_MAX less its NUL, limits.h
MAX_COMPONENT = 255  # NAME_MAX, limits.h
RESERVED = ("/proc", "/sys", "/dev", "/workspace", "/tmp")  # noqa: S108, the container's own mounts
"""What the container mounts itself: no mount of a policy goes there."""
SECRETS = "/run/secrets"
"""Where secrets are as files, in a container whose policy grants some so."""


def within(path: str, directory: str) -> bool:
    """Whether an absolute, normalised path is the directory or beneath it."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _bounded(path: str) -> None:
    if "\0" in path:
        raise ValueError("a path must not contain a NUL character")
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise ValueError("a path must be text that UTF-8 can hold") from None
    if len(encoded) > MAX_PATH:
        raise ValueError(f"a path has at most {MAX_PATH} bytes")
    if any(len(part) > MAX_COMPONENT for part in encoded.split(b"/")):
        raise ValueError(f"a component of a path has at most {MAX_COMPONENT} bytes")


def absolute(path: str) -> str:
    """The path itself if it is absolute and normalised. Raises ValueError."""
    _bounded(path)
    if not path.startswith("/"):
        raise ValueError(f"{path!r} is not absolute; write it from / on")
    # normpath keeps two leading slashes, as POSIX lets it
    normal = "/" + posixpath.normpath(path).lstrip("/")
    if path != normal:
        raise ValueError(f"{path!r} is not normalised; write {normal!r}")
    return path


def relative(path: str) -> str:
    """The path itself if it is relative, with no empty, ``.`` or ``..`` component. Raises ValueError."""
    _bounded(path)
    if not path or path.startswith("/"):
        raise ValueError(f"{path!r} is not relative; write it from the workspace on, with no leading /")
    if any(part in {"", ".", ".."} for part in path.split("/")):
        raise ValueError(f"{path!r} has an empty, '.' or '..' component")
    return path


def mount_source(path: str) -> str:
    """A host path that may be lent. Raises ValueError."""
    absolute(path)
    if path == "/":
        raise ValueError("the host's whole file system cannot be lent; name a directory in it")
    for kernel in ("/proc", "/sys", "/dev"):
        if within(path, kernel):
            raise ValueError(f"{path!r} is in the host's {kernel}, which cannot be lent")
    return path


def mount_target(path: str) -> str:
    """A container path where something may be mounted. Raises ValueError."""
    absolute(path)
    if path == "/":
        raise ValueError("the root is the image's; mount beneath it")
    for reserved in RESERVED:
        if within(path, reserved):
            raise ValueError(f"{path!r} is in {reserved}, which the container mounts itself")
    return path


def artifact_pattern(pattern: str) -> str:
    """A relative glob that ``globs`` takes; ``**`` is a component of its own. Raises ValueError."""
    relative(pattern)
    if any("**" in part and part != "**" for part in pattern.split("/")):
        raise ValueError(f"in {pattern!r} '**' stands beside other characters; it is a component of its own")
    try:
        globs.Pattern.of(pattern)
    except errors.InvalidRequest as error:
        raise ValueError(str(error)) from None
    return pattern
