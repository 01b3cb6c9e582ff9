"""The files of a session in the workspace of a container that waits, for every engine, before hand-over.

Theory of operation.  The layers are on disk with the container's own ids, and are shown through one mount
of all of them that is mapped to the slot's ids. Above them comes a tmpfs of the policy's size, whose files
have the slot's ids as they are; what it holds in the end is taken off it with the ids moved back. (A tmpfs
that is mapped as well makes an overlay that cannot be written to, unless the host's root is in the map.)
The overlay is made detached and moved into the container's mount namespace, in the place of the empty
workspace: so one that has waited does as well as one that was made for the call, whatever engine made it.

The features of overlayfs that keep something of other layers in a layer (``redirect_dir``, ``metacopy``,
``index``) are off, whatever the kernel's default: a layer stands for itself, and renaming a directory of an
earlier call says EXDEV, as in a container of Docker; programs copy then.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.engine.base import Stacked
from sandboxd.kernel import mounts
from sandboxd.kernel.inside import in_mount_namespace
from sandboxd.workspace.layer import DIRECTORY, dress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sandboxd.engine.base import Slot
    from sandboxd.workspace.checkout import Checkout

__all__ = ["attach_stack"]

WORKSPACE = "/workspace"
FEATURES = {"index": "off", "metacopy": "off", "redirect_dir": "off", "xino": "off"}


def attach_stack(
    slot: Slot,
    layers: Sequence[str],
    *,
    store: Path,
    places: Path,
    empty: str,
    checkout: Checkout | None,
    stack: ExitStack,
) -> None:
    """Put layers of a session, the newest first, into the workspace of a slot whose tool is parked.

    They are names in the directory ``store``; ``empty`` is one with nothing in it, for a session without any.
    Below them is the caller's directory, if it has lent one.
    ``places`` is a directory of our own mount namespace, used for a moment. ``stack`` closes what the call
    keeps. Blocks for about a millisecond. Raises OSError, HostFailed.
    """
    with ExitStack() as once:
        shown = _shown(slot, store, _place(places, f"{slot.id}-layers", once), once)
        upper, above = _upper(slot, _place(places, f"{slot.id}-upper", once), stack, once)
        if layers:
            newest = os.open(store / layers[0], DIRECTORY)
            once.callback(os.close, newest)
            dress(upper, newest, slot.id_base)
        bottom = () if layers or checkout is not None else (empty,)
        lowers = [f"{shown}/{name}" for name in (*layers, *bottom)]
        if checkout is not None:
            lowers.append(_lent(slot, checkout, _place(places, f"{slot.id}-checkout", once), once))
        options = {"upperdir": f"{above}/upper", "workdir": f"{above}/work", **FEATURES}
        with _mounting(slot, checkout):
            overlay = mounts.new_overlay(lowers, options, _place(places, f"{slot.id}-overlay", once))
        once.callback(os.close, overlay)
        root = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=overlay)
        stack.callback(os.close, root)
        _put(slot.init_pid, overlay)
    identity = os.fstat(root)
    slot.workspace_fd = root
    slot.presented = {**slot.presented, WORKSPACE: (identity.st_dev, identity.st_ino)}
    slot.stacked = Stacked(upper, len(layers), checkout is not None)


def _place(places: Path, name: str, once: ExitStack) -> Path:
    place = places / name
    place.mkdir(mode=0o700)
    once.callback(place.rmdir)
    return place


def _attached(mount: int, place: Path, once: ExitStack) -> None:
    """A layer has to be in a mount namespace while the overlay is made, which keeps it for itself then."""
    mounts.attach(mount, place)
    once.callback(mounts.detach, place)


def _shown(slot: Slot, store: Path, place: Path, once: ExitStack) -> str:
    """The layers with the slot's ids; by a path that tells a tool which reads its ``mountinfo`` nothing."""
    mount = mounts.clone_tree(store)
    once.callback(os.close, mount)
    try:
        if slot.user_namespace is None:
            mounts.set_attributes(mount, read_only=True, userns=None)
        else:
            namespace = os.open(f"/proc/{slot.init_pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            once.callback(os.close, namespace)
            mounts.set_attributes(mount, read_only=True, userns=namespace)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise errors.HostFailed(
            f"{store} is on a file system that the kernel cannot map ids of, such as an overlay; in a "
            "container, put the state directory on a volume"
        ) from error
    _attached(mount, place, once)
    return f"/proc/self/fd/{mount}"


def _lent(slot: Slot, checkout: Checkout, place: Path, once: ExitStack) -> str:
    """The caller's directory, in which what is the caller's is the tool's."""
    owner = slot.shape.process
    mount = checkout.mapped(owner.uid, owner.gid, slot=slot.id_base)
    once.callback(os.close, mount)
    _attached(mount, place, once)
    return f"/proc/self/fd/{mount}"


@contextmanager
def _mounting(slot: Slot, checkout: Checkout | None) -> Iterator[None]:
    """Whoever makes an overlay reads its layers for the tool: with the groups of who lent one of them.

    So what is closed to a group of the caller's is closed to the tool as well. The maker stays root, which
    has to write for the tool, and cannot open what belongs to users that are not mapped.
    """
    if checkout is None:
        yield
        return
    owner = slot.shape.process
    with replace(checkout.rights(owner.uid, owner.gid, slot=slot.id_base), uid=0).held():
        yield


def _upper(slot: Slot, place: Path, stack: ExitStack, once: ExitStack) -> tuple[int, str]:
    """The directory that the call writes to, and the path of what it is in, beside overlayfs' own."""
    limits, owner = slot.shape.limits, slot.shape.process
    size = {"size": str(limits.workspace_size), "nr_inodes": str(limits.workspace_inodes)}
    mount = mounts.new_mount("tmpfs", {**size, "mode": "0700"})
    once.callback(os.close, mount)
    _attached(mount, place, once)
    root = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    once.callback(os.close, root)
    for part in ("upper", "work"):
        os.mkdir(part, 0o755, dir_fd=root)
    upper = os.open("upper", DIRECTORY, dir_fd=root)
    stack.callback(os.close, upper)
    os.fchown(upper, slot.id_base + owner.uid, slot.id_base + owner.gid)
    os.fchmod(upper, 0o755)
    return upper, f"/proc/self/fd/{root}"


def _put(init_pid: int, overlay: int) -> None:
    """Let the overlay take the place of what is at the workspace."""

    def put() -> None:
        mounts.detach(Path(WORKSPACE))
        mounts.attach(overlay, Path(WORKSPACE))

    namespace = os.open(f"/proc/{init_pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        in_mount_namespace(namespace, put)
    finally:
        os.close(namespace)
