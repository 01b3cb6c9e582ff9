"""Texts that somebody else chose, cut to what there is room for.

A secret that is cut in two is found by nobody, so that a text says where it was: ``redaction`` takes the
beginnings of secrets out there.
"""

from __future__ import annotations

__all__ = ["CUT", "excerpt"]

CUT = "…"


def excerpt(text: str, most: int) -> str:
    """The text, or its beginning and a sign that there was more; at most so many characters."""
    return text if len(text) <= most else text[: most - len(CUT)] + CUT
