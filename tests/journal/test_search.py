"""The index: what is found, by whom, and what cannot be smuggled in."""

from __future__ import annotations

import random
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest

from sandboxd import errors, models
from sandboxd.journal import search
from sandboxd.journal.search import Entry, Query, SearchIndex, command_text, readable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IMAGE = "sha256:" + "ab" * 32


@pytest.fixture
def index(tmp_path: Path) -> Iterator[SearchIndex]:
    found = SearchIndex(tmp_path / "search.sqlite3")
    yield found
    found.close()


def entry(n: int, command: str = "true", **fields: Any) -> Entry:
    values = Entry(n, f"id{n}", n * 1000, 1000, "default", "exited", IMAGE, command, "", "")
    return values._replace(**fields)


def ids(index: SearchIndex, text: str = "", **fields: object) -> list[int]:
    return [hit.n for hit in index.find(Query(text, **fields)).hits]  # type: ignore[arg-type]


def test_nothing_is_found_before_there_is_an_index(tmp_path: Path) -> None:
    assert ids(SearchIndex(tmp_path / "none.sqlite3"), "x") == []
    (tmp_path / "empty.sqlite3").touch()
    assert ids(SearchIndex(tmp_path / "empty.sqlite3"), "x") == []
    made = SearchIndex(tmp_path / "made.sqlite3")
    made.add([])
    assert ids(made, "x") == ids(made, "x*") == []
    made.close()
    assert not (tmp_path / "none.sqlite3").exists()


def test_words_and_filters(index: SearchIndex) -> None:
    index.add([
        entry(1, "pip install numpy", stdout="Successfully installed numpy-1.26"),
        entry(2, "python3 a.py", stderr="Traceback: MemoryError", cause="memory", policy="python-3.12 β"),
        entry(3, "cat /etc/passwd", uid=2000),
        entry(4, "echo Grüße", image="sha256:" + "cd" * 32),
    ])  # fmt: skip
    assert ids(index) == [4, 3, 2, 1]
    assert ids(index, "numpy") == [1]
    assert ids(index, "stdout : numpy") == [1]
    assert ids(index, "stderr : numpy") == []
    assert ids(index, "numpy OR passwd") == [3, 1]
    assert ids(index, "memoryerror") == [2]
    assert ids(index, "grüße") == [4]
    assert ids(index, "trace*") == [2]
    assert ids(index, '"/etc/passwd"') == [3]
    assert ids(index, policy="python-3.12 β") == [2]
    assert ids(index, "echo", policy="python-3.12 β") == []
    assert ids(index, cause="memory") == [2]
    assert ids(index, uid=2000) == [3]
    assert ids(index, image="sha256:" + "cd" * 32) == [4]
    assert ids(index, since=2000, until=3000) == [3, 2]
    assert ids(index, since=4001) == ids(index, until=999) == []
    page = index.find(Query(limit=3))
    assert (page.next, page.indexed) == (2, 4)
    assert ids(index, before=2, limit=3) == [1]
    hit = index.find(Query("numpy", cause="exited")).hits[0]
    assert "[numpy]" in hit.snippet
    assert (hit.id, hit.cause, hit.command) == ("id1", models.Cause.EXITED, "pip install numpy")


@pytest.mark.parametrize(
    "text",
    ['"', "(", ")", "a AND", "OR", "a b)", "foo) OR (bar", "facts : u1", "facts:x OR a", "nope : a", "a-b",
     "*", "*x", "NEAR(", "a\0b", "x" * 1001, "rank : x", "{facts} : x", "- facts : x)", "'", "a + ", "^"],
)  # fmt: skip
def test_what_is_no_search_is_said(index: SearchIndex, text: str) -> None:
    index.add([entry(1, "foo bar"), entry(2, "foo", uid=2000)])
    with pytest.raises(errors.InvalidRequest) as caught:
        index.find(Query(text, uid=2000))
    assert caught.value.details["field"] == "q"


def test_nobody_elses_calls_are_found_whatever_is_written(index: SearchIndex) -> None:
    index.add([entry(1, "mine"), *(entry(n, f"secret{n} theirs", uid=2000) for n in range(2, 30))])
    words = ["mine", "theirs", "secret3", "AND", "OR", "NOT", "(", ")", "*", ":", "facts", "command", '"',
             "{", "}", "NEAR", "-", "^", "+", ",", search._word("p", "default"), ";", "--", "'"]  # fmt: skip
    rng = random.Random(7)
    asked = 0
    for _ in range(5000):
        text = " ".join(rng.choices(words, k=rng.randrange(1, 9)))
        try:
            found = ids(index, text, uid=1000)
        except errors.InvalidRequest:
            continue
        asked += 1
        assert set(found) <= {1}, text
    assert asked > 100


def test_pages_of_several_callers_are_one_line(index: SearchIndex) -> None:
    index.add([entry(n, f"word {'even' if n % 2 == 0 else ''}", uid=n % 7) for n in range(1, 101)])
    evens = list(range(100, 0, -2))
    found, before = [], None
    while True:
        page = index.find(Query("even", limit=7, before=before))
        found += [hit.n for hit in page.hits]
        if (before := page.next) is None:
            break
    assert found == evens
    assert ids(index, "even", uid=3, limit=500) == [n for n in evens if n % 7 == 3]
    assert ids(index, "even", uid=77) == []


def test_times_go_on_where_the_clock_was_set_back(index: SearchIndex) -> None:
    index.add([entry(1, ended=5000), entry(2, ended=9000), entry(3, ended=100), entry(4, ended=9500)])
    assert ids(index, since=8000) == [4, 3, 2]  # 3 ended after 2, whatever its clock said
    assert index.find(Query(before=4)).hits[0].at == 100
    assert ids(index, until=5000) == [1]


def test_a_search_that_takes_too_long_ends(index: SearchIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SECONDS", -1.0)
    monkeypatch.setattr(search, "_STEPS", 1)
    index.add([entry(n, f"word{n} common") for n in range(1, 2000)])
    with pytest.raises(errors.InvalidRequest, match="narrow it"):
        index.find(Query("word* NOT common"))


@pytest.mark.parametrize("distance", [1000, 1])
def test_one_that_is_slow_at_each_row_ends_too(
    index: SearchIndex, monkeypatch: pytest.MonkeyPatch, distance: int
) -> None:
    """FTS5 looks at no clock in a row: between two that fit, we do."""
    monkeypatch.setattr(search, "SECONDS", 0.02)
    text = "a " * (search.HEAD // 2 - 10) + "b " * 10
    index.add([entry(n, text, stdout=text, stderr=text) for n in range(1, 2001)])
    near = "NEAR(" + "a " * 12 + f"b, {distance})"
    with pytest.raises(errors.InvalidRequest, match="narrow it"):
        index.find(Query(f"{near} AND {near}", limit=500))


def test_a_row_with_very_many_places_is_shown_all_the_same(index: SearchIndex) -> None:
    """The time of FTS5's own snippets grows with the square of the places: this row would take a minute."""
    text = "a " * (search.HEAD // 2)
    index.add([entry(1, text, stdout=text, stderr=text)])
    (hit,) = index.find(Query("a " * search.MAX_WORDS)).hits
    assert hit.snippet == "[a] " * 23 + "[a]…"


@pytest.mark.parametrize("text", ["a " * 33, "a " * 8 + "a*", '"' + "a-" * 40 + '"'])
def test_too_many_words_are_refused(index: SearchIndex, text: str) -> None:
    index.add([entry(1, "a")])
    with pytest.raises(errors.InvalidRequest, match="at most 32 words, and 8 if"):
        index.find(Query(text))


def test_pages_of_a_search_are_its_whole(index: SearchIndex) -> None:
    index.add([entry(n, f"word{n} " + ("third" if n % 3 == 0 else "")) for n in range(1, 101)])
    thirds = list(range(99, 0, -3))
    assert ids(index, "third", limit=500) == thirds
    assert ids(index, "word* third", limit=500) == thirds
    page = index.find(Query("third", limit=10))
    assert ([hit.n for hit in page.hits], page.next) == (thirds[:10], thirds[9])
    assert ids(index, "third", before=page.next, limit=500) == thirds[10:]
    assert index.find(Query("third", limit=len(thirds))).next is None


def test_snippets_show_what_was_found(index: SearchIndex) -> None:
    long = " ".join(f"w{n}" for n in range(50))
    index.add([entry(1, "echo", stdout=long, stderr="Straße, ÜBUNG: denied_by")])
    for text, shown in {
        "w30": "…w26 w27 w28 w29 [w30] w31 w32",
        "w4*": "w0 w1 w2 w3 [w4] w5",
        "ubung": "Straße, [ÜBUNG]: denied_by",
        '"denied_by"': "Straße, ÜBUNG: [denied]_[by]",
    }.items():
        assert index.find(Query(text)).hits[0].snippet.startswith(shown), text
    assert index.find(Query(cause="exited")).hits[0].snippet == ""


@pytest.mark.parametrize("damage", ["garbage", "version", "flipped"])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "search.sqlite3"
    first = SearchIndex(path)
    first.add([entry(n, f"w{n} " * 50) for n in range(1, 500)])
    assert first.last == (499, "id499")
    first.close()
    if damage == "garbage":
        path.write_bytes(b"garbage" * 1000)
    elif damage == "version":
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version = 99")
        connection.close()
    else:
        data = bytearray(path.read_bytes())
        for at in range(4096, len(data), 4096):
            data[at] ^= 0x55
        path.write_bytes(data)
        with pytest.raises(errors.HostFailed, match="the index of the records"):
            SearchIndex(path).find(Query("w1"))
    again = SearchIndex(path)
    assert again.last == (0, "")
    again.add([entry(1, "w1")])
    assert ids(again, "w1") == [1]
    again.close()
    assert path.stat().st_mode & 0o077 == 0


def test_what_is_forgotten_is_not_found(index: SearchIndex) -> None:
    index.add([entry(n, f"only{n} shared") for n in range(1, 5)])
    index.forget([1, 2, 4])
    assert ids(index, "shared") == [3]
    assert ids(index, "only1") == ids(index, "only4") == []
    assert index.last == (4, "id4")  # where it goes on
    index.add([entry(5, "shared")])
    assert ids(index, "shared") == [5, 3]


def test_texts_are_made_readable() -> None:
    assert command_text(["echo", "a b", models.Bytes.of(b"\xff")]) == "echo 'a b' '\N{REPLACEMENT CHARACTER}'"
    assert readable(b"\x1b[31mred\x00\r\n\xff") == " [31mred  \n\N{REPLACEMENT CHARACTER}"
    assert len(command_text(["x" * 100_000])) == search.HEAD
