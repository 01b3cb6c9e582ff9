"""The places of the queue: why there is none for a further call, in words and in numbers."""

from __future__ import annotations

import math

from sandboxd import errors
from sandboxd.room import fits, share

__all__ = ["fits", "full"]

LONGEST_RETRY = 60  # seconds


def full(
    size: int, *, queued: int, own: int, most: int | None, running: int, pace: float
) -> errors.QueueFull:
    """The refusal of a call when so many wait in a queue of that size, ``own`` of them the caller's.

    ``most`` is what the configuration lets this caller have wait; ``pace`` is seconds between two ends.
    """
    if most is not None and own >= most:
        which, limit = "caller", most
        why = f"as many as `queued` of your entry in `callers` allows ({most})"
    elif queued >= size:
        which, limit = "queue", size
        why = f"as many as the queue holds ({size})"
    else:
        which, limit = "share", share(size - (queued - own))
        why = f"as many as one caller may have of what others leave of the queue ({limit})"
    retry_after = min(LONGEST_RETRY, max(1, math.ceil(pace)))
    estimate = pace * (queued + 1)
    return errors.QueueFull(
        f"{queued} calls wait already, {own} of them yours: {why}. Try again in {retry_after} s, when there "
        f"may be a place; one that had a place now might start in {max(1, math.ceil(estimate))} s",
        retry_after=retry_after,
        queued=queued,
        yours=own,
        running=running,
        which=which,
        limit=limit,
        estimate=round(estimate, 3),
    )
