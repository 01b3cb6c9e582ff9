"""One suite that an engine on a host is held to: ``python -m sandboxd.conformance --engine oci``.

Theory of operation. ``__main__`` starts a daemon of its own on the engine that it is told, or is given a
running one, and hands it to pytest as a ``Subject``. The tests are modules of this package. They know the
daemon by its public API alone: the client, HTTP, ``run-in-sandbox``, and policies that the suite writes
(``policies``). What runs inside a container is in ``programs/``; what a call has to come to is mostly a
``Case``, a row of a table.

What an engine or a kind of host cannot mean stands in one place, ``expected``, with its reason: a test says
what it needs, and the table says whether that is to be had. Nothing else asks which engine it is.
"""
