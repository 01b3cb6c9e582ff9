"""The authority that containers trust where a rule looks into HTTP: one for each daemon, in its memory alone.

Its key is in no file. The daemon gives it to the processes that serve connections, which make certificates of
the hosts' names with it (``egress/leaves.py``). With the daemon it is gone: what trusted it trusts nobody.
"""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sandboxd.egress.keyusage import key_usage

__all__ = ["Authority"]

BACKDATED = timedelta(days=2)  # for clocks that are set back while it is in use
VALID = timedelta(days=5 * 365)  # longer than a daemon runs: nobody could renew what containers have read
MAX_NAME = 64  # bytes; ub-common-name of RFC 5280


@dataclass(frozen=True)
class Authority:
    """A certificate and its key, both as PEM."""

    certificate: str
    key: str = field(repr=False)
    fingerprint: str
    """``sha256:…`` of the certificate's DER."""

    @classmethod
    def make(cls, host: str | None = None) -> Self:
        """A new one, named after this host."""
        name = f"sandboxd CA of {socket.gethostname() if host is None else host}"
        name = name.encode(errors="replace")[:MAX_NAME].decode(errors="ignore")
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        public = key.public_key()
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(now + VALID)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(key_usage("certificates"), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(
            made.public_bytes(serialization.Encoding.PEM).decode(),
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ).decode(),
            "sha256:" + hashlib.sha256(made.public_bytes(serialization.Encoding.DER)).hexdigest(),
        )
