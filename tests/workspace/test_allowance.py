"""What a session has left of its network: never more than it has, however its calls end."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.workspace import allowance

LIMITS = {"session.bytes": 1000, "session.connections": 20}
OWN = {"bytes": 300}


def database() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.execute("CREATE TABLE sessions (id TEXT PRIMARY KEY, network TEXT)")
    connection.execute("INSERT INTO sessions (id) VALUES ('s'), ('other')")
    return connection


def used(connection: sqlite3.Connection, session: str = "s") -> dict[str, int]:
    (column,) = connection.execute("SELECT network FROM sessions WHERE id = ?", (session,)).fetchone()
    return allowance.used_of(column)


def test_what_is_held_is_the_less_of_both_budgets() -> None:
    with closing(database()) as connection:
        hold = allowance.hold(connection, "s", "a", LIMITS | OWN, {})
        assert hold == ({"bytes": 1000, "connections": 20}, {"bytes": 300, "connections": 20})
        assert used(connection) == {}
        allowance.settle(connection, "s", "a", {"bytes": 250, "bytes_in": 250, "connections": 1})
        assert used(connection) == {"bytes": 250, "bytes_in": 250, "connections": 1}
        assert allowance.hold(connection, "s", "b", LIMITS, {}).left == {"bytes": 750, "connections": 19}
        assert used(connection, "other") == {}


def test_what_was_held_for_a_call_without_an_outcome_is_used() -> None:
    with closing(database()) as connection:
        allowance.hold(connection, "s", "a", LIMITS | OWN, {})
        left = allowance.hold(connection, "s", "b", LIMITS | OWN, {}).left
        assert left == {"bytes": 700, "connections": 0}
        allowance.charge(connection)
        assert used(connection) == {"bytes": 600, "connections": 20}
        allowance.charge(connection)
        assert used(connection) == {"bytes": 600, "connections": 20}


def test_a_call_that_no_budget_bounds_is_counted() -> None:
    with closing(database()) as connection:
        allowance.settle(connection, "s", "a", {"bytes": 5000, "requests": 3})
        assert allowance.hold(connection, "s", "b", LIMITS, {}).left == {"bytes": 0, "connections": 20}


def test_a_fork_begins_with_what_was_used_and_not_with_what_is_held() -> None:
    with closing(database()) as connection:
        allowance.settle(connection, "s", "a", {"bytes": 100})
        allowance.hold(connection, "s", "b", LIMITS, {})
        (column,) = connection.execute("SELECT network FROM sessions WHERE id = 's'").fetchone()
        assert allowance.used_of(allowance.begun_with(column)) == {"bytes": 100}
        assert allowance.begun_with(None) is None


@pytest.mark.parametrize("own", [{}, OWN])
@given(st.data())
def test_never_more_than_there_is(own: dict[str, int], data: st.DataObject) -> None:
    """Calls one after another, some tried again, some that end with their daemon, some whose end is lost."""
    went = {"bytes": 0, "connections": 0}
    with closing(database()) as connection:
        for number in range(data.draw(st.integers(1, 12))):
            attempts: dict[str, int] = {}
            for _ in range(data.draw(st.integers(1, 3))):
                hold = allowance.hold(connection, "s", f"call{number}", LIMITS | own, attempts)
                for name, most in hold.most.items():
                    count = data.draw(st.integers(0, most))
                    attempts[name] = attempts.get(name, 0) + count
                    went[name] += count
            end = data.draw(st.sampled_from(["outcome", "daemon", "lost"]))
            if end == "outcome":
                allowance.settle(connection, "s", f"call{number}", attempts)
            elif end == "daemon":
                allowance.charge(connection)
            assert all(went[name] <= LIMITS[f"session.{name}"] for name in went)
        allowance.charge(connection)
        told = used(connection)
        assert all(went[name] <= told.get(name, 0) <= LIMITS[f"session.{name}"] for name in went)
