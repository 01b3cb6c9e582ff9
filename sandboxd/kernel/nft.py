"""nftables by its own library, libnftables(3): one transaction for each call.

One at a time: the library uses functions of the C library, such as getprotobynumber(3), whose answers lie
where those of another thread do, and then lists rules that are not there.
"""

from __future__ import annotations

import ctypes
import threading
from functools import lru_cache

__all__ = ["NftError", "run_nft"]

SONAME = "libnftables.so.1"
_one_at_a_time = threading.Lock()


class NftError(OSError):
    """Raised when the library is not there, or the kernel or the library refuses the commands."""


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(SONAME)
    except OSError as error:
        raise NftError(f"{SONAME} cannot be loaded ({error}); install the package libnftables1") from error
    context, text = ctypes.c_void_p, ctypes.c_char_p
    for name, result, arguments in (
        ("nft_ctx_new", context, [ctypes.c_uint32]),
        ("nft_ctx_free", None, [context]),
        ("nft_ctx_buffer_output", ctypes.c_int, [context]),
        ("nft_ctx_buffer_error", ctypes.c_int, [context]),
        ("nft_ctx_get_output_buffer", text, [context]),
        ("nft_ctx_get_error_buffer", text, [context]),
        ("nft_ctx_output_set_flags", None, [context, ctypes.c_uint]),
        ("nft_run_cmd_from_buffer", ctypes.c_int, [context, text]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def run_nft(commands: str) -> str:
    """Run the commands, all or none, in the network namespace of this thread; returns what they print.

    Raises NftError.
    """
    with _one_at_a_time:
        return _run(commands)


def _run(commands: str) -> str:
    library = _library()
    context = library.nft_ctx_new(0)
    if not context:
        raise NftError("no context of libnftables could be made")
    try:
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_buffer_error(context)
        if library.nft_run_cmd_from_buffer(context, commands.encode()) != 0:
            said: bytes = library.nft_ctx_get_error_buffer(context)
            raise NftError(f"nftables: {said.decode(errors='replace').strip()}")
        printed: bytes = library.nft_ctx_get_output_buffer(context)
        return printed.decode()
    finally:
        library.nft_ctx_free(context)
