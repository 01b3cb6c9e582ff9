"""Warm interpreters: each program comes to the same in one that has waited as in a fresh one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sandboxd.conformance.case import outcome, text
from sandboxd.conformance.plugin import needs
from sandboxd.conformance.test_pool import filled

if TYPE_CHECKING:
    from sandboxd.conformance.subject import Subject

pytestmark = needs("a daemon of the suite's own")

FILES = {
    "hello.py": "import sys; print('hello', sys.argv, __name__, __file__); sys.exit(3)\n",
    "trace.py": "def f(n):\n    return 1 // n\n\nf(0)\n",
    "wrong.py": "def f(:\n",
    "package/__main__.py": "import json; from . import part; print(json.dumps(part.X), __package__)\n",
    "package/__init__.py": "",
    "package/part.py": "X = [1]\n",
    "parallel.py": """
import subprocess, threading
thread = threading.Thread(target=print, args=("in a thread",))
thread.start()
thread.join()
print(subprocess.run(["id", "-u"], capture_output=True).stdout)
""",
    "json.py": "X = 'not the library'\n",
}
CALLS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "-c": (["-c", "import sys; print(sys.argv, sys.path, __name__)", "a"], {}),
    "a file": (["hello.py", "x", "y"], {}),
    "a module": (["-m", "package"], {}),
    "standard input": (["-"], {"stdin": b"print(__name__, 6 * 7)\n"}),
    "no argument": ([], {"stdin": b"print('from stdin')\n"}),
    "a traceback": (["trace.py"], {}),
    "a syntax error": (["wrong.py"], {}),
    "a file that is missing": (["nowhere.py"], {}),
    "an option of the interpreter": (["-S", "-c", "import sys; print(sys.flags.no_site)"], {}),
    "exit codes": (["-c", "import os; os._exit(42)"], {}),
    "a signal": (["-c", "import os; os.kill(os.getpid(), 11)"], {}),
    "standard error": (["-c", "import sys; print('e', file=sys.stderr); raise SystemExit('bye')"], {}),
    "at exit": (["-c", "import atexit; atexit.register(print, 'last'); print('first')"], {}),
    "the environment": (["-c", "import os; print(sorted(os.environ.items()))"], {"env": {"MINE": "1"}}),
    "a variable of Python's": (["-c", "print(__debug__)"], {"env": {"PYTHONOPTIMIZE": "1"}}),
    "a working directory": (["-c", "import os; print(os.getcwd())"], {"cwd": "/tmp"}),
    "a module that shadows": (["-c", "import json; print(getattr(json, 'X', None))"], {}),
    "identity": (["-c", "import os; print(os.getresuid(), os.getgroups(), os.umask(0), os.getppid())"], {}),
    "descriptors": (["-c", "import os; print(sorted(os.listdir('/proc/self/fd')))"], {}),
    "signals": (["-c", "import signal; print([str(signal.getsignal(n)) for n in range(1, 32)])"], {}),
    "threads and processes": (["parallel.py"], {}),
    "denied": (["-c", "import os; os.chroot('/')"], {}),
}  # fmt: skip


@pytest.mark.parametrize("what", CALLS)
def test_a_warm_interpreter_is_as_a_fresh_one(subject: Subject, what: str) -> None:
    arguments, fields = CALLS[what]
    found = []
    for policy in ("fresh", "warm"):
        filled(subject, policy)
        call = subject.run("python3", *arguments, policy=policy, inputs=FILES, **fields)
        ended = outcome(call)
        denials = [(one.name, one.count) for one in call.denials]
        found.append((ended.cause, ended.exit_code, ended.signal, text(call), text(call, "stderr"), denials))
    assert found[0] == found[1]


WAITED = "import sys; print('json' in sys.modules)"


def test_it_has_waited(subject: Subject) -> None:
    for policy, expected in (("fresh", "False\n"), ("warm", "True\n")):
        filled(subject, policy)
        assert text(subject.run("python3", "-c", WAITED, policy=policy)) == expected


def test_no_two_calls_share_one(subject: Subject) -> None:
    code = "import builtins, random; print(hasattr(builtins, 'mine'), random.random()); builtins.mine = 1"
    seen = []
    for _ in range(4):
        filled(subject, "warm")
        seen.append(text(subject.run("python3", "-c", code, policy="warm")).split())
    assert {first for first, _ in seen} == {"False"}
    assert len({second for _, second in seen}) == 4


def test_its_time_counts_from_hand_over(subject: Subject) -> None:
    filled(subject, "warm")
    found = subject.run("python3", "-c", "pass", policy="warm", limits={"cpu_time": subject.duration(1)})
    assert outcome(found).exit_code == 0
    assert found.usage is not None
    assert found.usage.cpu_user + found.usage.cpu_system < subject.seconds(0.5) * 1e6
