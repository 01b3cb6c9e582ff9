"""Rules that look into HTTP: what they allow is done over TLS, everything else is answered with why not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sandboxd.conformance.case import text
from sandboxd.conformance.outside import SERVED
from sandboxd.conformance.plugin import needs

if TYPE_CHECKING:
    from sandboxd.conformance.subject import Subject
    from sandboxd.models import Invocation

ASK = """
import http.client, sys
host, port, *asked = sys.argv[1:]
made = http.client.HTTPSConnection(host, int(port), timeout=30)
for each in asked:
    method, _, path = each.partition(' ')
    made.request(method, path, headers={'X-Given': 'mine'})
    answer = made.getresponse()
    print(answer.status, answer.read().decode(), end='')
"""


def ask(subject: Subject, *asked: str) -> Invocation:
    """A call that makes these requests over one connection and prints the answers."""
    return subject.run("python3", "-c", ASK, SERVED, str(subject.outside.web_port), *asked, policy="requests")


@needs("a daemon of the suite's own")
def test_an_allowed_request_is_made_with_what_is_put_into_it(subject: Subject) -> None:
    call = ask(subject, "GET /open/a?b")
    assert text(call) == "200 /open/a?b on the way\n", text(call, "stderr")
    seen = [event.network for event in subject.client.events(call.id) if event.network is not None]
    event = next(one for one in seen if one.method)
    assert (event.verdict, event.protocol, event.method, event.path) == ("allowed", "https", "GET", "/open/a")
    assert event.status == 200
    assert call.usage is not None
    assert (call.usage.connections, call.usage.requests) == (1, 1)


@needs("a daemon of the suite's own")
def test_others_are_answered_and_never_made(subject: Subject) -> None:
    before = len(subject.outside.requests)
    refused = ["DELETE /open/a", "GET /other", "GET /open/%2e%2e/other"]
    call = ask(subject, *refused, *["GET /open/a"] * 4)
    lines = text(call).splitlines()
    assert [line[:3] for line in lines] == ["403"] * 3 + ["200"] * 3 + ["429"], text(call, "stderr")
    problem = json.loads(lines[0][4:])
    assert problem["allowed"] == [f"{SERVED}: GET, /open/**"]
    assert {denial.kind for denial in call.denials} == {"request"}
    assert [one.limit for one in call.limits_reached] == ["network.budget.requests"]
    assert subject.outside.requests[before:] == ["GET /open/a"] * 3
