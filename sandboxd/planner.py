"""What a request would run: the first that is asked of it, and what refuses it before it is accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio.to_thread

from sandboxd import errors, plan, units
from sandboxd.narrowing import make_plan
from sandboxd.policy.retry import OWN_CAUSES

if TYPE_CHECKING:
    from sandboxd.api.identity import Caller
    from sandboxd.images import ImageStore
    from sandboxd.models import Request
    from sandboxd.policy import Policy
    from sandboxd.pool import Pool
    from sandboxd.reload import PolicyStore
    from sandboxd.scheduler import Scheduler
    from sandboxd.secrets import SecretStore

__all__ = ["Planner"]


class Planner:
    """Judges requests by the policies in force, the images that are there, and the daemon's budget."""

    def __init__(
        self,
        policies: PolicyStore,
        images: ImageStore,
        pool: Pool,
        scheduler: Scheduler,
        secrets: SecretStore,
    ) -> None:
        self._policies = policies
        self._images = images
        self._pool = pool
        self._scheduler = scheduler
        self._secrets = secrets

    def policy_for(self, caller: Caller, name: str) -> Policy:
        """A policy that this caller may use. Raises NotFound, NotPermitted."""
        if not caller.may_use(name):
            raise errors.NotPermitted(
                f"policy {name!r} is not yours to use; you may use {', '.join(sorted(caller.policies))}",
                policies=sorted(caller.policies),
            )
        return self._policies.current.get(name)

    def plan_for(
        self, caller: Caller, request: Request, *, policy: Policy | None = None, image: str | None = None
    ) -> tuple[Policy, plan.Plan]:
        """What the request would run. Raises every refusal that does not depend on the daemon's load.

        ``policy`` and ``image``, a digest, take the place of what is in force, for a call that is run again.
        """
        policy = policy or self.policy_for(caller, request.policy)
        found = self._images.resolve(image or policy.image)
        name = found.name if image is None else policy.image  # that of a digest is the digest
        shape = plan.make_shape(policy, plan.ImageRef(name, found.digest))
        self._pool.lacks.refuse(shape)
        self._check_secrets(caller, shape)
        made = make_plan(policy, shape, request)
        if made.holds > self._scheduler.memory:
            inputs = "" if made.holds == made.limits.memory else " and the inputs"
            raise errors.RequestTooWide(
                f"limits.memory{inputs} need {made.holds} bytes, more than the daemon's budget of "
                f"{self._scheduler.memory}",
                field="limits.memory",
                asked=made.holds,
                allowed=self._scheduler.memory,
            )
        self._check_budget(policy, made)
        return policy, made

    def _check_budget(self, policy: Policy, made: plan.Plan) -> None:
        """Raise RequestTooWide for what would never have its turn, or would not when it is tried again."""
        cpus = self._scheduler.cpus
        if cpus is not None and made.limits.cpus > cpus:
            raise errors.RequestTooWide(
                f"limits.cpus {units.format_cpus(made.limits.cpus)} is more than the daemon's budget of "
                f"{units.format_cpus(cpus)}",
                field="limits.cpus",
                asked=made.limits.cpus,
                allowed=cpus,
            )
        retry = policy.spec.retry
        for cause in OWN_CAUSES:
            own = None if retry is None else retry.of(cause)
            asked = None if own is None else own.raise_.memory
            if asked is not None and asked + made.holds - made.limits.memory > self._scheduler.memory:
                raise errors.RequestTooWide(
                    f"the policy's retry.{cause}.raise.memory needs {asked} bytes, more than the daemon's "
                    f"budget of {self._scheduler.memory}",
                    field=f"retry.{cause}.raise.memory",
                    asked=asked,
                    allowed=self._scheduler.memory,
                )

    def _check_secrets(self, caller: Caller, shape: plan.Shape) -> None:
        """Raise what keeps a call from the secrets of its policy: first whether it may have them."""
        if not shape.secrets:
            return
        for grant in shape.secrets:
            if not caller.may_have(grant.name):
                raise errors.NotPermitted(
                    f"policy {shape.policy!r} grants the secret {grant.name}, which is not yours to have; an "
                    "operator grants it by `secrets:` of your entry in the configuration's `callers`",
                    secret=grant.name,
                )
        names = [grant.name for grant in shape.secrets]
        self._secrets.check(names, environment=shape.granted("env"))

    async def know_image(self, caller: Caller, request: Request) -> None:
        """Have an engine that keeps images by reference say what one stands for that is used first.

        Raises NotFound, NotPermitted, EngineFailed.
        """
        image = self.policy_for(caller, request.policy).image
        if self._images.needs_asking(image):
            await anyio.to_thread.run_sync(self._images.ask, image)
