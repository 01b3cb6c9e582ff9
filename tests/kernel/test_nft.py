"""nftables by its library."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from sandboxd.kernel.inside import in_new_network_namespace
from sandboxd.kernel.nft import NftError, run_nft

PROTOCOLS = ("tcp", "udp", "esp", "ah", "sctp", "dccp", "comp", "udplite")
RULES = "".join(f"meta l4proto {protocol} accept\n" for protocol in PROTOCOLS * 20)
TABLE = f"table inet t {{\nchain c {{\n{RULES}}}\n}}\n"


def listed() -> list[str]:
    """The rules of a namespace of its own, as the library lists them, a few times."""

    def make() -> list[str]:
        run_nft(TABLE)
        return [run_nft("list ruleset") for _ in range(10)]

    return in_new_network_namespace(make)


def test_threads_do_not_get_each_others_words() -> None:
    wanted = set(listed())
    assert len(wanted) == 1
    with ThreadPoolExecutor(8) as pool:
        found = [text for texts in pool.map(lambda _: listed(), range(40)) for text in texts]
    assert set(found) == wanted


def test_what_is_refused_says_why() -> None:
    with pytest.raises(NftError, match="syntax error"):
        in_new_network_namespace(lambda: run_nft("add nonsense"))
