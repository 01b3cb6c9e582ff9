"""The calls of the API that are about what the daemon has: policies, images, containers, secrets."""

from __future__ import annotations

import json

from sandboxd import models
from sandboxd.client import wire
from sandboxd.client.calls.call import BYTES_IN, Call, body_of, many, nothing, one

__all__ = [
    "check_policy",
    "health",
    "images",
    "plan",
    "policies",
    "policy",
    "remove_secret",
    "rotate_secret",
    "secret",
    "secrets",
    "set_secret",
    "slots",
]


def policies() -> Call[list[models.PolicyInfo]]:
    """The policies that this caller may use."""
    return Call(wire.Exchange("GET", wire.target("policies")), many(models.PolicyInfo, "policies"))


def policy(name: str) -> Call[models.PolicyInfo]:
    """One policy with its resolved form."""
    return Call(wire.Exchange("GET", wire.target("policies", name)), one(models.PolicyInfo))


def check_policy(text: str, name: str | None) -> Call[list[models.PolicyProblem]]:
    """The problems of the text of a policy file."""
    body = json.dumps({"text": text} if name is None else {"text": text, "name": name}).encode()
    exchange = wire.Exchange("POST", wire.target("policies", "check"), body)
    return Call(exchange, many(models.PolicyProblem, "problems"))


def plan(asked: models.Request) -> Call[models.PlanDocument]:
    """What would run, and where each value came from; nothing runs."""
    return Call(wire.Exchange("POST", wire.target("plans"), body_of(asked)), one(models.PlanDocument))


def images() -> Call[list[models.ImageInfo]]:
    """The images of the daemon's store."""
    return Call(wire.Exchange("GET", wire.target("images")), many(models.ImageInfo, "images"))


def slots() -> Call[list[models.SlotInfo]]:
    """The containers that the daemon holds."""
    return Call(wire.Exchange("GET", wire.target("slots")), many(models.SlotInfo, "slots"))


def secrets() -> Call[list[models.SecretInfo]]:
    """The stored secrets."""
    return Call(wire.Exchange("GET", wire.target("secrets")), many(models.SecretInfo, "secrets"))


def secret(name: str) -> Call[models.SecretInfo]:
    """One of them."""
    return Call(wire.Exchange("GET", wire.target("secrets", name)), one(models.SecretInfo))


def set_secret(name: str, value: bytes) -> Call[models.SecretInfo]:
    """Store one."""
    exchange = wire.Exchange("PUT", wire.target("secrets", name), value, BYTES_IN)
    return Call(exchange, one(models.SecretInfo))


def rotate_secret(name: str, value: bytes) -> Call[models.SecretInfo]:
    """Give one a new value."""
    exchange = wire.Exchange("POST", wire.target("secrets", name, "rotate"), value, BYTES_IN)
    return Call(exchange, one(models.SecretInfo))


def remove_secret(name: str) -> Call[None]:
    """Forget one."""
    return Call(wire.Exchange("DELETE", wire.target("secrets", name)), nothing)


def health() -> Call[models.Health]:
    """Whether the daemon takes calls."""
    return Call(wire.Exchange("GET", wire.target("health")), one(models.Health))
