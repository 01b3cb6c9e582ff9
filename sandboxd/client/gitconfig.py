"""What git's configuration says of files that are ignored everywhere: ``core.excludesFile``.

git is asked itself, where there is one. Its configuration is in more places than files have names (the
system's, which depends on how git was built, the user's, the repository's, the work tree's, the environment),
each may include others on conditions, and whether a repository is trusted at all (``safe.directory``) is for
git to say; whoever reads them anew is wrong somewhere, and then sends what was to stay. The repository may
be a stranger's, so nothing else of git is run: ``git config --get`` reads files and runs nothing that they
name, no hook, alias, file system monitor or pager, as its output is no terminal.

Where git cannot read the repository's configuration, or does not come to an end of it, the user's alone
counts: a damaged repository is one in which git works no more.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from sandboxd import errors

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["excludes_file"]

PATIENCE = 10.0
"""Seconds that git may take; a file that is included may be a FIFO."""
_ASKED = ("config", "--null", "--type=path", "--get", "core.excludesFile")
_UNSET = 1
_ELSEWHERE = {"GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_CONFIG", "GIT_PREFIX"}
"""What would have git look at another repository, as in one's hook."""


class _Failed(Exception):
    """Raised where git says nothing; why, in its words."""


def excludes_file(directory: Path) -> str | None:
    """The path of the file that counts in a directory, from the top of its work tree on, if there may be one.

    Raises InvalidRequest where git cannot read the user's configuration.
    """
    git = shutil.which("git")
    if git is None:
        return _by_default()
    try:
        said = _ask([git, "-C", os.fspath(directory), *_ASKED], {})
    except _Failed:
        try:
            said = _ask([git, *_ASKED], {"GIT_DIR": os.devnull})  # in no repository
        except _Failed as error:
            raise errors.InvalidRequest(
                f"git cannot read its configuration, which may say what is to be ignored: {error}"
            ) from None
    return _by_default() if said is None else said or None


def _ask(argv: list[str], more: dict[str, str]) -> str | None:
    """The value that git gives; None where none is set. Raises _Failed."""
    environ = {key: value for key, value in os.environ.items() if key not in _ELSEWHERE}
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environ | {"LC_ALL": "C"} | more,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _Failed(f"it did not come to an end within {PATIENCE:g} s") from None
    except OSError as error:
        raise _Failed(error.strerror or str(error)) from None
    if done.returncode == _UNSET:
        return None
    if done.returncode != 0:
        raise _Failed(done.stderr.decode("utf-8", "replace").strip()[-500:] or f"status {done.returncode}")
    return os.fsdecode(done.stdout.removesuffix(b"\0"))


def _by_default() -> str | None:
    """Where git looks if nothing is set (gitignore(5))."""
    if place := os.environ.get("XDG_CONFIG_HOME"):
        return os.path.join(place, "git", "ignore")  # noqa: PTH118 - it is as git has it, a text
    home = os.environ.get("HOME")
    return None if home is None else os.path.join(home, ".config", "git", "ignore")  # noqa: PTH118
