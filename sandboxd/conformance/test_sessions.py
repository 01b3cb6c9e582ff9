"""Sessions: what a call leaves is there for the next, exactly; what failed leaves nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import errors
from sandboxd.conformance.case import controls, outcome, said, sh, text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sandboxd.conformance.subject import Subject
    from sandboxd.models import SessionInfo

MAKE = """
import json, os, socket
os.makedirs('d/e'); open('d/e/f', 'w').write('deep')
open('file', 'w').write('one'); os.chmod('file', 0o640); os.utime('file', ns=(1, 1_600_000_000_123_456_789))
os.link('file', 'same'); os.symlink('d/../file', 'link'); os.mkfifo('fifo')
listening = socket.socket(socket.AF_UNIX); listening.bind('socket')
with open('hole', 'wb') as hole:
    hole.truncate(1 << 30); hole.seek(1 << 29); hole.write(b'x')
open(b'\\xff\\n', 'w').close(); open('.wh.file', 'w').close(); open('.wh..wh..opq', 'w').close()
os.setxattr('file', 'user.kept', b'1'); os.setxattr('file', 'user.overlay.opaque', b'y')
os.mkdir('sticky'); os.chmod('sticky', 0o1777); os.chmod('d', 0o2755)
print(json.dumps('made'))
"""
LOOK = """
import json, os
found = {}
for directory, names, files in os.walk(b'.'):
    for name in names + files:
        path = os.path.join(directory, name)
        status = os.lstat(path)
        found[os.fsdecode(path)] = [oct(status.st_mode), status.st_uid, status.st_gid, status.st_nlink,
                                    status.st_size if not os.path.isdir(path) else 0, status.st_mtime_ns]
print(json.dumps(found))
"""
MORE = """
import json, os
hole = open('hole', 'rb')
print(json.dumps({
    'xattrs': os.listxattr('file'), 'same': os.path.samefile('file', 'same'), 'link': open('link').read(),
    'blocks': os.stat('hole').st_blocks, 'data': os.lseek(hole.fileno(), 0, os.SEEK_DATA) // 4096 * 4096,
    'write': open('d/e/f', 'a').write('er'), 'new': open('d/new', 'w').write('')}))
"""


@pytest.fixture
def session(subject: Subject) -> Iterator[SessionInfo]:
    """A session without files."""
    made = subject.client.create_session()
    yield made
    subject.client.delete_session(made.id)


def python(subject: Subject, session: SessionInfo, code: str) -> Any:
    """What a program said in a session."""
    return said(subject.run("python3", "-c", code, policy="python", session=session.id))


def test_what_a_call_leaves_is_there_exactly(subject: Subject, session: SessionInfo) -> None:
    assert python(subject, session, MAKE) == "made"
    first = python(subject, session, LOOK)
    assert first["./file"][:5] == ["0o100640", 1000, 1000, 2, 3]
    assert first["./file"][5] == 1_600_000_000_123_456_789
    assert [first[name][0] for name in ("./link", "./fifo", "./socket", "./sticky", "./d")] == [
        "0o120777", "0o10644", "0o140755", "0o41777", "0o42755"
    ]  # fmt: skip
    assert {"./\udcff\n", "./.wh.file", "./.wh..wh..opq", "./d/e/f"} <= set(first)
    found = python(subject, session, MORE)
    assert found["xattrs"] == ["user.kept"]
    assert (found["same"], found["link"]) == (True, "one")
    assert found["blocks"] < 100
    assert found["data"] == 1 << 29
    assert python(subject, session, "import json; print(json.dumps(open('d/e/f').read()))") == "deeper"
    assert set(python(subject, session, LOOK)) == {*first, "./d/new"}


def test_what_was_deleted_stays_deleted(subject: Subject, session: SessionInfo) -> None:
    for code, left in (
        ("mkdir -p a/b c; touch a/b/x a/y c/z f", ". ./a ./a/b ./a/b/x ./a/y ./c ./c/z ./f"),
        ("rm -r a/b f", ". ./a ./a/y ./c ./c/z"),
        ("mkdir a/b; touch a/b/new; rm -r c; echo > c", ". ./a ./a/b ./a/b/new ./a/y ./c"),
        ("rm -r a c; mkdir c", ". ./c"),
    ):
        found = subject.run(*sh(code), session=session.id)
        assert outcome(found).exit_code == 0, text(found, "stderr")
        listed = subject.run(*sh("find . | sort | tr '\\n' ' '"), session=session.id)
        assert text(listed).strip() == left


def test_the_receipt_says_what_is_at_the_workspace(subject: Subject, session: SessionInfo) -> None:
    alone = controls(subject.run("true"))["workspace"].in_force
    assert alone.startswith("tmpfs of ")
    for number in range(3):
        found = subject.run(*sh(f"touch f{number}"), session=session.id)
        line = controls(found)["workspace"]
        assert line.enforced
        assert line.in_force == (
            f"overlay, {16 << 20} bytes and 1000 inodes above {number} layers, writable, nosuid, nodev"
        )
        assert set(controls(found)) == set(controls(subject.run("true")))


@pytest.mark.parametrize(
    ("policy", "code", "kept"),
    [
        ("python", "exit 3", True),
        ("python", "kill -9 $$", False),
        ("python", "sleep 60", False),
        ("if-success", "exit 3", False),
        ("if-success", "exit 0", True),
        ("if-ran", "kill -9 $$", True),
        ("if-ran", "sleep 60", True),
        ("if-never", "exit 0", False),
    ],
)
def test_the_policy_says_what_is_kept(
    subject: Subject, session: SessionInfo, policy: str, code: str, *, kept: bool
) -> None:
    limits = {"wall": subject.duration(1)}
    found = subject.run(*sh(f"echo > new; {code}"), policy=policy, session=session.id, limits=limits)
    assert (found.checkpoint_after != found.checkpoint_before) == kept, found.outcome
    assert text(subject.run("ls", session=session.id)) == ("new\n" if kept else "")


def test_the_size_is_that_of_what_one_call_changes(subject: Subject, session: SessionInfo) -> None:
    for name in "ab":
        found = subject.run(*sh(f"head -c 12M /dev/zero | tr '\\0' x > {name}"), session=session.id)
        assert outcome(found).exit_code == 0, text(found, "stderr")
    full = subject.run(*sh("head -c 20M /dev/zero | tr '\\0' x > c; ls"), session=session.id)
    assert "No space left" in text(full, "stderr")
    assert [one.limit for one in full.limits_reached] == ["workspace.size"]


def test_forks_and_rollbacks(subject: Subject, session: SessionInfo) -> None:
    client = subject.client
    first = subject.run(*sh("echo one > f"), session=session.id).checkpoint_after
    subject.run(*sh("echo two > f"), session=session.id)
    fork = client.fork_session(session.id, checkpoint=first)
    try:
        assert text(subject.run("cat", "f", session=fork.id)) == "one\n"
        subject.run(*sh("rm f"), session=fork.id)
        assert text(subject.run("cat", "f", session=session.id)) == "two\n"
        assert client.rollback_session(session.id, str(first)).head.digest == first
        assert text(subject.run("cat", "f", session=session.id)) == "one\n"
    finally:
        client.delete_session(fork.id)
    with pytest.raises(errors.NotFound):
        subject.run("true", session=fork.id)


def test_calls_of_one_session_run_one_after_the_other(subject: Subject, session: SessionInfo) -> None:
    code = "[ -e busy ] && echo together; touch busy; sleep 0.2; rm busy; echo $0 >> log"
    started = [subject.start(*sh(code), str(number), session=session.id) for number in range(4)]
    assert [text(subject.wait(one)) for one in started] == [""] * 4
    assert text(subject.run("cat", "log", session=session.id)) == "0\n1\n2\n3\n"


def test_what_a_call_began_is_dead_before_its_files_are_kept(subject: Subject, session: SessionInfo) -> None:
    code = "(trap '' TERM HUP; while :; do date +%N > busy; done) > /dev/null 2>&1 & sleep 0.1; echo x > f"
    for _ in range(3):
        subject.run(*sh(code), session=session.id)
        found = [text(subject.run("cat", "busy", session=session.id)) for _ in range(2)]
        assert found[0] == found[1]


def test_a_session_is_told_in_the_invocation(subject: Subject, session: SessionInfo) -> None:
    found = subject.run(*sh("echo > f"), session=session.id)
    assert found.session == session.id
    assert found.checkpoint_before == session.head.digest
    known = subject.client.checkpoints(session.id).checkpoints
    assert [one.digest for one in known] == [found.checkpoint_after, found.checkpoint_before]
    assert known[0].call == found.id
    assert json.loads(found.model_dump_json())["checkpoint_after"] == known[0].digest
