"""Redaction: every form of a secret goes, however the stream is cut, and nothing else does."""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import re
import urllib.parse
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.excerpt import excerpt
from sandboxd.redaction import SHORTEST, Redactor, forms, significant

if TYPE_CHECKING:
    from collections.abc import Callable

SECRET = b"s3cr/t+v@lue=\xc3\xa9!"
MARK = b"[redacted:TOKEN]"


def redacted(secrets: dict[str, bytes], pieces: list[bytes]) -> tuple[bytes, int]:
    redactor = Redactor(secrets)
    stream = redactor.stream()
    out = b"".join([*map(stream.feed, pieces), stream.finish()])
    return out, redactor.count


def percent_all(data: bytes) -> bytes:
    return b"".join(b"%%%02x" % byte for byte in data)


ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "hex": binascii.hexlify,
    "HEX": lambda data: binascii.hexlify(data).upper(),
    "percent": lambda data: urllib.parse.quote(data, safe="").encode(),
    "percent, slashes left": lambda data: urllib.parse.quote(data).encode(),
    "percent of a form": lambda data: urllib.parse.quote_plus(data).encode(),
    "percent in lower case": lambda data: urllib.parse.quote(data, safe="").lower().encode(),
    "percent, all": percent_all,
    "json": lambda data: json.dumps(data.decode()).encode(),
    "json in UTF-8": lambda data: json.dumps(data.decode(), ensure_ascii=False).encode(),
}


@pytest.mark.parametrize("how", ENCODINGS)
def test_a_secret_goes_in_every_encoding(how: str) -> None:
    secret = SECRET if "lower case" not in how else SECRET.lower()
    said = b"before " + ENCODINGS[how](secret) + b" after"
    for cut in range(len(said)):
        out, count = redacted({"TOKEN": secret}, [said[:cut], said[cut:]])
        assert (out.replace(b'"', b""), count) == (b"before " + MARK + b" after", 1)


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("before", range(7))
@pytest.mark.parametrize("after", range(4))
def test_base64_of_a_text_that_has_it_anywhere(
    encode: Callable[[bytes], bytes], before: int, after: int
) -> None:
    secret = bytes(range(250, 256)) * 2 + SECRET
    said = encode(b"x" * before + secret + b"y" * after)
    out, count = redacted({"TOKEN": secret}, [bytes([byte]) for byte in said])
    assert count == 1
    rest = out.replace(MARK, b"")
    # a letter at each end that has bits of what is beside it, and the padding
    assert len(rest) <= len(encode(b"x" * before)) + len(encode(b"y" * after)) + 4


@pytest.mark.parametrize("line", [1, 7, 60, 76])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_line_breaks_do_not_hide_it(line: int, end: bytes) -> None:
    secret = bytes(range(256))
    said = base64.b64encode(secret)
    wrapped = end.join(said[at : at + line] for at in range(0, len(said), line))
    for pieces in ([wrapped], [bytes([byte]) for byte in wrapped]):
        out, count = redacted({"TOKEN": secret}, [b"> ", *pieces, b"\nend\n"])
        assert count == 1
        assert out.startswith(b"> " + MARK)
        assert len(out) < 40


def test_a_secret_of_several_lines() -> None:
    secret = b"-----BEGIN KEY-----\nAAAABBBB\nCCCC\n\n\n\nDDDD\n-----END KEY-----\n"
    said = b"a\n" + secret + b"b\r\n" + secret.replace(b"\n", b"\r\n") + b"c\n"
    out, count = redacted({"TOKEN": secret}, [bytes([byte]) for byte in said])
    assert (out, count) == (b"a\n" + MARK + b"\nb\r\n" + MARK + b"\r\nc\n", 2)


def test_many_empty_lines_hold_nothing_back() -> None:
    redactor = Redactor({"TOKEN": SECRET})
    stream = redactor.stream()
    said = b"s" + b"\n" * 100_000
    assert stream.feed(said[:2]) == b""
    assert len(stream.feed(said[2:])) > 99_000
    assert redactor.count == 0


def test_only_what_may_be_a_secret_waits() -> None:
    stream = Redactor({"TOKEN": SECRET}).stream()
    assert stream.feed(b"Password: ") == b"Password: "
    assert stream.feed(b"all s") == b"all "
    assert stream.feed(b"3") == b""
    assert stream.feed(b"cond line\n") == b"s3cond line\n"
    assert stream.feed(b"s3cr/t") == b""
    assert stream.finish() == b"s3cr/t"


def test_of_overlapping_occurrences_nothing_is_left() -> None:
    assert redacted({"A": b"abcabcabc"}, [b"-abcabcabcabcabcab-"]) == (b"-[redacted:A]ab-", 1)
    secrets = {"A": b"headmiddle", "B": b"middletail", "C": b"middletail and more"}
    assert redacted(secrets, [b"<headmiddletail and more>"]) == (b"<[redacted:A]>", 1)
    assert redacted(secrets, [b"<headmiddletail and>"]) == (b"<[redacted:A] and>", 1)


def test_an_endless_match_holds_nothing() -> None:
    redactor = Redactor({"A": b"aaaaaaaa"})
    stream = redactor.stream()
    out = b"".join(stream.feed(b"a" * 1000) for _ in range(100))
    assert (out, len(stream._held)) == (b"[redacted:A]", 7)
    assert stream.finish() == b""


def test_what_is_rotated_meanwhile_goes_too() -> None:
    redactor = Redactor({"TOKEN": SECRET})
    stream = redactor.stream()
    out = stream.feed(b"the new v")
    redactor.also("TOKEN", b"the new value")
    out += stream.feed(b"alue, the new value, ") + stream.feed(SECRET) + stream.finish()
    assert out == b"the new value, " + MARK + b", " + MARK


def test_texts_and_names() -> None:
    redactor = Redactor({"TOKEN": b"MixedCase01", "KEY": "schlüssel".encode()})
    assert redactor.text("a MixedCase01 b") == "a [redacted:TOKEN] b"
    assert redactor.text("mixedcase01") == "mixedcase01"
    assert redactor.name("mixedcase01.example.org") == "[redacted:TOKEN].example.org"
    assert redactor.name(b"MixedCase01".hex() + ".example.org") == "[redacted:TOKEN].example.org"
    assert redactor.name("Other.example.org") == "Other.example.org"
    assert redactor.text("der schlüssel \udc80") == "der [redacted:KEY] \udc80"
    assert redactor.count == 4


letters = st.sampled_from(b"ab\n\r")
blob = st.lists(letters, min_size=1, max_size=60).map(bytes)
value = blob.filter(lambda data: len(significant(data)) >= SHORTEST) | st.binary(
    min_size=8, max_size=40
).filter(lambda data: len(significant(data)) >= SHORTEST)


@st.composite
def said(draw: st.DrawFn) -> tuple[dict[str, bytes], bytes]:
    """Secrets, some of them parts of each other, and what has them and pieces of them in it."""
    values = draw(st.lists(value, min_size=1, max_size=3))
    if draw(st.booleans()):
        values.append(values[0] + draw(blob))
    secrets = {f"S{number}": one for number, one in enumerate(values)}
    encode = list(ENCODINGS.values())[:8]
    parts = st.one_of(
        blob,
        st.sampled_from(values),
        st.sampled_from(values).flatmap(
            lambda one: st.sampled_from([one[:-1], one[1:], one[: len(one) // 2]])
        ),
        st.builds(lambda how, one: how(one), st.sampled_from(encode), st.sampled_from(values)),
        st.sampled_from(values).map(base64.b64encode),
    )
    return secrets, b"".join(draw(st.lists(parts, max_size=8)))


@given(said(), st.data())
def test_any_cutting_gives_the_same(given_: tuple[dict[str, bytes], bytes], data: st.DataObject) -> None:
    secrets, text = given_
    whole = redacted(secrets, [text])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert redacted(secrets, pieces) == whole
    assert redacted(secrets, [bytes([byte]) for byte in text]) == whole


@given(said())
def test_nothing_of_a_whole_secret_is_left(given_: tuple[dict[str, bytes], bytes]) -> None:
    secrets, text = given_
    out, _ = redacted(secrets, [text])
    # a marker stands between what was on both sides of it; what it may look like with them is no secret told
    left = [significant(part) for part in re.split(rb"\[redacted:S\d+\]", out)]
    for name, one in secrets.items():
        assert not any(significant(one) in part for part in left), name


def slowly(secrets: dict[str, bytes], pieces: list[bytes]) -> tuple[bytes, int]:
    """What comes of pieces after each of which nothing comes for a while."""
    redactor = Redactor(secrets)
    stream = redactor.stream()
    out = b"".join(stream.feed(piece) + stream.release() + stream.release() for piece in pieces)
    return out + stream.finish(), redactor.count


@pytest.mark.parametrize("size", [8, 11, 12, 15, 16, 40])
@pytest.mark.parametrize("how", ENCODINGS)
def test_a_secret_that_is_written_slowly_shows_its_first_bytes_at_most(how: str, size: int) -> None:
    secret = b"q%Z/w+v~K3=x0Hj5?rT&n:Yd1G#zLpS9bXaMc7Ui"[:size]
    secret = secret.lower() if "lower case" in how else secret
    encoded = ENCODINGS[how](secret).strip(b'"')
    out, count = slowly({"TOKEN": secret}, [b"$ ", *(bytes([byte]) for byte in encoded), b" after"])
    shown = out.removeprefix(b"$ ").removesuffix(MARK + b" after")
    assert count == 1
    assert encoded.startswith(shown)
    assert len(shown) <= min(3, len(encoded) // 4 - 1)
    again, _ = slowly({"TOKEN": secret}, [bytes([byte]) for byte in encoded] * 3)
    assert again == (shown + MARK) * 3  # the same bytes each time, and never the next ones


@pytest.mark.parametrize("pause", range(1, 40))
def test_with_a_pause_anywhere_no_half_of_a_secret_is_told(pause: int) -> None:
    secret = b"0123456789abcdefghijklmnopqrstuvwxyzABCD"
    redactor = Redactor({"TOKEN": secret})
    stream = redactor.stream()
    first = stream.feed(b"<" + secret[:pause]) + stream.release()
    assert first == b"<" + (secret[:pause] if pause < 4 else b"")
    rest = stream.feed(secret[pause:] + b">")
    assert rest == MARK + b">"
    assert stream.finish() == b""


def test_a_prompt_is_let_go_and_what_follows_is_as_it_would_be() -> None:
    stream = Redactor({"TOKEN": SECRET}).stream()
    assert stream.feed(b"Password for s") == b"Password for "
    assert stream.waits
    assert stream.release() == b"s"
    assert not stream.waits
    assert stream.release() == b""
    assert stream.feed(b"ome host: ") == b"ome host: "
    assert stream.feed(SECRET[:6]) == b""
    assert stream.release() == b""
    assert stream.waits
    assert stream.finish() == SECRET[:6]


def test_line_breaks_do_not_make_more_of_it_go() -> None:
    secret = b"0123456789abcdefghijklmnopqrstuvwxyzABCD"
    pieces = [each for byte in secret for each in (bytes([byte]), b"\n")]
    out, count = slowly({"TOKEN": secret}, pieces)
    assert (out, count) == (b"0\n1\n2\n" + MARK + b"\n", 1)


@given(said(), st.data())
def test_with_pauses_anywhere_no_more_than_beginnings_is_left(
    given_: tuple[dict[str, bytes], bytes], data: st.DataObject
) -> None:
    secrets, text = given_
    whole, count = redacted(secrets, [text])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for each in (pieces, [bytes([byte]) for byte in text]):
        out, found = slowly(secrets, each)
        assert found == count
        # three bytes of each place where a form stands; where they overlap, one mark is for several
        assert told(out) - told(whole) <= 3 * places(secrets, text)


def told(out: bytes) -> int:
    """How many bytes beside marks and line breaks."""
    return len(significant(re.sub(rb"\[redacted:S\d+\]", b"", out)))


def places(secrets: dict[str, bytes], text: bytes) -> int:
    """How often any form of a secret stands in a text."""
    wanted, joined = {form for value in secrets.values() for form in forms(value)}, significant(text)
    return sum(joined.startswith(form, at) for at in range(len(joined)) for form in wanted)


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_what_has_no_secret_stays_as_it_is(text: bytes, cuts: list[int]) -> None:
    secrets = {"TOKEN": b"\xff\xfe\xfd\xfc" * 8}
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert redacted(secrets, pieces) == (text, 0)


@given(st.data())
def test_no_half_of_a_secret_is_left_where_a_text_was_cut(data: st.DataObject) -> None:
    """Whatever is around it, and wherever the cut is."""
    secret = b"ghp_7Hq2mB0x4WzT"
    form = data.draw(st.sampled_from([secret, secret.hex().encode(), base64.b64encode(secret)])).decode()
    text = data.draw(st.text("abc/…? ", max_size=20)) + form + data.draw(st.text("abc/", min_size=1))
    most = data.draw(st.integers(2, len(text)))
    cleaned = Redactor({"TOKEN": secret}).name(f"before {excerpt(text, most)}: why").lower()
    assert form[:8].lower() not in cleaned
    if most <= len(text) - 1:
        assert "…" in cleaned


def test_a_text_that_was_not_cut_keeps_what_looks_like_a_beginning() -> None:
    assert Redactor({"TOKEN": b"ghp_7Hq2mB0x4WzT"}).name("ghp_7Hq") == "ghp_7Hq"
    assert Redactor({"TOKEN": b"ghp_7Hq2mB0x4WzT"}).name("GHP_7hq…") == "…"
    assert Redactor({"TOKEN": "ghp…7Hq2mB0x".encode()}).name("x ghp…7hq2mb0x y") == "x [redacted:TOKEN] y"
