"""Policies: what an operator allows, from YAML text to resolved and checked values.

``source`` reads text into nodes with places, ``schema`` says what may stand there, ``inherit`` merges
a policy with its parent, ``floor`` and ``checks`` refuse what may not be, ``examples`` judges a
policy by its compiled rules, ``load`` drives all of it, ``explain`` tells a person.
"""

from sandboxd.policy.advice import advice
from sandboxd.policy.examples import ExampleError, judge
from sandboxd.policy.explain import explain
from sandboxd.policy.load import PolicySet, check_text, load_policies, shipped_policies
from sandboxd.policy.resolved import Policy
from sandboxd.policy.source import Origin

__all__ = [
    "ExampleError",
    "Origin",
    "Policy",
    "PolicySet",
    "advice",
    "check_text",
    "explain",
    "judge",
    "load_policies",
    "shipped_policies",
]
