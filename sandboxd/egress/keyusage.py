"""What the key of a certificate of ours is for, and nothing else (RFC 5280, section 4.2.1.3)."""

from __future__ import annotations

from typing import Literal

from cryptography import x509

__all__ = ["key_usage"]


def key_usage(signs: Literal["certificates", "handshakes"]) -> x509.KeyUsage:
    """The extension of a key that signs these alone."""
    return x509.KeyUsage(
        digital_signature=signs == "handshakes",
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs == "certificates",
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
