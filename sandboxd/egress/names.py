"""The name server of a container: each name that may be reached has an address that stands for it there."""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from sandboxd.egress.messages import MAX_NAMES
from sandboxd.reach import STANDINS, STANDINS6, Decision, standin6

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sandboxd.reach import Reach

__all__ = ["Names", "stands_for_a_name"]

TTL = 60
MAX_QUESTION = 512  # bytes; the longest name needs fewer, and to read records that nobody needs takes long
MAX_SIZE = 1232  # of a datagram; with one question, no answer comes near it
MAX_WHY = 200  # bytes of an extended error


_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")


class Names:
    """Answers questions, and knows what its answers stand for."""

    def __init__(
        self,
        reach: Reach,
        *,
        known: Mapping[str, str],
        on_new: Callable[[str, str], None],
        on_refused: Callable[[str, Decision], None],
    ) -> None:
        """``known``: what was answered before, by whoever answered then."""
        self._reach = reach
        self._on_new = on_new
        self._on_refused = on_refused
        self._left = {ports: iter(block) for ports, block in reach.blocks}
        self._addresses: dict[str, ipaddress.IPv4Address] = {}
        self._names: dict[ipaddress.IPv4Address, str] = {}
        for name, address in known.items():
            self._know(name, ipaddress.IPv4Address(address))

    def name_of(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
        """What an address stands for."""
        if isinstance(address, ipaddress.IPv6Address):
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        return self._names.get(address)

    def address_of(self, name: str) -> ipaddress.IPv4Address | None:
        """The address that stands for a name that may be reached; None when they are used up."""
        found = self._addresses.get(name)
        if found is None and len(self._addresses) < MAX_NAMES:
            free = (one for one in self._left[self._reach.ports(name)] if one not in self._names)
            found = next(free, None)
            if found is not None:
                self._know(name, found)
                self._on_new(name, str(found))
        return found

    def _know(self, name: str, address: ipaddress.IPv4Address) -> None:
        self._addresses[name] = address
        self._names[address] = name

    def answer(self, question: bytes) -> bytes | None:
        """The answer to a message, of less than 512 bytes; None where there is nothing to answer."""
        if len(question) > MAX_QUESTION:
            return _header(question, dns.rcode.FORMERR)
        try:
            query = dns.message.from_wire(question, ignore_trailing=True)
        except (dns.exception.DNSException, ValueError):
            return _header(question, dns.rcode.FORMERR)
        if query.flags & dns.flags.QR:
            return None
        if query.opcode() != dns.opcode.QUERY or len(query.question) != 1:
            return _header(question, dns.rcode.NOTIMP)
        response = dns.message.make_response(query, recursion_available=True, our_payload=MAX_SIZE)
        self._resolve(query, response)
        return response.to_wire(max_size=MAX_SIZE)

    def _decision(self, name: str) -> Decision:
        if not _NAME.fullmatch(name):  # a dot inside a label, say, which rules would take for the end of one
            return Decision(allowed=False, why=f"{name} is no host name")
        return self._reach.name(name)

    def _resolve(self, query: dns.message.Message, response: dns.message.Message) -> None:
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True).lower()
        decision = self._decision(name)
        if question.rdclass != dns.rdataclass.IN or not decision.allowed:
            self._on_refused(name, decision)
            response.set_rcode(dns.rcode.NXDOMAIN)
            if query.edns >= 0:
                whole = f"sandboxd: {decision.why}" + (f" ({decision.where})" if decision.where else "")
                said = whole.encode()[:MAX_WHY].decode(errors="ignore")
                code = dns.edns.EDECode.BLOCKED if decision.where else dns.edns.EDECode.PROHIBITED
                response.use_edns(0, payload=MAX_SIZE, options=[dns.edns.EDEOption(code, said)])
            return
        if question.rdtype not in (dns.rdatatype.A, dns.rdatatype.AAAA):
            return  # an empty answer: the name is there, and has no such record
        address = self.address_of(name)
        if address is None:
            response.set_rcode(dns.rcode.SERVFAIL)
            return
        standin: object = address
        if question.rdtype == dns.rdatatype.AAAA:
            standin = standin6(ipaddress.IPv4Network(address)).network_address
        data = dns.rdata.from_text(question.rdclass, question.rdtype, str(standin))
        found = dns.rrset.RRset(question.name, question.rdclass, question.rdtype)
        found.add(data, TTL)
        response.answer.append(found)


def _header(question: bytes, code: dns.rcode.Rcode) -> bytes | None:
    """An answer that is a header alone, to what was not understood."""
    if len(question) < 12 or question[2] & 0x80:
        return None
    return question[:2] + bytes((0x80 | question[2] & 0x79, 0x80 | code)) + bytes(8)


def stands_for_a_name(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is one of those that are given out for names."""
    return address in STANDINS or address in STANDINS6
