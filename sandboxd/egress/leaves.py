"""The server's side of TLS that is ended on the way: a certificate for each name, made when first asked for.

``Leaves`` is made before the process gives up its file system (``jail.py``): what OpenSSL and
``cryptography`` load late has to be loaded by then. Afterwards all that is asked of the kernel is random
numbers and the time.

A name has one ``SSL.Context`` for all its connections. No session is resumed: each connection is judged by
its own ClientHello, and what a handshake costs is little beside the connection that is made for it.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import SSL

from sandboxd.egress.keyusage import key_usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["MAX_NAMES", "Leaves", "ProtocolRefused"]

MAX_NAMES = 500  # whose certificates are kept, 30 KiB each with what OpenSSL makes of it
BACKDATED = timedelta(days=1)
VALID = timedelta(days=7)
RENEWED = timedelta(days=3)  # before the end: a connection may begin long after its context was asked for
AGAIN = timedelta(hours=1)  # where the authority's own end is that near
SUBJECT = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "sandboxd")])  # a CN has room for 64 bytes
OPTIONS = SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION | SSL.OP_SINGLE_ECDH_USE


class ProtocolRefused(Exception):
    """Raised by ``do_handshake`` when a client offers other protocols (ALPN) than the connection speaks."""


@dataclass(frozen=True)
class _Leaf:
    context: SSL.Context
    begins: datetime
    renewed: datetime


class Leaves:
    """Certificates of names, signed by the authority of the daemon. For one thread."""

    def __init__(
        self,
        authority: str,
        key: str,
        *,
        most: int = MAX_NAMES,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``authority`` and ``key`` are PEM; ``most`` names are kept. Raises ValueError for anything else."""
        self._authority = x509.load_pem_x509_certificate(authority.encode())
        signer = serialization.load_pem_private_key(key.encode(), None)
        if not isinstance(signer, ec.EllipticCurvePrivateKey):
            raise ValueError("the authority's key is for no elliptic curve")  # noqa: TRY004
        if signer.public_key() != self._authority.public_key():
            raise ValueError("the key is not that of the authority's certificate")
        self._signer = signer
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._most = most
        self._now = now
        self._made: OrderedDict[str, _Leaf] = OrderedDict()
        self._rehearse()

    def context(self, name: str) -> SSL.Context:
        """What a server named so has: TLS 1.2 or 1.3, its certificate and the authority's.

        ``name`` is a host name in lower case, or an address. A connection says which protocols it speaks by
        its ``set_app_data``: a sequence of bytes, best first, such as ``(b"h2", b"http/1.1")``. Raises
        ValueError for what is no name.
        """
        now, leaf = self._now(), self._made.get(name)
        if leaf is None or not leaf.begins <= now < leaf.renewed:
            leaf = self._made[name] = self._make(name, now)
            while len(self._made) > self._most:
                self._made.popitem(last=False)
        self._made.move_to_end(name)
        return leaf.context

    def connection(self, name: str, protocols: Sequence[bytes]) -> SSL.Connection:
        """A server's end for ``name``, over memory (``bio_write``, ``bio_read``). Raises ValueError.

        The first of ``protocols`` that the client offers too is chosen. Where it offers others alone, the
        handshake raises ProtocolRefused, and the alert of RFC 7301 waits to be sent.
        """
        connection = SSL.Connection(self.context(name), None)
        connection.set_app_data(tuple(protocols))
        connection.set_accept_state()
        return connection

    def _make(self, name: str, now: datetime) -> _Leaf:
        first, last = self._authority.not_valid_before_utc, self._authority.not_valid_after_utc
        begins = min(max(now - BACKDATED, first), last - VALID)  # whatever the clock says
        ends = min(max(now, begins) + VALID, last)
        public = self._key.public_key()
        issuer = self._authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        certificate = (
            x509.CertificateBuilder()
            .subject_name(SUBJECT)
            .issuer_name(self._authority.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage("handshakes"), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_general(name)]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False
            )
            .sign(self._signer, hashes.SHA256())
        )
        renewed = max(ends - RENEWED, now + AGAIN)
        return _Leaf(self._context(certificate), min(begins, now), renewed)

    def _context(self, certificate: x509.Certificate) -> SSL.Context:
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_options(OPTIONS)
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # most connections are idle most of the time
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.use_certificate(certificate)
        context.add_extra_chain_cert(self._authority)
        context.use_privatekey(self._key)
        context.set_alpn_select_callback(_choose)
        return context

    def _rehearse(self) -> None:
        """A whole handshake and a byte of data each way, so that all is loaded that any will need."""
        server = self.connection("rehearsal.invalid", (b"http/1.1",))
        trusting = SSL.Context(SSL.TLS_CLIENT_METHOD)
        store = trusting.get_cert_store()
        if store is None:
            raise ValueError("OpenSSL gives a context no store of certificates")
        trusting.set_alpn_protos([b"http/1.1"])
        client = SSL.Connection(trusting, None)
        client.set_connect_state()
        for _ in range(4):
            for end, other in ((client, server), (server, client)):
                _shake(end)
                _carry(end, other)
        client.send(b"x")
        _carry(client, server)
        server.send(server.recv(1))
        _carry(server, client)
        client.recv(1)
        self._made.clear()


def _choose(connection: SSL.Connection, offered: list[bytes]) -> bytes:
    """The ALPN protocol; what is raised here comes out of ``do_handshake``."""
    for protocol in connection.get_app_data() or ():
        if protocol in offered:
            return bytes(protocol)
    raise ProtocolRefused("the client speaks none of the protocols that are spoken here")


def _shake(end: SSL.Connection) -> None:
    try:
        end.do_handshake()
    except SSL.WantReadError:
        return


def _carry(end: SSL.Connection, other: SSL.Connection) -> None:
    while True:
        try:
            other.bio_write(end.bio_read(1 << 14))
        except SSL.WantReadError:
            return


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
