"""Secrets taken out of what a call says: its output as it streams, and the names and texts that it chose.

Theory of operation.  A secret is looked for as it is and as programs like to write it: base64 in each of its
three alignments, percent-encoded, hex, the inside of a JSON string. One automaton finds all of them at once.
Line breaks do not count, since ``base64`` and ``xxd`` put them in: one or two of them between two bytes are
looked over, a longer run ends a match. All that any occurrence covers goes, also where several overlap, and
one marker stands for it.

A stream is cut anywhere, and comes to the same as the whole of it would: what may be the beginning of a
secret is held back until more is there to tell, or the stream ends. A prompt, after which nothing comes until
somebody has answered, often ends in the first letter of a secret. So whoever feeds a stream ``release``s it
when nothing has come for a while, and beginnings shorter than ``floor_of`` go out then. They are remembered:
with what follows, the secret is found, and all of it that has not gone out is taken out. A tool that waits
between its letters so gets these few of a secret through, and never more, however long it waits.
"""

from __future__ import annotations

import base64
import json
import re
from bisect import bisect_right
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus

from ahocorasick_rs import BytesAhoCorasick, Implementation

from sandboxd.excerpt import CUT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["SHORTEST", "Redactor", "Stream", "floor_of", "significant"]

SHORTEST = 8
"""Bytes, line breaks not counted. What is shorter is found in output that has nothing to do with it."""
BREAKS = b"\r\n"
RUN = 2  # line breaks that are looked over between two bytes: a CR and a LF
_RUNS = re.compile(rb"[\r\n]+")
_LONG_RUNS = re.compile(rb"[\r\n]{3,}")
HELD = 4  # bytes of a beginning that are held back in any case
PART = 256  # bytes of a beginning that are compared before all of it is
HEAD = 8  # bytes by which a long beginning of a pattern is found first
URI_SAFE = ("", "/", "!'()*", "!'()*;/?:@&=+$,#")  # what encoders leave: Python's, JavaScript's
QUICK = 4096  # bytes of a pattern from which on another automaton is made in less time


def significant(value: bytes) -> bytes:
    """A value as it is looked for: without line breaks at its ends, and short ones within."""
    return _joined(value.strip(BREAKS))


def _joined(data: bytes) -> bytes:
    if b"\n" not in data and b"\r" not in data:
        return data
    if _LONG_RUNS.search(data) is None:
        return data.translate(None, BREAKS)
    return b"\n".join(part.translate(None, BREAKS) for part in _LONG_RUNS.split(data))


def floor_of(form: bytes) -> int:
    """From how many bytes on a beginning of a form is held back for as long as it takes.

    One less may go out: a byte of eight, three of sixteen or more.
    """
    return min(HELD, len(form) // 4)


class _Joined:
    """Bytes without their line breaks, and where each of what is left was."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.text = _joined(raw)
        self._from: list[int] | None = None
        self._left_out: list[int] = []

    def at(self, index: int) -> int:
        """The place in ``raw`` of a byte of ``text``."""
        if len(self.raw) == len(self.text):
            return index
        if self._from is None:
            self._from = self._places()
        found = bisect_right(self._from, index)
        return index + (self._left_out[found - 1] if found else 0)

    def _places(self) -> list[int]:
        """From which index on how many bytes had been left out before it."""
        starts, left_out = [], 0
        for run in _RUNS.finditer(self.raw):
            start, length = run.start() - left_out, run.end() - run.start()
            kept = int(length > RUN)
            left_out += length - kept
            starts.append(start + kept)
            self._left_out.append(left_out)
        return starts

    def tail(self, size: int) -> int:
        """The place in ``raw`` of the last ``size`` bytes of ``text``, without a look at all of it."""
        window = 4 * size + 64
        if window < len(self.raw) and len(self.raw) != len(self.text):
            near = _Joined(self.raw[-window:])
            if len(near.text) > size + 1:  # of a run that the window cuts, nothing is there
                return len(self.raw) - window + near.at(len(near.text) - size)
        return self.at(len(self.text) - size)


def _base64(value: bytes) -> Iterator[bytes]:
    """What is the same in the base64 of any text that has the value in it, for each of its places."""
    for before, unsure in ((0, 0), (1, 2), (2, 3)):
        whole = base64.b64encode(b"\0" * before + value).rstrip(b"=")
        ends = {len(whole), len(whole) - (1 if (before + len(value)) % 3 else 0)}  # with the text, or within
        for end in ends:
            yield whole[unsure:end]
            yield whole[unsure:end].replace(b"+", b"-").replace(b"/", b"_")


def _percent(value: bytes) -> Iterator[bytes]:
    for safe in URI_SAFE:
        yield quote(value, safe=safe).encode()
    yield quote_plus(value).encode()
    yield "".join(f"%{byte:02X}" for byte in value).encode()


def _lower_hex(encoded: bytes) -> bytes:
    return re.sub(rb"%[0-9A-F]{2}", lambda found: found[0].lower(), encoded)


def forms(value: bytes) -> set[bytes]:
    """Every way of writing a value that is looked for, line breaks left out."""
    found = set()
    for one in {value, value.strip(BREAKS)}:
        found |= {one, one.hex().encode(), one.hex().upper().encode(), *_base64(one)}
        for encoded in _percent(one):
            found |= {encoded, _lower_hex(encoded)}
        try:
            text = one.decode()
        except UnicodeDecodeError:
            continue
        for ascii in (True, False):  # noqa: A001
            dumped = json.dumps(text, ensure_ascii=ascii).strip('"')
            found |= {dumped.encode(), dumped.replace("/", "\\/").encode()}
    return {form for form in map(significant, found) if len(form) >= SHORTEST}


class _Patterns:
    """The forms of all secrets, and the automaton that finds them."""

    def __init__(self, secrets: Iterable[tuple[str, bytes]], *, folded: bool = False) -> None:
        self._folded = folded
        named: dict[bytes, str] = {}
        for name, value in secrets:
            for form in forms(value):
                named.setdefault(form.lower() if folded else form, name)
        self._forms = list(named)
        self._names = list(named.values())
        quick = sum(map(len, self._forms)) > QUICK
        self._automaton = (
            BytesAhoCorasick(self._forms, implementation=Implementation.ContiguousNFA if quick else None)
            if named
            else None
        )

    def regions(self, text: bytes, covered: int) -> list[tuple[int, int, str | None]]:
        """What has to go, in order and apart: start, end, and the secret's name.

        The first ``covered`` bytes are the rest of one that has its marker: without a name.
        """
        merged: list[tuple[int, int, str | None]] = [(0, covered, None)] if covered else []
        if self._automaton is None:
            return merged
        if self._folded:
            text = text.lower()  # of ASCII alone: each byte stays where it is
        found = self._automaton.find_matches_as_indexes(text, overlapping=True)
        for start, neg, which in sorted((start, -end, which) for which, start, end in found):
            if merged and start < merged[-1][1]:
                first, end, name = merged[-1]
                merged[-1] = (first, max(end, -neg), name)
            else:
                merged.append((start, -neg, self._names[which]))
        return merged

    def open(self, text: bytes) -> int:
        """How many bytes at the end may be the beginning of a form: the most."""
        text = text.lower() if self._folded else text
        return max((_open(text, form) for form in self._forms), default=0)

    def kept(self, text: bytes) -> int:
        """The same of beginnings that are long enough to be held back whatever comes, or does not."""
        opened = ((_open(text, form), floor_of(form)) for form in self._forms)
        return max((found for found, floor in opened if found >= floor), default=0)


def _open(text: bytes, form: bytes) -> int:
    size = len(text)
    start = max(0, size - len(form) + 1)
    head = form[:HEAD]
    while (start := text.find(head, start)) >= 0:
        # first a part, which costs nothing: a tool can write beginnings without end
        if text.startswith(form[: min(PART, size - start)], start) and form.startswith(text[start:]):
            return size - start
        start += 1
    for left in range(min(HEAD, len(form)) - 1, 0, -1):
        if left <= size and form.startswith(text[size - left :]):
            return left
    return 0


class Redactor:
    """Of one call. ``count`` is how many places were redacted, in everything that went through it."""

    def __init__(self, secrets: Mapping[str, bytes]) -> None:
        """Secrets by their names. Takes some microseconds for each byte of them."""
        self._secrets = list(secrets.items())
        self._patterns = _Patterns(self._secrets)
        self._folded: _Patterns | None = None
        self.count = 0

    def also(self, name: str, value: bytes) -> None:
        """Look for one more value from now on, such as that of a secret that was rotated."""
        self._secrets.append((name, value))
        self._patterns = _Patterns(self._secrets)
        self._folded = None

    def probe(self) -> Redactor:
        """One that looks for the same and counts by itself."""
        found = Redactor({})
        found._patterns = self._patterns
        return found

    def stream(self) -> Stream:
        """For one of the call's streams."""
        return Stream(self)

    def data(self, data: bytes) -> bytes:
        """Bytes that are whole."""
        return self._run(self._patterns, data, 0, last=True)[0]

    def text(self, text: str) -> str:
        """A text that is whole."""
        return _decoded(self.data(text.encode("utf-8", "surrogatepass")))

    def name(self, text: str) -> str:
        """A name of which the case was lost, such as that of a host; and no half of any, where it was cut."""
        if self._folded is None:
            self._folded = _Patterns(self._secrets, folded=True)
        *cut, last = self._whole_name(self._folded, text).split(CUT)
        return CUT.join([*(self._beginning(self._folded, piece) for piece in cut), last])

    def _whole_name(self, patterns: _Patterns, text: str) -> str:
        data = text.encode("utf-8", "surrogatepass")
        return _decoded(self._run(patterns, data, 0, last=True)[0])

    def _beginning(self, patterns: _Patterns, text: str) -> str:
        """A text whose end was cut off, without what may have been the beginning of a secret there."""
        data = text.encode("utf-8", "surrogatepass")
        return self._run(patterns, data, 0, last=False)[0].decode("utf-8", "ignore")

    def _run(
        self, patterns: _Patterns, raw: bytes, covered: int, *, last: bool, shown: int = 0
    ) -> tuple[bytes, bytes, int]:
        """What may go out, what is held back, and how much of that is behind a marker that went out.

        The first ``shown`` bytes went out before, and are there for what they may be the beginning of.
        """
        joined = _Joined(raw)
        regions = patterns.regions(joined.text, covered)
        opened = 0 if last else patterns.open(joined.text)
        if not regions and not opened:
            return raw[shown:], b"", 0
        cut = len(joined.text) - opened
        out, at, left = [], shown, 0
        for start, end, name in regions:
            if end > cut and (start < cut or name is None):
                left = end - cut
            if start >= cut:
                break
            out.append(raw[at : joined.at(start)])
            if name is not None:
                out.append(b"[redacted:%b]" % name.encode())
                self.count += 1
            at = max(shown, joined.at(min(end, cut) - 1) + 1)
        held = joined.tail(opened) if opened else len(raw)
        if not left:
            out.append(raw[at:held])
        return b"".join(out), raw[held:], left


class Stream:
    """One stream of bytes, which come in pieces."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._held = b""
        self._covered = 0
        self._shown = 0
        """Bytes of what is held that went out, since nothing came for a while."""

    def feed(self, data: bytes | memoryview) -> bytes:
        """What of all that came so far may go out now."""
        return self._step(b"".join((self._held, data)), last=False)

    def release(self) -> bytes:
        """What may go out although it could be the beginning of a secret, of which it is next to nothing."""
        joined = _Joined(self._held)
        kept = self._redactor._patterns.kept(joined.text)  # noqa: SLF001
        end = joined.tail(kept) if kept else len(self._held)
        covered = joined.at(self._covered - 1) + 1 if self._covered else 0
        out = self._held[max(self._shown, covered) : end]
        self._shown = max(self._shown, end)
        return out

    @property
    def waits(self) -> bool:
        """Whether there is something that ``release`` might let go."""
        return self._shown < len(self._held)

    def finish(self) -> bytes:
        """The rest. Nothing is held back any more."""
        return self._step(self._held, last=True)

    def _step(self, raw: bytes, *, last: bool) -> bytes:
        redactor = self._redactor
        out, self._held, self._covered = redactor._run(  # noqa: SLF001
            redactor._patterns,  # noqa: SLF001
            raw,
            self._covered,
            last=last,
            shown=self._shown,
        )
        self._shown = max(0, self._shown - (len(raw) - len(self._held)))
        return out


def _decoded(data: bytes) -> str:
    """Text from which something was taken away: a secret may begin or end within a character."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace")
