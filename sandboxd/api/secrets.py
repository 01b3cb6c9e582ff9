"""The routes of stored secrets, for operators: decode, call the service, encode.

A value comes as the bytes of a body and not within JSON, so no parser has it in an error; nothing that is
answered or logged says more of it than its length. No route gives one back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.responses import Response

from sandboxd import models
from sandboxd.api import body, queries
from sandboxd.api.invocations import caller_of, json_response
from sandboxd.api.openapi import OCTETS, Doc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import Request

    from sandboxd.api.service import Service
    from sandboxd.room import Room

__all__ = ["Secrets"]

MAX_BODY = 64 * 1024
"""Bytes of a value; as ``sandboxd.secrets`` has it, which a test compares."""


class Secrets:
    """The handlers, and the service that they call. ``bodies`` bounds what all of them hold."""

    def __init__(self, service: Service, bodies: Room) -> None:
        self.service = service
        self.bodies = bodies
        self.bounds = body.Bounds(MAX_BODY, service.config.http.body_time)

    async def list(self, request: Request) -> Response:
        """The stored secrets, by name; never their values."""
        body.query(request, queries.NoQuery)
        return json_response({"secrets": await self.service.secrets(caller_of(request))})

    async def get(self, request: Request) -> Response:
        """What is known of one secret; never its value."""
        body.query(request, queries.NoQuery)
        return json_response(await self.service.secret(caller_of(request), request.path_params["name"]))

    async def set(self, request: Request) -> Response:
        """Store a secret whose value is the body, as it is; one that is there is not replaced."""
        value = await self._value(request)
        found = await self.service.set_secret(caller_of(request), request.path_params["name"], value)
        return json_response(found, 201, {"location": f"/v1/secrets/{quote(found.name)}"})

    async def rotate(self, request: Request) -> Response:
        """Give a secret a new value, the body, which the next call has."""
        value = await self._value(request)
        return json_response(
            await self.service.rotate_secret(caller_of(request), request.path_params["name"], value)
        )

    async def remove(self, request: Request) -> Response:
        """Forget a secret. Calls that have it as variable or file keep it until they end."""
        body.query(request, queries.NoQuery)
        await self.service.remove_secret(caller_of(request), request.path_params["name"])
        return Response(status_code=204)

    async def _value(self, request: Request) -> bytes:
        caller = caller_of(request)
        self.service.may_store(caller)  # before a byte of it is read
        body.query(request, queries.NoQuery)
        if body.media_type(request) not in {OCTETS, ""}:
            raise HTTPException(415, f"the body is the value itself: send Content-Type: {OCTETS}")
        with self.bodies.held(caller.uid) as held:
            return await body.read(request, self.bounds, held)

    def routes(self) -> Sequence[tuple[str, str, Any, Doc]]:
        """Method, path, handler and documentation of each route."""
        one = "/v1/secrets/{name}"
        items = {"type": "array", "items": {"$ref": "#/components/schemas/SecretInfo"}}
        many = {"type": "object", "required": ["secrets"], "properties": {"secrets": items}}
        info = models.SecretInfo
        return [
            ("GET", "/v1/secrets", self.list, Doc("The stored secrets", answer=many)),
            ("GET", one, self.get, Doc("One secret, without its value", answer=info)),
            ("PUT", one, self.set, Doc("Store a secret", raw_body=True, answer=info, status=201)),
            ("POST", one + "/rotate", self.rotate, Doc("Rotate a secret", raw_body=True, answer=info)),
            ("DELETE", one, self.remove, Doc("Remove a secret", status=204)),
        ]
