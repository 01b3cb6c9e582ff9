"""sandboxd runs each tool call of an agent in a container of its own, under a policy an operator wrote.

This is the public API: the two clients, the wire types and the errors.

    from sandboxd import Client

    call = Client().run(["python3", "-c", "print(6 * 7)"], policy="python")
    print(call.outcome, call.stdout)

Names are imported when they are first used (PEP 562): the command line starts through this package and
must not pay for pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandboxd import errors, models
    from sandboxd.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "errors", "models"]

__version__ = "0.1.0"

_HOMES = {
    "AsyncClient": ("sandboxd.client.aio", "AsyncClient"),
    "Client": ("sandboxd.client.sync", "Client"),
    "errors": ("sandboxd.errors", None),
    "models": ("sandboxd.models", None),
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    try:
        module, attribute = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    found = import_module(module)
    return found if attribute is None else getattr(found, attribute)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted([*globals(), *__all__])
