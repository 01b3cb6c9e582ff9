"""The routes of what there is: policies, plans, images, containers, metrics, health."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from sandboxd import models
from sandboxd.api import body, queries
from sandboxd.api.invocations import caller_of, json_response
from sandboxd.api.openapi import Doc
from sandboxd.errors import NotFound

if TYPE_CHECKING:
    from starlette.requests import Request

    from sandboxd.api.service import Service
    from sandboxd.room import Room

__all__ = ["Catalogue"]

MAX_POLICY_BODY = 1024 * 1024
MAX_NAME = 128
METRICS = "text/plain; version=0.0.4"


class Catalogue:
    """The handlers, and the service that they call. ``bodies`` bounds what all of them hold."""

    def __init__(self, service: Service, bodies: Room) -> None:
        self.service = service
        self.bodies = bodies
        http = service.config.http
        self.bounds = body.Bounds(http.body, http.body_time)
        self.policy_text = body.Bounds(MAX_POLICY_BODY, http.body_time)

    async def policies(self, request: Request) -> Response:
        """The policies that the caller may use."""
        body.query(request, queries.NoQuery)
        return json_response({"policies": await self.service.policies(caller_of(request))})

    async def policy(self, request: Request) -> Response:
        """One policy with its resolved form."""
        body.query(request, queries.NoQuery)
        name = request.path_params["name"]
        if len(name) > MAX_NAME:
            raise NotFound("there is no such policy")
        return json_response(await self.service.policy(caller_of(request), name))

    async def check(self, request: Request) -> Response:
        """All that is wrong with the text of a policy file."""
        body.query(request, queries.NoQuery)
        asked = await body.decode(request, queries.CheckBody, self.policy_text)
        found = await self.service.check_policy(caller_of(request), asked.text, asked.name)
        return json_response({"problems": found})

    async def plan(self, request: Request) -> Response:
        """What would run, and where each value came from."""
        body.query(request, queries.NoQuery)
        caller = caller_of(request)
        with self.bodies.held(caller.uid) as held:
            asked = await body.decode(request, models.Request, self.bounds, held)
            return json_response(await self.service.plan(caller, asked))

    async def images(self, request: Request) -> Response:
        """The images of the store."""
        body.query(request, queries.NoQuery)
        return json_response({"images": await self.service.images(caller_of(request))})

    async def slots(self, request: Request) -> Response:
        """The containers that the daemon holds, waiting or in use; for operators."""
        body.query(request, queries.NoQuery)
        return json_response({"slots": self.service.slots(caller_of(request))})

    async def metrics(self, request: Request) -> Response:
        """Pool depth, hand-overs and calls by cause, in the text format of Prometheus; for operators."""
        body.query(request, queries.NoQuery)
        return Response(await self.service.metrics(caller_of(request)), media_type=METRICS)

    async def health(self, request: Request) -> Response:
        """Whether the daemon takes calls."""
        body.query(request, queries.NoQuery)
        return json_response(self.service.health())

    def routes(self) -> list[tuple[str, str, Any, Doc]]:
        """Method, path, handler and documentation of each route."""
        return [
            ("GET", "/v1/policies", self.policies,
             Doc("The policies that the caller may use", answer=_many("policies", "PolicyInfo"))),
            ("POST", "/v1/policies/check", self.check,
             Doc("Check a policy", body=queries.CheckBody, answer=_many("problems", "PolicyProblem"))),
            ("GET", "/v1/policies/{name}", self.policy, Doc("One policy", answer=models.PolicyInfo)),
            ("POST", "/v1/plans", self.plan,
             Doc("What would run", body=models.Request, answer=models.PlanDocument)),
            ("GET", "/v1/images", self.images, Doc("The images", answer=_many("images", "ImageInfo"))),
            ("GET", "/v1/slots", self.slots, Doc("The containers", answer=_many("slots", "SlotInfo"))),
            ("GET", "/metrics", self.metrics, Doc("Metrics", text_answer=True)),
            ("GET", "/v1/health", self.health, Doc("Whether the daemon is ready", answer=models.Health)),
        ]  # fmt: skip


def _many(name: str, model: str) -> dict[str, Any]:
    items = {"type": "array", "items": {"$ref": f"#/components/schemas/{model}"}}
    return {"type": "object", "required": [name], "properties": {name: items}}
