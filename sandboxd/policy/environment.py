"""The variables that the command has from its policy, before a request adds to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.policy.fixed import DEFAULT_ENV
from sandboxd.policy.trust import trust_env

if TYPE_CHECKING:
    from sandboxd.policy.schema import PolicyFile

__all__ = ["environment", "placeholders"]


def environment(spec: PolicyFile) -> dict[str, str]:
    """All of them, by name."""
    return {**DEFAULT_ENV, **trust_env(spec), **placeholders(spec), **spec.process.env}


def placeholders(spec: PolicyFile) -> dict[str, str]:
    """What programs that insist on a key find in the place of secrets that they do not get."""
    return {secret.name: secret.placeholder for secret in spec.secrets if secret.placeholder is not None}
