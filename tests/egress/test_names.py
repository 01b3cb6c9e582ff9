"""The name server of a container, by messages alone."""

from __future__ import annotations

import ipaddress
import struct

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.egress.names import Names
from sandboxd.reach import Allow, Decision, Deny, NetworkRules, Reach

REACH = Reach(
    NetworkRules(
        (Allow("www.example.test", (80,), "p:1"), Allow("*.api.test", (443,), "p:2")),
        (Deny("bad.api.test", (), "p:3"),),
    )
)


class Asked:
    """A name server, and what it told."""

    def __init__(self, **known: str) -> None:
        self.refused: list[tuple[str, Decision]] = []
        self.new: dict[str, str] = {}
        self.names = Names(
            REACH,
            known=known,
            on_new=self.new.__setitem__,
            on_refused=lambda name, decision: self.refused.append((name, decision)),
        )

    def ask(self, name: str, kind: str = "A", **options: object) -> dns.message.Message:
        query = dns.message.make_query(name, kind, **options)  # type: ignore[arg-type]
        answer = self.names.answer(query.to_wire())
        assert answer is not None
        response = dns.message.from_wire(answer)
        assert query.is_response(response)
        return response


def addresses(response: dns.message.Message) -> list[str]:
    return [item.address for rrset in response.answer for item in rrset]


def test_a_name_has_one_address_of_each_family_that_stand_for_it() -> None:
    asked = Asked()
    four, six = addresses(asked.ask("www.example.test")), addresses(asked.ask("WWW.Example.test", "AAAA"))
    assert len(four) == len(six) == 1
    for address in (four[0], six[0]):
        assert asked.names.name_of(ipaddress.ip_address(address)) == "www.example.test"
    assert addresses(asked.ask("www.example.test")) == four
    assert addresses(asked.ask("a.api.test")) != addresses(asked.ask("b.api.test"))
    assert asked.new == {
        "www.example.test": four[0],
        **{n: asked.new[n] for n in ("a.api.test", "b.api.test")},
    }
    assert asked.refused == []


@pytest.mark.parametrize("kind", ["TXT", "MX", "ANY", "HTTPS", "NULL", "SOA", "NS", "CNAME", "AXFR"])
def test_other_records_of_an_allowed_name_are_empty(kind: str) -> None:
    response = Asked().ask("www.example.test", kind)
    assert (response.rcode(), response.answer, response.authority) == (dns.rcode.NOERROR, [], [])


def test_a_name_that_is_not_allowed_does_not_exist_and_says_why() -> None:
    asked = Asked()
    response = asked.ask("other.test", use_edns=0)
    assert response.rcode() == dns.rcode.NXDOMAIN
    (option,) = response.options
    assert isinstance(option, dns.edns.EDEOption)
    assert (option.code, option.text) == (dns.edns.EDECode.PROHIBITED, "sandboxd: no rule allows other.test")
    (option,) = asked.ask("bad.api.test", use_edns=0).options
    assert isinstance(option, dns.edns.EDEOption)
    assert (option.code, option.text) == (dns.edns.EDECode.BLOCKED, "sandboxd: bad.api.test is denied (p:3)")
    assert [name for name, _ in asked.refused] == ["other.test", "bad.api.test"]
    assert asked.ask("other.test").options == ()


def test_names_that_were_answered_before_are_known() -> None:
    asked = Asked(**{"a.api.test": "198.18.128.0"})
    assert addresses(asked.ask("a.api.test")) == ["198.18.128.0"]
    assert addresses(asked.ask("b.api.test")) not in (["198.18.128.0"], [])


def test_malformed_questions() -> None:
    names = Asked().names
    assert names.answer(b"") is None
    assert names.answer(b"\1\2" + bytes(9)) is None
    assert names.answer(b"\1\2\x80\0" + bytes(8)) is None  # an answer
    found = names.answer(b"\1\2\1\0\0\1\0\0\0\0\0\0\x3fabc")
    assert found is not None
    assert dns.message.from_wire(found).rcode() == dns.rcode.FORMERR
    notify = dns.message.make_query("www.example.test", "A")
    notify.set_opcode(dns.opcode.NOTIFY)
    found = names.answer(notify.to_wire())
    assert found is not None
    assert dns.message.from_wire(found).rcode() == dns.rcode.NOTIMP


def test_many_questions_in_one_message() -> None:
    for count in (2, 80, 300):
        found = Asked().names.answer(
            b"\1\2\1\0" + struct.pack(">H", count) + bytes(6) + b"\1a\0\0\1\0\1" * count
        )
        assert found is not None
        assert dns.message.from_wire(found).rcode() in {dns.rcode.NOTIMP, dns.rcode.FORMERR}


@pytest.mark.parametrize("label", [b"x.api", b"x\0", b"x\\y", b"\xff", b"a b", b"(", b"@"])
def test_a_label_that_is_no_part_of_a_host_name_is_refused(label: bytes) -> None:
    asked = Asked()
    name = (
        dns.name.Name((label, b"test", b""))
        if b"." in label
        else dns.name.Name((label, b"api", b"test", b""))
    )
    found = asked.names.answer(dns.message.make_query(name, "A").to_wire())
    assert found is not None
    assert dns.message.from_wire(found).rcode() == dns.rcode.NXDOMAIN
    assert asked.new == {}


def test_what_is_said_of_a_long_name_fits() -> None:
    reach = Reach(
        NetworkRules((), (Deny("*.test", (), "/etc/" + "\N{LATIN SMALL LETTER E WITH ACUTE}" * 2000),))
    )
    names = Names(reach, known={}, on_new=lambda *_: None, on_refused=lambda *_: None)
    name = dns.name.Name((b"\xff" * 63, b"\xff" * 63, b"\xff" * 63, b"\xff" * 50, b"test", b""))
    found = names.answer(dns.message.make_query(name, "A", use_edns=0).to_wire())
    assert found is not None
    assert len(found) <= 512


@given(st.binary(max_size=600))
def test_anything_is_answered_or_ignored(data: bytes) -> None:
    names = Asked().names
    question = dns.message.make_query("www.example.test", "A", use_edns=0).to_wire()
    for message in (data, question + data, question[: len(data) % len(question)] + data):
        names.answer(message)
