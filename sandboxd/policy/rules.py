"""The network rules of a resolved policy, as data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandboxd.httprule import HttpRule, Injection
from sandboxd.policy.network import Denied
from sandboxd.reach import Allow, Deny, NetworkRules

if TYPE_CHECKING:
    from sandboxd.policy.network import Inject, Rule, Target
    from sandboxd.policy.resolved import Policy

__all__ = ["network_rules"]


def network_rules(policy: Policy) -> NetworkRules | None:
    """The rules of a resolved policy; None where it reaches nothing, or has the host's network."""
    network = policy.spec.network
    if network is None or network.reaches_nothing or network.mode == "host":
        return None

    def target(rule: Target) -> str:
        return rule.host or rule.cidr or ""

    def where(kind: str, number: int) -> str:
        return str(policy.origin(f"network.{kind}.{number}"))

    budget = {} if network.budget is None else network.budget.limits()
    return NetworkRules(
        tuple(
            Allow(target(rule), rule.ports, where("allow", at), _http(rule), rule.within)
            for at, rule in enumerate(network.allow)
        ),
        tuple(
            Deny(target(rule), rule.ports, where("deny", at), _http(rule))
            for at, rule in enumerate(network.deny)
        ),
        tuple(budget.items()),
    )


def _http(rule: Rule | Denied) -> HttpRule | None:
    if not rule.looks_inside:
        return None
    conditions = (
        rule.methods,
        rule.paths,
        tuple((name.lower(), glob) for name, glob in rule.headers.items()),
    )
    if isinstance(rule, Denied):
        return HttpRule(*conditions)
    return HttpRule(*conditions, websocket=rule.websocket, inject=_injection(rule.inject))


def _injection(inject: Inject | None) -> Injection | None:
    if inject is None:
        return None
    if inject.sigv4 is None:
        return Injection(inject.header or "", inject.value or "", plain=inject.plain)
    keys = inject.sigv4
    return Injection(
        "Authorization", "", keys.access_key, keys.secret_key, keys.session_token or "", plain=inject.plain
    )
