"""What a container has so that its programs trust the daemon's authority, where a rule looks into HTTP.

One file is in every such container at ``TRUSTED``: the image's own bundle of authorities, and the daemon's.
It lies on the image's bundle too, and the variables by which programs are told of another lead to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandboxd.policy.network import Http
    from sandboxd.policy.schema import PolicyFile

__all__ = ["BUNDLES", "TRUSTED", "VARIABLES", "looks_inside", "trust_env"]

TRUSTED = "/dev/.sandboxd-ca.pem"
"""Below /dev, where a mount point can be made in any image, and where no program can take it away."""

BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Arch, Gentoo
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # RHEL
    "/etc/ssl/cert.pem",  # Alpine
    "/usr/lib/ssl/cert.pem",  # Debian's OpenSSL, where somebody made one
)
"""Where images have theirs; the first of Go's list (``crypto/x509/root_linux.go``) is that of an image."""

VARIABLES = (
    "SSL_CERT_FILE",  # OpenSSL, and all that looks for certificates as it does: Python, Go, Ruby, Rust
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
    "PIP_CERT",
    "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO",
    "DENO_CERT",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
)


def looks_inside(spec: PolicyFile) -> bool:
    """Whether a rule of the policy speaks of HTTP, for which TLS is ended on the way."""
    network = spec.network
    if network is None or network.reaches_nothing:
        return False
    rules: tuple[Http, ...] = (*network.allow, *network.deny)
    return any(rule.looks_inside for rule in rules)


def trust_env(spec: PolicyFile) -> dict[str, str]:
    """Variables of the command, beneath those of the policy and the request."""
    return dict.fromkeys(VARIABLES, TRUSTED) if looks_inside(spec) else {}
