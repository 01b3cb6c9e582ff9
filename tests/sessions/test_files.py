"""The files of sessions over the API: read, compared, exported, and changed from outside."""

from __future__ import annotations

import io
import json
import os
import tarfile
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from sessioned import ask, by, sh

from sandboxd import AsyncClient, errors

if TYPE_CHECKING:
    from daemons import Daemon

    from sandboxd.models import SessionInfo


def said(daemon: Daemon, session: SessionInfo, code: str) -> str | None:
    stdout = sh(daemon, session, code).stdout
    return None if stdout is None else stdout.text


def test_what_calls_left_is_compared_listed_and_read(daemon: Daemon, session: SessionInfo) -> None:
    sh(daemon, session, "mkdir d; printf 'one\\ntwo\\n' >d/f; printf x >gone; ln -s d/f link")
    first = ask(daemon, "GET", f"{session.id}/diff").json
    assert [(one["path"], one["change"]) for one in first["changes"]] == [
        ("d", "added"),
        ("d/f", "added"),
        ("gone", "added"),
        ("link", "added"),
    ]
    sh(daemon, session, "printf 'one\\n2\\n' >d/f; rm gone; printf '\\0' >'100%\nbinary'; chmod 600 d")
    changed = ask(daemon, "GET", f"{session.id}/diff?text=1&since={first['to']}").json
    by_path = {one["path"]: one for one in changed["changes"]}
    assert {path: one["change"] for path, one in by_path.items()} == {
        "100%\nbinary": "added",
        "d": "changed",
        "d/f": "changed",
        "gone": "removed",
    }
    assert by_path["d/f"]["diff"] == "--- a/d/f\n+++ b/d/f\n@@ -1,2 +1,2 @@\n one\n-two\n+2\n"
    assert by_path["100%\nbinary"]["omitted"] == "binary"
    assert by_path["d"]["aspects"] == ["mode"]
    listed = ask(daemon, "GET", f"{session.id}/files?recursive=1").json["files"]
    assert [one["path"] for one in listed] == ["100%\nbinary", "d", "d/f", "link"]
    assert listed[3]["target"] == "d/f"
    got = ask(daemon, "GET", f"{session.id}/files/d/f")
    assert got.body == b"one\n2\n"
    assert got.headers["etag"] == f'"{by_path["d/f"]["new"]["digest"]}"'
    before = ask(daemon, "GET", f"{session.id}/files/d/f?checkpoint={first['to']}")
    assert before.body == b"one\ntwo\n"
    assert ask(daemon, "GET", f"{session.id}/files/100%25%0Abinary").body == b"\0"
    assert ask(daemon, "GET", f"{session.id}/files?path=d/f").json["code"] == "state_conflict"
    assert ask(daemon, "GET", f"{session.id}/files/link").json["code"] == "state_conflict"
    assert ask(daemon, "GET", f"{session.id}/files/link/x").json["code"] == "not_found"
    assert ask(daemon, "GET", f"{session.id}/files/..%2f..%2fetc/passwd").json["code"] == "invalid_request"
    assert ask(daemon, "GET", f"{session.id}/diff?limit=1").json["truncated"] is True
    assert ask(daemon, "GET", f"{session.id}").json["in_flight"] == 0


def test_checkpoints_of_two_sessions_are_compared(daemon: Daemon, session: SessionInfo) -> None:
    client = daemon.client()
    sh(daemon, session, "echo one >both; echo mine >mine")
    fork = client.fork_session(session.id)
    sh(daemon, session, "echo two >both")
    sh(daemon, fork.id, "echo theirs >theirs; rm mine")
    here, there = client.session(session.id).head, client.session(fork.id).head
    found = client.diff_session(fork.id, here.id, there.id, text=True)
    assert (found.since, found.to) == (here.id, there.id)
    assert {one.path: one.change for one in found.changes} == {
        "both": "changed", "mine": "removed", "theirs": "added",
    }  # fmt: skip
    assert "-two\n+one\n" in str({one.path: one.diff for one in found.changes}["both"]).replace("\\n", "\n")
    back = client.diff_session(session.id, there.digest, here.digest)
    assert {one.path: one.change for one in back.changes} == {
        "both": "changed", "mine": "added", "theirs": "removed",
    }  # fmt: skip
    client.delete_session(fork.id)
    with pytest.raises(errors.NotFound, match="no checkpoint"):
        client.diff_session(session.id, there.id)


def test_checkpoints_of_others_are_not_there(daemon: Daemon, session: SessionInfo) -> None:
    sh(daemon, session, "echo mine >mine")
    head = daemon.client().session(session.id).head
    with by(4243, daemon):
        own = daemon.client().create_session()
        for named in (head.id, head.digest):
            with pytest.raises(errors.NotFound, match="no checkpoint"):
                daemon.client().diff_session(own.id, named)
        daemon.client().delete_session(own.id)


def test_files_are_written_on_a_condition_and_calls_find_them(daemon: Daemon, session: SessionInfo) -> None:
    made = ask(daemon, "PUT", f"{session.id}/files/in/f", b"1", {"If-None-Match": "*"})
    assert (made.status, made.json["created"]) == (201, True)
    again = ask(daemon, "PUT", f"{session.id}/files/in/f", b"2", {"If-None-Match": "*"})
    assert (again.status, again.json["code"]) == (412, "precondition_failed")
    assert f'"{again.json["details"]["digest"]}"' == made.headers["etag"]
    changed = ask(
        daemon,
        "PUT",
        f"{session.id}/files/in/f?mode=755",
        b"#!/bin/sh\necho hi",
        {"If-Match": made.headers["etag"]},
    )
    assert changed.status == 200
    assert (
        said(daemon, session, "in/f; id -u; stat -c %u in in/f; echo more >>in/f") == "hi\n1000\n1000\n1000\n"
    )
    stale = ask(daemon, "DELETE", f"{session.id}/files/in/f", headers={"If-Match": changed.headers["etag"]})
    assert stale.status == 412
    assert ask(daemon, "DELETE", f"{session.id}/files/in").json["code"] == "state_conflict"
    assert ask(daemon, "DELETE", f"{session.id}/files/in?recursive=1").status == 200
    assert ask(daemon, "PUT", f"{session.id}/files/new/dir?directory=1").status == 201
    assert said(daemon, session, "find . | sort") == ".\n./new\n./new/dir\n"
    info = ask(daemon, "GET", session.id).json
    assert info["calls"] == 2
    back = ask(
        daemon,
        "POST",
        f"{session.id}/rollback",
        json.dumps({"checkpoint": changed.json["checkpoint"]}).encode(),
    )
    assert back.status == 200
    assert said(daemon, session, "cat in/f") == "#!/bin/sh\necho hi"
    for headers in ({"If-Match": "x"}, {"If-None-Match": "sha256:1"}):
        assert ask(daemon, "PUT", f"{session.id}/files/f", b"", headers).json["code"] == "invalid_request"


def test_conditions_name_several_files_or_whatever_is_there(daemon: Daemon, session: SessionInfo) -> None:
    path = f"{session.id}/files/f"
    none = ask(daemon, "PUT", path, b"1", {"If-Match": "*"})
    assert (none.status, none.json["code"]) == (412, "precondition_failed")
    assert ask(daemon, "DELETE", path, headers={"If-Match": "*"}).status == 412
    one = ask(daemon, "PUT", path, b"1", {"If-None-Match": '"another"'}).headers["etag"]
    assert ask(daemon, "PUT", path, b"2", {"If-None-Match": f"W/{one}"}).status == 412
    assert ask(daemon, "PUT", path, b"2", {"If-Match": f"W/{one}"}).status == 412
    two = ask(daemon, "PUT", path, b"2", {"If-Match": f'"another", {one}'}).headers["etag"]
    assert ask(daemon, "DELETE", path, headers={"If-None-Match": two}).status == 412
    assert ask(daemon, "PUT", path, b"3", {"If-Match": "*"}).status == 200
    assert said(daemon, session, "cat f; mkdir d; ln -s f l") == "3"
    for name in ("d", "l"):
        assert ask(daemon, "PUT", f"{session.id}/files/{name}", b"", {"If-Match": "*"}).status == 409
        assert ask(daemon, "DELETE", f"{session.id}/files/{name}", headers={"If-Match": "*"}).status == 200
    client = daemon.client()
    assert client.remove_file(session.id, "f", match="*").checkpoint
    with pytest.raises(errors.PreconditionFailed):
        client.remove_file(session.id, "f", match="*")
    with pytest.raises(errors.PreconditionFailed):
        client.write_file(session.id, "f", b"", match="*")
    layer, head = ask(daemon, "GET", f"{session.id}/export").body, client.session(session.id).head.digest
    target = f"{session.id}/import"
    assert ask(daemon, "POST", target, layer, {"If-Match": one}).status == 412
    assert ask(daemon, "POST", target, layer, {"If-None-Match": "*"}).json["code"] == "invalid_request"
    assert ask(daemon, "POST", target, layer, {"If-Match": f'{one}, "{head}"'}).status == 201
    assert ask(daemon, "POST", target, layer, {"If-Match": "*"}).status == 201


def test_a_file_is_read_in_parts_and_on_conditions(daemon: Daemon, session: SessionInfo) -> None:
    data = bytes(range(256)) * 12_000  # more than what is read at once
    client, path, size = daemon.client(), f"{session.id}/files/f", len(data)
    first = client.write_file(session.id, "f", data)
    etag = f'"{first.digest}"'
    for text, start, end in (
        ("bytes=0-0", 0, 1), ("bytes=1048570-1048590", 1_048_570, 1_048_591), ("bytes=-7", size - 7, size),
        (f"bytes={size - 1}-", size - 1, size), ("bytes=5-99999999", 5, size),
        (f"bytes=0-{10**23}", 0, size), (f"bytes=-{10**23}", 0, size), (f"bytes=5-{'9' * 6000}", 5, size),
        (f"bytes={'0' * 30}5-{'0' * 30}6", 5, 7),
    ):  # fmt: skip
        part = ask(daemon, "GET", path, headers={"Range": text, "If-Match": etag})
        assert (part.status, part.body) == (206, data[start:end])
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        assert (part.headers["etag"], part.headers["content-length"]) == (etag, str(end - start))
    whole = ask(daemon, "GET", path)
    assert (whole.status, whole.body, whole.headers["accept-ranges"]) == (200, data, "bytes")
    head = ask(daemon, "HEAD", path, headers={"Range": "bytes=0-0"})
    assert (head.status, head.body, head.headers["etag"]) == (200, b"", etag)
    assert head.headers["content-length"] == str(size)
    assert ask(daemon, "HEAD", f"{path}?checkpoint=root").status == 404
    again = ask(daemon, "GET", path, headers={"If-None-Match": f'"x", W/{etag}'})
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", etag)
    for text in (f"bytes={size}-", f"bytes={10**23}-", f"bytes={10**23}-{10**24}", "bytes=-0"):
        beyond = ask(daemon, "GET", path, headers={"Range": text})
        assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{size}")
    for text in ("bytes=6-5", f"bytes={10**24}-{10**23}", f"bytes={10**23}-5", "bytes=-", "bytes=\xb2-5"):
        none = ask(daemon, "GET", path, headers={"Range": text})
        assert (none.status, len(none.body)) == (200, size)
    sh(daemon, session, "printf x >>f; : >empty; mkdir d")
    changed = ask(daemon, "GET", path, headers={"Range": "bytes=0-9", "If-Range": etag})
    assert (changed.status, changed.body) == (200, data + b"x")
    assert ask(daemon, "GET", path, headers={"If-None-Match": etag}).status == 200
    refused = ask(daemon, "GET", path, headers={"Range": "bytes=0-9", "If-Match": etag})
    assert (refused.status, refused.json["details"]["digest"]) == (412, changed.headers["etag"].strip('"'))
    before = f"{path}?checkpoint={first.checkpoint}"
    assert ask(daemon, "GET", before, headers={"Range": "bytes=0-9", "If-Range": etag}).body == data[:10]
    for name in ("empty", "d"):
        wrong = ask(daemon, "GET", f"{session.id}/files/{name}", headers={"Range": "bytes=0-"})
        assert wrong.status == (416 if name == "empty" else 409)
    assert ask(daemon, "GET", session.id).json["in_flight"] == 0


def test_clients_read_parts_of_a_file(daemon: Daemon, session: SessionInfo) -> None:
    data = os.urandom(2_500_000)
    client = daemon.client()
    made = client.write_file(session.id, "f", data)

    async def read(**fields: Any) -> bytes:
        async with await AsyncClient(daemon.socket).read_file(session.id, "f", **fields) as chunks:
            return b"".join([chunk async for chunk in chunks])

    for fields, start, end in (
        ({}, 0, None),
        ({"offset": 7}, 7, None),
        ({"length": 5}, 0, 5),
        ({"offset": 1_000_000, "length": 1_200_000, "match": made.digest}, 1_000_000, 2_200_000),
        ({"offset": 2_499_999, "length": 99}, 2_499_999, None),
        ({"checkpoint": made.checkpoint, "offset": 1, "length": 1, "match": "*"}, 1, 2),
    ):  # fmt: skip
        assert b"".join(client.read_file(session.id, "f", **fields)) == data[start:end]
        assert anyio.run(lambda: read(**fields)) == data[start:end]  # noqa: B023
    wrong: tuple[tuple[dict[str, Any], type[errors.SandboxdError]], ...] = (
        ({"offset": len(data)}, errors.RangeNotSatisfiable),
        ({"offset": -1}, errors.InvalidRequest),
        ({"length": 0}, errors.InvalidRequest),
        ({"length": 1, "match": "sha256:" + "0" * 64}, errors.PreconditionFailed),
    )
    for fields, kind in wrong:
        with pytest.raises(kind):
            client.read_file(session.id, "f", **fields)
        with pytest.raises(kind):
            anyio.run(lambda: read(**fields))  # noqa: B023


def test_a_session_goes_out_and_in_again(daemon: Daemon, session: SessionInfo) -> None:
    sh(daemon, session, "mkdir d; echo 1 >d/f; ln d/f g; echo 2 >old")
    at = ask(daemon, "GET", session.id).json["head"]["id"]
    sh(daemon, session, "rm old; echo 3 >new")
    whole = ask(daemon, "GET", f"{session.id}/export")
    assert whole.headers["content-type"] == "application/vnd.oci.image.layer.v1.tar"
    step = ask(daemon, "GET", f"{session.id}/export?since={at}")
    with tarfile.open(fileobj=io.BytesIO(step.body)) as archive:
        assert archive.getnames() == ["new", ".wh.old"]
    other = daemon.client().create_session()
    try:
        assert ask(daemon, "POST", f"{other.id}/import", whole.body).status == 201
        assert ask(daemon, "GET", f"{other.id}/export").body == whole.body
        assert said(daemon, other, "cat d/f g new; echo 4 >d/f") == "1\n1\n3\n"
        bad = ask(daemon, "POST", f"{other.id}/import", b"no tar" * 1000)
        assert bad.json["code"] == "invalid_request"
        sh(daemon, other, "touch .wh.d")
        assert ask(daemon, "GET", f"{other.id}/export").json["code"] == "state_conflict"
    finally:
        daemon.client().delete_session(other.id)


def test_a_quota_holds_for_what_comes_from_outside(daemon: Daemon) -> None:
    made = daemon.client().create_session(size="1MiB")
    try:
        refused = ask(daemon, "PUT", f"{made.id}/files/f", b"x" * (2 << 20))
        assert refused.json["code"] == "quota_exceeded"
        assert ask(daemon, "GET", f"{made.id}/files").json["files"] == []
        assert ask(daemon, "PUT", f"{made.id}/files/f", b"x").status == 201
    finally:
        daemon.client().delete_session(made.id)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "diff"), ("GET", "files"), ("GET", "files/f"), ("PUT", "files/f"), ("DELETE", "files/f"),
     ("GET", "export"), ("POST", "import")],
)  # fmt: skip
def test_another_callers_session_is_not_there(
    daemon: Daemon, session: SessionInfo, method: str, path: str
) -> None:
    ask(daemon, "PUT", f"{session.id}/files/f", b"secret")
    with by(4243, daemon):
        answer = ask(daemon, method, f"{session.id}/{path}", b"" if method != "GET" else None)
    assert answer.json["code"] == "not_found"


def test_whoever_has_read_it_all_may_remove_the_session(daemon: Daemon) -> None:
    client = daemon.client()
    for size in (0, 1, 300_000) * 8:
        made = client.create_session()
        client.write_file(made.id, "f", b"x" * size)
        assert sum(map(len, client.read_file(made.id, "f"))) == size
        client.delete_session(made.id)
    for _ in range(8):
        made = client.create_session()
        client.write_file(made.id, "f", b"x" * 300_000)
        assert sum(map(len, client.export_session(made.id))) > 300_000
        client.delete_session(made.id)
