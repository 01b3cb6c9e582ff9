"""Every call of the API as typed data: what to send, and how to decode what comes back.

Both clients perform these values, so a route, a body or a decoding is written once; and so are the options
that a method of theirs takes, each a ``TypedDict``.
"""
