"""Whom a process believes that a server is who it says: the host's certificate authorities and some more."""

from __future__ import annotations

import ssl
from contextlib import suppress
from pathlib import Path

__all__ = ["Servers", "host_authorities"]

BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Alpine, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # openSUSE
    "/etc/ssl/cert.pem",
)


def host_authorities() -> str:
    """The certificates that this host trusts, as PEM; none where it has no bundle."""
    for bundle in BUNDLES:
        with suppress(OSError, UnicodeDecodeError):
            return Path(bundle).read_text(encoding="ascii", errors="ignore")
    return ""


class Servers:
    """Makes what a TLS client needs. ``authorities`` is PEM; nothing is opened."""

    def __init__(self, authorities: str) -> None:
        self._authorities = authorities
        self._contexts: dict[tuple[str, ...], ssl.SSLContext] = {}

    def context(self, protocols: tuple[str, ...]) -> ssl.SSLContext:
        """To connect with, and to offer these protocols (ALPN) with."""
        if (found := self._contexts.get(protocols)) is None:
            found = self._contexts[protocols] = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            found.minimum_version = ssl.TLSVersion.TLSv1_2
            if "BEGIN CERTIFICATE" in self._authorities:  # where there is none, no server is believed
                found.load_verify_locations(cadata=self._authorities)
            if protocols:
                found.set_alpn_protocols(list(protocols))
        return found
