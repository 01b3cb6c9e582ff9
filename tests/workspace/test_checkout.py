"""A caller's own directory below a session: what a tool sees of it, and what it cannot get at."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from layered import shown_by_kernel

from sandboxd import errors
from sandboxd.init import LAUNCH
from sandboxd.kernel import mounts
from sandboxd.workspace.checkout import MOST_NAMESPACES, Checkout, Owner, check_directory
from sandboxd.workspace.diff import compare
from sandboxd.workspace.view import Lent as Layer
from sandboxd.workspace.view import View

if TYPE_CHECKING:
    from collections.abc import Iterator

CALLER = 4321
OTHER = 4322
BASE = 3_000_000_000
TOOL = BASE + 1000


@dataclass
class Lent:
    """A directory of a caller's, lent, and an overlay of it with an upper layer of a tool's own."""

    directory: Path
    checkout: Checkout
    root: int
    upper: Path

    def bottom(self, mount: int, gid: int = 1000) -> Layer:
        """The directory as a layer of a view."""
        return Layer(mount, self.checkout.rights(1000, gid, slot=0))

    def tool(self, program: str) -> subprocess.CompletedProcess[str]:
        """Run a program as the tool would, with the overlay as its root."""
        enter = f"import os,sys\nos.fchdir({self.root})\nos.chroot('.')\nos.chdir('/')\n"
        become = f"os.setgroups([])\nos.setresgid({TOOL},{TOOL},{TOOL})\nos.setresuid({TOOL},{TOOL},{TOOL})\n"
        return subprocess.run(
            [
                sys.executable,
                "-I",
                "-c",
                "import socket, time, encodings.idna\n" + enter + become + program,
            ],
            pass_fds=[self.root],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


def owned(path: Path, uid: int, mode: int, content: str | None = "content") -> None:
    if content is not None:
        path.write_text(content)
    else:
        path.mkdir()
    os.chown(path, uid, uid)
    path.chmod(mode)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    place = tmp_path / "checkout"
    owned(place, CALLER, 0o755, None)
    return place


@contextlib.contextmanager
def lent(
    directory: Path, tmp_path: Path, groups: frozenset[int] = frozenset(), gid: int = CALLER
) -> Iterator[Lent]:
    """As a session does it."""
    with contextlib.ExitStack() as stack:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, fd)
        owner = Owner(CALLER, gid, os.getpid(), groups)
        checkout = stack.enter_context(
            Checkout.of(fd, owner, place=tmp_path / "place", launcher=LAUNCH, kept=[tmp_path / "state"])
        )
        mount = checkout.mapped(1000, 1000, slot=BASE)
        stack.callback(os.close, mount)
        at = tmp_path / "lower"
        at.mkdir()
        mounts.attach(mount, at)
        upper, work = tmp_path / "upper", tmp_path / "work"
        owned(upper, TOOL, 0o755, None)
        work.mkdir()
        try:
            options: dict[str, str | None] = {"lowerdir": f"/proc/self/fd/{mount}"}
            options |= {"upperdir": str(upper), "workdir": str(work)}
            with replace(checkout.rights(1000, 1000, slot=BASE), uid=0).held():
                overlay = mounts.new_mount("overlay", options)
        finally:
            mounts.detach(at)
        stack.callback(os.close, overlay)
        root = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=overlay)
        stack.callback(os.close, root)
        yield Lent(directory, checkout, root, upper)


def test_the_callers_files_are_the_tools_and_stay_as_they_are(directory: Path, tmp_path: Path) -> None:
    owned(directory / "private", CALLER, 0o600)
    owned(directory / "sub", CALLER, 0o700, None)
    owned(directory / "sub" / "file", CALLER, 0o640)
    before = {path: path.read_text() for path in (directory / "private", directory / "sub" / "file")}
    program = """
assert open('/private').read() == 'content' and os.stat('/private').st_uid == os.getuid()
open('/private', 'a').write(' more')
os.rename('/sub/file', '/moved')
open('/new', 'w').close()
os.rmdir('/sub')
"""
    with lent(directory, tmp_path) as it:
        done = it.tool(program)
        assert (done.returncode, done.stderr) == (0, "")
        seen = {os.fsdecode(path): what[-1] for path, what in shown_by_kernel(it.root).items() if path}
    assert seen == {"private": b"content more", "moved": b"content", "new": b""}
    assert {path: path.read_text() for path in before} == before
    assert sorted(path.name for path in directory.iterdir()) == ["private", "sub"]


@pytest.mark.parametrize("how", ["owner", "group"])
def test_what_is_anothers_is_as_closed_as_its_mode_says(directory: Path, tmp_path: Path, how: str) -> None:
    """Files that the caller cannot read are not read by way of the daemon's root; nor by the daemon."""
    for name, mode in (("secret", 0o600), ("group", 0o660), ("open", 0o644), ("all", 0o666)):
        owned(directory / name, OTHER if how == "owner" else 0, mode)
    owned(directory / "closed", OTHER, 0o700, None)
    owned(directory / "closed" / "mine", CALLER, 0o644)
    owned(directory / "setuid", 0, 0o4755)
    program = """
for name in ('secret', 'group', 'closed/mine'):
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        try:
            os.close(os.open(f'/{name}', flags))
        except PermissionError:
            continue
        raise SystemExit(f'{name} was opened')
def change(path):
    os.chmod(path, 0o666)
for what, path in (os.listdir, '/closed'), (change, '/secret'), (os.unlink, '/secret'), (os.rmdir, '/closed'):
    try:
        what(path)
    except OSError:
        continue
    raise SystemExit(path)
assert open('/open').read() == open('/all').read() == 'content'
assert os.stat('/open').st_uid == 65534
try:
    open('/all', 'a')
except OSError:
    pass
else:
    raise SystemExit('copied up')
"""
    with lent(directory, tmp_path) as it:
        done = it.tool(program)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        mount = it.checkout.mapped(1000, 1000, slot=0)
        try:
            with View([it.upper, it.bottom(mount)]) as view:
                for closed in (b"secret", b"group", b"closed/mine"):
                    with pytest.raises(errors.NotPermitted, match="not its caller's to read"):
                        view.digest(view.find(closed) or view.root())
                with pytest.raises(errors.NotPermitted):
                    list(view.walk())
                kept = view.find(b"open")
                assert kept is not None
                assert (kept.uid, b"".join(view.content(kept))) == (65534, b"content")
        finally:
            os.close(mount)
    assert (directory / "secret").read_text() == "content"


def acl(path: Path, *entries: tuple[int, int, int]) -> None:
    """Set an access list: tag, permissions, id (linux/posix_acl_xattr.h)."""
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_access", value)


def closed_to_the_caller(directory: Path, gid: int, groups: frozenset[int]) -> list[str]:
    """Files of others that everybody may read, but for the caller or a group of the caller's."""
    none, user_obj, user, group_obj, group, mask, other = 0xFFFFFFFF, 1, 2, 4, 8, 0x10, 0x20
    rest = ((mask, 4, none), (other, 4, none))
    owned(directory / "by-user", OTHER, 0o644)
    acl(directory / "by-user", (user_obj, 6, none), (user, 0, CALLER), (group_obj, 4, none), *rest)
    names = ["by-user"]
    for one in (gid, *sorted(groups)):
        owned(directory / f"mode-{one}", OTHER, 0o604)
        os.chown(directory / f"mode-{one}", OTHER, one)
        owned(directory / f"list-{one}", OTHER, 0o644)
        acl(directory / f"list-{one}", (user_obj, 6, none), (group_obj, 4, none), (group, 0, one), *rest)
        owned(directory / f"sub-{one}", OTHER, 0o705, None)
        owned(directory / f"sub-{one}" / "f", OTHER, 0o644)
        os.chown(directory / f"sub-{one}", OTHER, one)
        names += [f"mode-{one}", f"list-{one}", f"sub-{one}/f"]
    for name in names:
        rights = {"user": CALLER, "group": gid, "extra_groups": sorted(groups)}
        done = subprocess.run(["cat", directory / name], check=False, capture_output=True, **rights)  # type: ignore[call-overload]
        assert done.returncode == 1
        assert b"Permission denied" in done.stderr
    return names


@pytest.mark.parametrize(
    ("gid", "groups"),
    [
        (CALLER, {5000, 65_535, 65_534}),
        (CALLER, {0, 1000, 200_000, 4_000_000_000}),
        (300_000, {1000, 70_000}),
        (1000, {CALLER, 80_000}),
        (0, {1000}),
    ],
)
def test_what_is_closed_to_the_caller_alone_is_closed(
    directory: Path, tmp_path: Path, gid: int, groups: set[int]
) -> None:
    """To others it is open, and neither the tool nor the daemon is an other."""
    for above in (tmp_path, *list(tmp_path.parents)[:3]):
        above.chmod(above.stat().st_mode | 0o011)
    kept = frozenset(groups)
    names = closed_to_the_caller(directory, gid, kept)
    owned(directory / "open", OTHER, 0o644)
    owned(directory / "mine", CALLER, 0o600)
    before = os.getgroups()
    with lent(directory, tmp_path, kept, gid) as it:
        for name in names:
            done = it.tool(f"open('/{name}')")
            assert "PermissionError" in done.stderr, name
        done = it.tool("print(open('/open').read(), open('/mine').read())")
        assert (done.stdout, done.stderr) == ("content content\n", "")
        mount = it.checkout.mapped(1000, 1000, slot=0)
        try:
            with View([it.upper, it.bottom(mount)]) as view:
                for name in names:
                    with pytest.raises(errors.NotPermitted, match="not its caller's to read"):
                        view.digest(view.find(name.encode()) or view.root())
                for readable in (b"open", b"mine"):
                    entry = view.find(readable)
                    assert entry is not None
                    assert b"".join(view.content(entry)) == b"content"
        finally:
            os.close(mount)
    assert os.getgroups() == before
    probe = tmp_path / "probe"
    probe.touch()
    assert (probe.stat().st_uid, probe.stat().st_gid) == (os.geteuid(), os.getegid())


def test_more_groups_than_a_map_has_room_for_are_refused(directory: Path, tmp_path: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        for count, fits in ((100, True), (400, False)):
            groups = frozenset(range(4_000_000_000, 4_000_000_000 + 2 * count, 2))
            owner = Owner(CALLER, CALLER, os.getpid(), groups)
            with Checkout.of(fd, owner, place=tmp_path / "p", launcher=LAUNCH, kept=[]) as checkout:
                if fits:
                    os.close(checkout.mapped(1000, 1000, slot=BASE))
                    continue
                with pytest.raises(errors.InvalidRequest, match="too many groups above 65535"):
                    checkout.mapped(1000, 1000, slot=0)
    finally:
        os.close(fd)


def test_few_namespaces_are_kept(directory: Path, tmp_path: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        owner = Owner(CALLER, CALLER, os.getpid())
        with Checkout.of(fd, owner, place=tmp_path / "p", launcher=LAUNCH, kept=[]) as checkout:
            before = len(list(Path("/proc/self/fd").iterdir()))
            for _ in range(2):
                for number in range(10):
                    mount = checkout.mapped(1000, 1000, slot=BASE + number * 65_536)
                    assert os.fstat(mount).st_uid == TOOL + number * 65_536
                    os.close(mount)
            assert len(list(Path("/proc/self/fd").iterdir())) <= before + MOST_NAMESPACES
    finally:
        os.close(fd)


@pytest.mark.parametrize("group", [0, 1000, OTHER, 65_535])
def test_a_file_of_the_callers_in_another_group_is_the_tools(
    directory: Path, tmp_path: Path, group: int
) -> None:
    owned(directory / "f", CALLER, 0o640)
    os.chown(directory / "f", CALLER, group)
    owned(directory / "theirs", OTHER, 0o660)
    os.chown(directory / "theirs", OTHER, group)
    with lent(directory, tmp_path) as it:
        done = it.tool("open('/f', 'a').write(' more'); print(open('/f').read()); open('/theirs')")
        assert done.stdout == "content more\n"
        assert "PermissionError" in done.stderr


def test_the_view_has_the_ids_of_a_layer(directory: Path, tmp_path: Path) -> None:
    owned(directory / "f", CALLER, 0o600)
    with lent(directory, tmp_path) as it:
        it.tool("open('/f', 'w').write('changed'); open('/g', 'w').close()")
        mount = it.checkout.mapped(1000, 1001, slot=0)
        try:
            bottom = it.bottom(mount, 1001)
            with View([bottom]) as old, View([it.upper, bottom]) as new:
                entry = old.find(b"f")
                assert entry is not None
                assert (entry.uid, entry.gid) == (1000, 1001)
                assert b"".join(old.content(entry)) == b"content"
                assert [one.path for one in compare(old, new) if one.path] == [b"f", b"g"]
        finally:
            os.close(mount)


def test_mounts_below_do_not_come_along(directory: Path, tmp_path: Path) -> None:
    owned(directory / "mounted", CALLER, 0o755, None)
    owned(directory / "mounted" / "below", CALLER, 0o644)
    tmpfs = mounts.new_mount("tmpfs", {"mode": "0777"})
    mounts.attach(tmpfs, directory / "mounted")
    os.close(tmpfs)
    try:
        owned(directory / "mounted" / "elsewhere", CALLER, 0o644)
        with lent(directory, tmp_path) as it:
            assert set(shown_by_kernel(it.root)) == {b"", b"mounted", b"mounted/below"}
    finally:
        mounts.detach(directory / "mounted")


def test_devices_and_setuid_files_are_without_effect(directory: Path, tmp_path: Path) -> None:
    os.mknod(directory / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (directory / "null").chmod(0o666)
    shutil.copy("/usr/bin/id", directory / "id")
    os.chown(directory / "id", 0, 0)
    (directory / "id").chmod(0o4755)
    with lent(directory, tmp_path) as it:
        entries = mounts.parse_mountinfo(Path("/proc/self/mountinfo").read_text())
        (kept,) = [entry for entry in entries if entry.target == str(it.checkout.place)]
        assert {"ro", "nosuid", "nodev", "nosymfollow"} <= kept.options
        done = it.tool("open('/null')")
        assert "PermissionError" in done.stderr


def test_a_link_leads_into_the_container(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the host")
    (directory / "absolute").symlink_to(tmp_path / "secret")
    (directory / "relative").symlink_to("../secret")
    with lent(directory, tmp_path) as it:
        for name in ("absolute", "relative"):
            assert "FileNotFoundError" in it.tool(f"open('/{name}')").stderr


def test_a_directory_that_changes_meanwhile_breaks_no_wall(directory: Path, tmp_path: Path) -> None:
    """The caller renames, swaps for links and moves out, while the tool walks, writes and looks up."""
    outside = tmp_path / "outside"
    owned(outside, 0, 0o755, None)
    owned(outside / "secret", 0, 0o644, "of the host")
    owned(directory / "a", CALLER, 0o755, None)
    owned(directory / "a" / "b", CALLER, 0o755, None)
    owned(directory / "a" / "b" / "secret", CALLER, 0o644, "of the caller")
    stop = threading.Event()

    def change() -> None:
        moved = outside / "moved"
        stop.wait(1)
        while not stop.is_set():
            with contextlib.suppress(OSError):
                (directory / "a" / "b").rename(moved)
                (directory / "a" / "b").symlink_to(outside)
                (directory / "a" / "b").unlink()
                moved.rename(directory / "a" / "b")
                (directory / "a").rename(directory / "c")
                (directory / "a").symlink_to("..")
                (directory / "a").unlink()
                (directory / "c").rename(directory / "a")

    program = """
end = time.monotonic() + 3
held, seen = None, set()
while time.monotonic() < end:
    for path in ('/a/b/secret', '/a/secret', '/a/b/../../../../outside/secret', '/c/b/secret'):
        try:
            seen.add(open(path).read())
        except OSError:
            pass
    try:
        if held is None:
            held = os.open('/a/b', os.O_RDONLY | os.O_DIRECTORY)
        up = os.open('../' * 20, os.O_RDONLY | os.O_DIRECTORY, dir_fd=held)
        names = set(os.listdir(up))
        os.close(up)
        if not names <= {'a', 'b', 'c', 'new', 'secret'}:
            raise SystemExit(f'got out: {names}')
        open('/a/b/new', 'w').close()
        os.unlink('/a/b/new')
        list(os.walk('/'))
    except OSError:
        pass
if not seen <= {'of the caller', ''}:
    raise SystemExit(f'read: {seen}')
print(sorted(seen))
"""
    with lent(directory, tmp_path) as it:
        changing = threading.Thread(target=change)
        changing.start()
        try:
            done = it.tool(program)
        finally:
            stop.set()
            changing.join()
        assert (done.returncode, done.stderr) == (0, "")
        assert "of the caller" in done.stdout
    assert (outside / "secret").read_text() == "of the host"


def test_a_directory_of_another_mount_namespace(directory: Path, tmp_path: Path) -> None:
    """The caller lives in one of its own, as the host is to a daemon that has its own."""
    owned(directory / "f", CALLER, 0o600)
    program = "import os,sys,socket\nfd=os.open(sys.argv[1],os.O_RDONLY)\n"
    program += "s=socket.socket(fileno=int(sys.argv[2]))\nsocket.send_fds(s,[b'x'],[fd])\ns.recv(1)\n"
    ours, theirs = socket.socketpair()
    command = ["unshare", "--mount", sys.executable, "-c", program, str(directory), str(theirs.fileno())]
    with ours, theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as caller:
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        try:
            place, nobody = tmp_path / "p", Owner(CALLER, CALLER, 0)
            with pytest.raises(errors.InvalidRequest, match="on no mount of the process"):
                Checkout.of(fds[0], nobody, place=place, launcher=LAUNCH, kept=[])
            owner = Owner(CALLER, CALLER, caller.pid)
            with Checkout.of(fds[0], owner, place=place, launcher=LAUNCH, kept=[]) as checkout:
                mount = checkout.mapped(1000, 1000, slot=BASE)
                assert os.stat("f", dir_fd=mount).st_uid == TOOL
                os.close(mount)
        finally:
            os.close(fds[0])
            ours.send(b"x")
    assert not (tmp_path / "p").exists()


def test_what_is_refused(directory: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "layers").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(state)
    for path, flags, words in (
        (Path("/"), os.O_RDONLY, "/ is not lent"),
        (tmp_path, os.O_RDONLY, "the daemon's own"),
        (state, os.O_RDONLY, "the daemon's own"),
        (tmp_path / "link", os.O_RDONLY, "the daemon's own"),
        (state / "layers", os.O_RDONLY, "is in .*the daemon's own"),
        (tmp_path / "file", os.O_RDONLY, "no directory"),
        (directory, os.O_PATH, "O_PATH"),
    ):
        fd = os.open(path, flags)
        try:
            with pytest.raises(errors.InvalidRequest, match=words) as error:
                check_directory(fd, [state, tmp_path / "gone" / "socket"])
            assert error.value.details["field"] == "directory"
        finally:
            os.close(fd)
    fd = os.open(directory, os.O_RDONLY)
    check_directory(fd, [state])
    os.close(fd)


def test_a_file_system_without_id_maps_is_refused_with_its_reason(tmp_path: Path) -> None:
    fd = os.open("/proc/sys", os.O_RDONLY)
    try:
        owner = Owner(CALLER, CALLER, os.getpid())
        with (
            Checkout.of(fd, owner, place=tmp_path / "p", launcher=LAUNCH, kept=[]) as checkout,
            pytest.raises(errors.InvalidRequest, match="cannot map ids of"),
        ):
            checkout.mapped(1000, 1000, slot=BASE)
    finally:
        os.close(fd)


def test_a_socket_of_the_callers_in_its_directory(directory: Path, tmp_path: Path) -> None:
    """Nobody is behind it in the overlay, whose inodes are its own; nor behind a FIFO."""
    path = directory / "agent"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        os.chown(path, CALLER, CALLER)
        listener.listen()
        os.mkfifo(directory / "fifo", 0o666)
        os.chown(directory / "fifo", CALLER, CALLER)
        reader = os.open(directory / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        with lent(directory, tmp_path) as it:
            done = it.tool("os.open('/fifo', os.O_WRONLY | os.O_NONBLOCK)")
            os.close(reader)
            assert "No such device or address" in done.stderr
            done = it.tool("s = socket.socket(socket.AF_UNIX); s.connect('/agent')")
            assert "ConnectionRefusedError" in done.stderr
