"""Which commands are left to a warm interpreter."""

from __future__ import annotations

import ast
import opcode
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.init.warm import ACTING, RUNNER, serves
from sandboxd.plan import Warm

ENV = {"PATH": "/usr/bin", "LANG": "C.UTF-8", "PYTHONUTF8": "1", "SAID": "policy"}
WARM = Warm("python3", (), tuple(ENV.items()))
YES = (
    "python3",
    "python3 -",
    "python3 - a",
    "python3 x.py",
    "python3 /x/y.py -u",
    "python3 -c 1",
    "python3 -c 1 -u",
    "python3 -m a.b -x",
)
NO = (
    "python",
    "/usr/bin/python3",
    "python3.11 x.py",
    "python3 -u x.py",
    "python3 -B -c 1",
    "python3 -I -c 1",
    "python3 -c",
    "python3 -m",
    "python3 -m a..b",
    "python3 -m -x",
    "python3 -V",
    "python3 --version",
    "python3 -W error x.py",
    "python3 -Wdefault x.py",
    "python3 -X dev x.py",
    "python3 -i",
    "python3 -cprint(1)",
    "python3 -mthis",
    "python3 -- x.py",
    "sh -c python3",
)


@pytest.mark.parametrize(("command", "served"), [*((c, True) for c in YES), *((c, False) for c in NO)])
def test_by_its_words(command: str, served: bool) -> None:  # noqa: FBT001
    assert serves(WARM, command.encode().split(), ENV) is served


NAMES = [*sorted(ACTING), "PYTHONHASHSEED", "LC_ALL", "LD_PRELOAD", "OMP_NUM_THREADS"]


@pytest.mark.parametrize("name", NAMES)
def test_a_variable_that_has_acted_already(name: str) -> None:
    argv = [b"python3", b"x.py"]
    assert not serves(WARM, argv, {**ENV, name: "other"})
    assert not serves(Warm("python3", (), (*ENV.items(), (name, "x"))), argv, ENV)


def test_any_other_variable_may_differ() -> None:
    assert serves(WARM, [b"python3"], {**ENV, "SAID": "request", "MORE": ""})
    assert not serves(WARM, [b"python3"], {key: value for key, value in ENV.items() if key != "PYTHONUTF8"})


@given(st.lists(st.binary(max_size=6), max_size=4))
def test_no_option_of_the_interpreter_is_ever_left_to_it(words: list[bytes]) -> None:
    served = serves(WARM, [b"python3", *words], ENV)
    if served and words and words[0].startswith(b"-"):
        assert words[0] in {b"-", b"-c", b"-m"}


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=3), max_size=4))
def test_what_the_interpreter_reads_is_never_another(more: dict[str, str]) -> None:
    env = {**ENV, **more}
    if serves(WARM, [b"python3"], env):
        assert {k: v for k, v in env.items() if k.startswith("PYTHON")} == {"PYTHONUTF8": "1"}


def test_the_runner_knows_the_instructions_of_this_python() -> None:
    """Of the one that runs the tests: ``scripts/matrix`` runs them with each."""
    (versions,) = (
        ast.literal_eval(statement.value)
        for statement in ast.parse(RUNNER.read_text()).body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "VERSIONS"
    )
    names = ("LOAD_CONST", "GET_ITER", "SET_UPDATE")
    assert versions[sys.version_info[:2]] == tuple(opcode.opmap[name] for name in names)
    for program in ("for each in {9, 1}: pass", "{1, 2, 3, 4, 5}"):
        operations = compile(program, "", "exec").co_code[::2]
        constant, *users = versions[sys.version_info[:2]]
        assert any(bytes((constant, user)) in operations for user in users)
