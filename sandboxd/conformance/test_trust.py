"""Trust: programs believe the daemon's authority where a rule looks into HTTP, and only there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sandboxd.conformance.case import controls, text
from sandboxd.policy.trust import TRUSTED, VARIABLES

if TYPE_CHECKING:
    from sandboxd.conformance.subject import Subject

TRUSTS = """
import hashlib, os, ssl, sys
found = ssl.create_default_context().get_ca_certs(binary_form=True)
print("sha256:" + hashlib.sha256(found[-1]).hexdigest() if found else "nobody")
print(sorted({os.environ.get(name) for name in sys.argv[1:]}, key=str))
"""
TRIES = """
import os, sys
[place] = sys.argv[1:]
for attempt in (lambda: open(place, "ab"), lambda: os.unlink(place), lambda: os.rename(place, place + "x"),
                lambda: os.chmod(place, 0o777), lambda: os.truncate(place, 0),
                lambda: os.rename("/workspace/mine", place)):
    open("/workspace/mine", "w").close()
    try: attempt()
    except OSError: continue
    print("done")
print(open(place).read().count("BEGIN CERTIFICATE") > 0)
"""


def test_programs_trust_whom_the_receipt_names(subject: Subject) -> None:
    call = subject.run("python3", "-c", TRUSTS, *VARIABLES, policy="https")
    line = controls(call)["trust"]
    assert line.enforced
    who, _, places = line.in_force.partition(" at ")
    assert TRUSTED in places.split(", ")
    assert text(call) == f"{who}\n{[TRUSTED]}\n", text(call, "stderr")
    for place in places.split(", "):
        found = controls(call)[f"mount {place}"]
        assert found.asked == found.in_force


def test_all_containers_of_a_daemon_trust_the_same(subject: Subject) -> None:
    seen = {controls(subject.run("true", policy="https"))["trust"].in_force for _ in range(2)}
    assert len(seen) == 1


@pytest.mark.parametrize("policy", ["network", "python"])
def test_without_rules_of_http_nobody_is_trusted(subject: Subject, policy: str) -> None:
    call = subject.run("python3", "-c", TRUSTS, *VARIABLES, policy=policy)
    assert text(call).splitlines()[1:] == ["[None]"]
    assert "trust" not in controls(call)
    assert f"mount {TRUSTED}" not in controls(call)


def test_a_tool_cannot_change_it(subject: Subject) -> None:
    call = subject.run("python3", "-c", TRIES, TRUSTED, policy="https")
    assert text(call) == "True\n", text(call, "stderr")
