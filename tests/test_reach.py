"""What network rules come to, without a network."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.httprule import HttpRequest, HttpRule, Injection
from sandboxd.reach import NEVER, STANDINS, Allow, Deny, NetworkRules, Reach, standin6

ip = ipaddress.ip_address


def reach(allow: list[tuple[str, tuple[int, ...]]], deny: list[tuple[str, tuple[int, ...]]] = []) -> Reach:  # noqa: B006
    return Reach(
        NetworkRules(
            tuple(Allow(target, ports, f"p.yaml:{at}") for at, (target, ports) in enumerate(allow)),
            tuple(Deny(target, ports, f"d.yaml:{at}") for at, (target, ports) in enumerate(deny)),
        )
    )


RULES = reach(
    [
        ("a.test", (443,)),
        ("*.b.test", (80, 443)),
        ("x.b.test", (22,)),
        ("10.1.0.0/16", (5432,)),
        ("0.0.0.0/0", (25,)),
    ],
    [("y.b.test", ()), ("*.c.b.test", (80,)), ("10.1.2.0/24", ())],
)


@pytest.mark.parametrize(
    ("name", "ports"),
    [
        ("a.test", {443}),
        ("b.test", set()),  # the pattern is for names below
        ("z.b.test", {80, 443}),
        ("deep.z.b.test", {80, 443}),
        ("x.b.test", {22, 80, 443}),
        ("y.b.test", set()),
        ("below.y.b.test", {80, 443}),
        ("z.c.b.test", {443}),
        ("ab.test", set()),
        ("test", set()),
        ("", set()),
    ],
)
def test_ports_of_a_name(name: str, ports: set[int]) -> None:
    assert RULES.ports(name) == ports
    assert RULES.name(name).allowed == bool(ports)
    for port in (22, 25, 80, 443):
        assert RULES.at(name, port).allowed == (port in ports)


def test_a_decision_says_which_rule() -> None:
    assert RULES.at("x.b.test", 22).where == "p.yaml:2"
    assert RULES.at("z.c.b.test", 80).where == "d.yaml:1"
    assert RULES.name("y.b.test").where == "d.yaml:0"
    assert RULES.at("a.test", 80).why == "a.test is allowed at port 443, not at 80"
    assert RULES.at("n.test", 80).why == "no rule allows n.test"


@pytest.mark.parametrize(
    ("address", "port", "allowed"),
    [
        ("10.1.0.1", 5432, True),
        ("10.1.0.1", 80, False),
        ("10.1.2.1", 5432, False),  # denied
        ("10.2.0.1", 5432, False),
        ("8.8.8.8", 25, True),
        ("10.9.9.9", 25, False),  # a wide rule does not name what is private
        ("169.254.169.254", 25, False),
        ("127.0.0.1", 25, False),
        ("2001:4860:4860::8888", 25, False),
        ("::ffff:8.8.8.8", 25, False),
    ],
)
def test_addresses(address: str, port: int, allowed: bool) -> None:  # noqa: FBT001
    assert RULES.address(ip(address), port).allowed == allowed


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0", "10.0.0.1", "100.64.0.1", "127.8.8.8", "169.254.169.254", "172.31.255.255", "192.168.1.1",
     "198.18.0.1", "224.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:10.0.0.1",
     "::ffff:0:10.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::a00:1", "2002:a00:1::", "2001:0:a00:1::", "fc00::1",
     "fd00::1", "fe80::1", "fec0::1", "ff02::1", "fd00:ec2::254"],
)  # fmt: skip
def test_no_name_leads_inside(address: str) -> None:
    decision = reach([("a.test", (80,))]).upstream("a.test", ip(address), 80)
    assert not decision.allowed
    assert "a rule with a cidr inside it" in decision.why


def test_a_name_may_lead_to_where_a_network_is_allowed_or_denied() -> None:
    assert RULES.upstream("a.test", ip("10.1.0.1"), 5432).allowed
    assert not RULES.upstream("a.test", ip("10.1.0.1"), 443).allowed
    assert not RULES.upstream("a.test", ip("10.1.2.1"), 5432).allowed
    assert RULES.upstream("a.test", ip("8.8.8.8"), 443).allowed
    assert RULES.upstream("a.test", ip("2606:4700::1111"), 443).allowed


def test_everything_private_is_never_reached_by_itself() -> None:
    for network in NEVER:
        for address in (network[0], network[-1]):
            assert not reach([("0.0.0.0/0", (80,)), ("::/0", (80,))]).address(address, 80).allowed


def test_each_set_of_ports_has_a_block_of_its_own() -> None:
    blocks = dict(RULES.blocks)
    assert {frozenset({443}), frozenset({80, 443}), frozenset({22, 80, 443})} == set(blocks)
    networks = list(blocks.values())
    assert all(network.subnet_of(STANDINS) for network in networks)
    assert STANDINS[1] not in [address for network in networks for address in (network[0], network[-1])]
    assert not any(one.overlaps(other) for one in networks for other in networks if one is not other)
    assert ip("198.18.64.7") not in standin6(networks[0])


names = st.from_regex(r"[a-c](\.[a-c]){0,4}", fullmatch=True)
patterns = names.flatmap(lambda name: st.sampled_from([name, f"*.{name}"]))
ports = st.sets(st.integers(1, 5), min_size=1).map(tuple)


@given(
    st.lists(st.tuples(patterns, ports), max_size=8),
    st.lists(st.tuples(patterns, st.sets(st.integers(1, 5)).map(tuple)), max_size=8),
    names,
)
def test_a_name_that_is_answered_has_a_block_and_deny_wins(
    allow: list[tuple[str, tuple[int, ...]]], deny: list[tuple[str, tuple[int, ...]]], name: str
) -> None:
    def matches(pattern: str) -> bool:
        return pattern == name or (pattern.startswith("*.") and name.endswith(pattern[1:]))

    found = reach(allow, deny)
    expected = {
        port
        for pattern, listed in allow
        if matches(pattern)
        for port in listed
        if not any(matches(other) and (not refused or port in refused) for other, refused in deny)
    }
    assert found.ports(name) == expected
    assert found.name(name).allowed == bool(expected)
    assert all(found.at(name, port).allowed == (port in expected) for port in range(1, 6))
    if expected:
        assert frozenset(expected) in dict(found.blocks)


def test_rules_of_http_are_of_names_and_deny_wins() -> None:
    first, second = Injection("X-Key", "{secret:A}"), Injection("x-key", "{secret:B}")
    rules = Reach(
        NetworkRules(
            (
                Allow("a.test", (80,), "p:1", HttpRule(("GET",), ("/x/**",), inject=first)),
                Allow("*.test", (80, 81), "p:2", HttpRule(headers=(("x-a", "b*"),), inject=second)),
                Allow("b.test", (80,), "p:3"),
                Allow("ws.test", (82,), "p:4", HttpRule(websocket=True)),
            ),
            (Deny("*.test", (), "d:1", HttpRule(("DELETE",))), Deny("c.test", (), "d:2")),
        )
    )
    assert rules.ports("a.test") == {80, 81}  # a rule that denies some requests denies no connection
    assert rules.ports("c.test") == frozenset()
    assert [rules.looks_inside(name, 80) for name in ("a.test", "b.test", "a.else")] == [True, True, False]

    def ask(
        name: str, port: int, method: str, target: str, *, websocket: bool = False, **headers: str
    ) -> object:
        said = tuple((key.replace("_", "-").encode(), value.encode()) for key, value in headers.items())
        found = rules.request(name, port, HttpRequest(method, target.encode(), said, websocket))
        return found.where if found.allowed else found.where or False

    assert ask("a.test", 80, "GET", "/x/y") == "p:1"
    assert ask("a.test", 80, "GET", "/y") is False
    assert ask("a.test", 80, "GET", "/y", x_a="bc") == "p:2"
    assert ask("a.test", 80, "GET", "/x/y", x_a="bc") == "p:1"
    assert ask("a.test", 80, "DELETE", "/x/y", x_a="bc") == "d:1"
    assert ask("a.test", 80, "delete", "/x/y", x_a="bc") is False  # which servers take for the other
    assert ask("a.test", 80, "GET", "/x/../y", x_a="bc") is False  # ambiguous where a rule is of paths
    assert ask("b.test", 80, "PUT", "/any/../thing") == "p:3"
    assert ask("b.test", 80, "DELETE", "/") == "d:1"
    assert ask("ws.test", 82, "GET", "/", websocket=True) == "p:4"
    assert ask("a.test", 80, "GET", "/x/y", websocket=True) is False
    both = rules.request("a.test", 80, HttpRequest("GET", b"/x/y", ((b"x-a", b"b"),)))
    assert both.injections == (first,)  # the closest pattern's, once for each header


def test_a_name_leads_within_what_its_own_rule_says() -> None:
    rules = Reach(
        NetworkRules(
            (
                Allow("in.test", (443,), "p:1", within=("10.1.0.0/16", "fd00::/8", "0.0.0.0/0")),
                Allow("out.test", (443,), "p:2"),
            ),
            (Deny("10.1.9.0/24", (), "d:1"),),
        )
    )
    assert rules.upstream("in.test", ip("10.1.2.3"), 443).where == "p:1"
    assert rules.upstream("in.test", ip("fd00::1"), 443).allowed
    assert not rules.upstream("in.test", ip("10.2.0.1"), 443).allowed
    assert not rules.upstream("in.test", ip("127.0.0.1"), 443).allowed  # 0.0.0.0/0 is inside of nothing
    assert not rules.upstream("in.test", ip("10.1.2.3"), 80).allowed
    assert not rules.upstream("in.test", ip("10.1.9.1"), 443).allowed
    assert not rules.upstream("out.test", ip("10.1.2.3"), 443).allowed
    assert not rules.address(ip("10.1.2.3"), 443).allowed  # the address itself is in no rule
