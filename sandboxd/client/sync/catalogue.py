"""The part of ``Client`` that is about what the daemon has: policies, images, containers, secrets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.client.calls import catalogue
from sandboxd.client.calls.request import request
from sandboxd.client.sync.exchanges import Exchanges

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from sandboxd import models
    from sandboxd.client.calls.request import Argv, RequestFields

__all__ = ["Catalogue"]


class Catalogue(Exchanges):
    """What the daemon has."""

    def policies(self) -> Sequence[models.PolicyInfo]:
        """The policies that this caller may use."""
        return self._do(catalogue.policies())

    def policy(self, name: str) -> models.PolicyInfo:
        """One policy, with its resolved form. Raises NotFound."""
        return self._do(catalogue.policy(name))

    def check_policy(self, text: str, name: str | None = None) -> Sequence[models.PolicyProblem]:
        """All problems of the text of a policy file; none means that it is good."""
        return self._do(catalogue.check_policy(text, name))

    def plan(self, argv: Argv, **fields: Unpack[RequestFields]) -> models.PlanDocument:
        """What would run, exactly, and where each value came from; nothing runs."""
        return self._do(catalogue.plan(request(argv, fields)))

    def images(self) -> Sequence[models.ImageInfo]:
        """The images in the daemon's store."""
        return self._do(catalogue.images())

    def slots(self) -> Sequence[models.SlotInfo]:
        """The containers that the daemon holds. Raises NotPermitted for who is no operator."""
        return self._do(catalogue.slots())

    def secrets(self) -> Sequence[models.SecretInfo]:
        """The stored secrets, without their values. Raises NotPermitted for who is no operator."""
        return self._do(catalogue.secrets())

    def secret(self, name: str) -> models.SecretInfo:
        """What is known of one secret; its value is never given back. Raises NotFound, NotPermitted."""
        return self._do(catalogue.secret(name))

    def set_secret(self, name: str, value: bytes) -> models.SecretInfo:
        """Store a secret. Raises StateConflict if it is there, SecretsUnavailable without a key."""
        return self._do(catalogue.set_secret(name, value))

    def rotate_secret(self, name: str, value: bytes) -> models.SecretInfo:
        """Give a secret a new value. Raises NotFound, SecretsUnavailable."""
        return self._do(catalogue.rotate_secret(name, value))

    def remove_secret(self, name: str) -> None:
        """Forget a secret. Raises NotFound."""
        self._do(catalogue.remove_secret(name))

    def health(self) -> models.Health:
        """Whether the daemon takes calls, and with what."""
        return self._do(catalogue.health())
