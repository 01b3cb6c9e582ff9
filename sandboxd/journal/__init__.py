"""What was asked, what happened, and the proof of it: the journal, and each call's output on disk."""

from __future__ import annotations

from sandboxd.journal.chain import Head
from sandboxd.journal.ids import Ids
from sandboxd.journal.records import Accepted, Existing, Refusal, outcome_header
from sandboxd.journal.store import Journal
from sandboxd.journal.verify import VerifyReport

__all__ = [
    "Accepted",
    "Existing",
    "Head",
    "Ids",
    "Journal",
    "Refusal",
    "VerifyReport",
    "outcome_header",
]
