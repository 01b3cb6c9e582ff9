"""The part of ``AsyncClient`` that is about what the daemon has: policies, images, containers, secrets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.client.aio.exchanges import Exchanges
from sandboxd.client.calls import catalogue
from sandboxd.client.calls.request import request

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from sandboxd import models
    from sandboxd.client.calls.request import Argv, RequestFields

__all__ = ["Catalogue"]


class Catalogue(Exchanges):
    """What the daemon has."""

    async def policies(self) -> Sequence[models.PolicyInfo]:
        """The policies that this caller may use."""
        return await self._do(catalogue.policies())

    async def policy(self, name: str) -> models.PolicyInfo:
        """One policy, with its resolved form. Raises NotFound."""
        return await self._do(catalogue.policy(name))

    async def check_policy(self, text: str, name: str | None = None) -> Sequence[models.PolicyProblem]:
        """All problems of the text of a policy file; none means that it is good."""
        return await self._do(catalogue.check_policy(text, name))

    async def plan(self, argv: Argv, **fields: Unpack[RequestFields]) -> models.PlanDocument:
        """What would run, exactly, and where each value came from; nothing runs."""
        return await self._do(catalogue.plan(request(argv, fields)))

    async def images(self) -> Sequence[models.ImageInfo]:
        """The images in the daemon's store."""
        return await self._do(catalogue.images())

    async def slots(self) -> Sequence[models.SlotInfo]:
        """The containers that the daemon holds. Raises NotPermitted for who is no operator."""
        return await self._do(catalogue.slots())

    async def secrets(self) -> Sequence[models.SecretInfo]:
        """The stored secrets, without their values. Raises NotPermitted for who is no operator."""
        return await self._do(catalogue.secrets())

    async def secret(self, name: str) -> models.SecretInfo:
        """What is known of one secret; its value is never given back. Raises NotFound, NotPermitted."""
        return await self._do(catalogue.secret(name))

    async def set_secret(self, name: str, value: bytes) -> models.SecretInfo:
        """Store a secret. Raises StateConflict if it is there, SecretsUnavailable without a key."""
        return await self._do(catalogue.set_secret(name, value))

    async def rotate_secret(self, name: str, value: bytes) -> models.SecretInfo:
        """Give a secret a new value. Raises NotFound, SecretsUnavailable."""
        return await self._do(catalogue.rotate_secret(name, value))

    async def remove_secret(self, name: str) -> None:
        """Forget a secret. Raises NotFound."""
        await self._do(catalogue.remove_secret(name))

    async def health(self) -> models.Health:
        """Whether the daemon takes calls, and with what."""
        return await self._do(catalogue.health())
