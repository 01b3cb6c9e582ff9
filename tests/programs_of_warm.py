"""Calls that run in a warm interpreter and in a fresh one; every byte of both has to be the same."""

# ruff: noqa: E501  -- the programs are texts

from __future__ import annotations

from dataclasses import dataclass, field

LOOK = """
import sys, os
print(sys.argv, sys.path, sys.orig_argv, sys.flags, sys.executable, sys.warnoptions, sys._xoptions)
def plain(v): return type(v) if ' at 0x' in repr(v) else v
print({k: plain(v) for k, v in globals().items() if k != '__builtins__'}, __builtins__ is sys.modules['builtins'])
print(__name__, dir(), vars() is globals(), sys.modules['__main__'].__dict__ is globals())
f, depth = sys._getframe(), 0
while f.f_back: f, depth = f.f_back, depth + 1
print(depth, f.f_code.co_filename, f.f_code.co_name, f.f_lineno)
print(os.getcwd(), dict(os.environ), os.environb, os.listdir('/proc/self/fd'), os.getppid(), os.getpid())
"""
STREAMS = """
import sys, os
for s in (sys.stdin, sys.stdout, sys.stderr):
    print(s.encoding, s.errors, s.line_buffering, s.write_through, s.name, s.mode, s.newlines, s.isatty())
    print(s.buffer, type(s.buffer), s.seekable(), s.fileno(), s.closed, os.get_inheritable(s.fileno()))
print(sys.stdin is sys.__stdin__, sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__)
print(repr(sys.stdin), repr(sys.stdout), sys.stdin.read())
"""
STATE = """
import sys, os, signal, threading, atexit, gc, warnings, resource, locale, faulthandler, tracemalloc
print(open('/etc/passwd').fileno(), os.pipe(), os.dup(1), faulthandler.is_enabled(), tracemalloc.is_tracing())
print(threading.main_thread().ident == threading.get_ident(), threading.main_thread().native_id == os.getpid(), os.getsid(0))
print(os.umask(0), os.nice(0), os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0) != set(), signal.getitimer(0))
print([(s, str(signal.getsignal(s))) for s in sorted(signal.valid_signals())], signal.pthread_sigmask(0, []))
print(threading.active_count(), threading.current_thread() is threading.main_thread(), atexit._ncallbacks())
print(gc.isenabled(), gc.get_threshold(), warnings.filters, sys.excepthook is sys.__excepthook__)
print([(n, resource.getrlimit(n)) for n in range(16)], locale.getlocale(), locale.setlocale(locale.LC_ALL))
print(sys.getrecursionlimit(), sys.getswitchinterval(), sys.gettrace(), sys.getprofile(), sys.dont_write_bytecode)
print(hasattr(sys, 'last_type'), hasattr(sys, 'ps1'), sys.getdefaultencoding(), sys.getfilesystemencoding())
print([m for m in sys.modules if 'runner' in m or 'sandboxd' in m], sys.path_hooks[0], len(sys.meta_path))
print([t for t in gc.get_objects() if getattr(t, '__module__', '') == 'sitecustomize' and callable(t)])
print(open('/proc/self/comm').read(), [l for l in open('/proc/self/status') if l[:4] in ('Umas', 'Sigq', 'SigI', 'SigC', 'SigB')])
"""
LATER = """
import atexit, threading, time, sys
atexit.register(print, 'second'); atexit.register(print, 'first')
threading.Thread(target=lambda: (time.sleep(.05), print('thread'))).start()
print('main'); sys.stdout.write('no newline'); sys.exit('bye')
"""
CHAINED = """
def f(n):
    if n == 0:
        try: {}['x']
        except KeyError as e: raise ValueError('outer') from e
    f(n - 1)
class C:
    def m(self): f(3)
C().m()
"""
PROCESSES = """
import multiprocessing as m, subprocess, sys
def square(n): return n * n
if __name__ == '__main__':
    for method in ('fork', 'spawn', 'forkserver'):
        with m.get_context(method).Pool(2) as pool: print(method, pool.map(square, [2, 3]))
    print(subprocess.run([sys.executable, '-c', 'import os, sys; print(os.listdir("/proc/self/fd"), sys.path)'],
        capture_output=True))
    print(subprocess.run(['sh', '-c', 'ls /proc/self/fd; trap; env'], capture_output=True))
"""
SETS = """
print({16, 8, 0}, [n for n in {9, 1}], 17 in {17, 9}, {'a', 'b', 'c'} == {'c', 'b', 'a'})
def f():
    for n in {32, 16, 24, 0, 1 << 70, -1}: print(n)
    return {(9, 'x'), (1, 'y'), None, 2.5, b'z'}
f()
"""
ALIKE = """
def f(): return 1000, 'not a name', -0.0, 1e999, 3j, b'bytes', ..., ((1, 2), 'x')
def g(): return 1000, 'not a name', 0.0, (1, 2)
print([[a is b for b in g.__code__.co_consts] for a in f.__code__.co_consts], f(), f.__code__.co_consts[-1] is f())
print(f.__code__.co_flags, f.__code__.co_linetable, f.__code__.co_filename is g.__code__.co_filename, list(f.__code__.co_lines()))
"""
FILES = {
    "sets.py": SETS,
    "alike.py": ALIKE,
    "nested.py": "print('ran')\nf = " + "lambda: " * 1100 + "0\n",
    "flat.py": "print(" + " + ".join(["1"] * 400) + ")\nx = " + "[" * 90 + "]" * 90 + "\n",
    "long.py": "print('ran')\n" + "x = 'a line of a program that is longer than what may be written'\n" * 100,
    "shadow/random.py": "print('own random')\ndef random(): return 4\n",
    "shadow/tool/__init__.py": "print('own tool')\n",
    "shadow/json/data.txt": "no module",
    "shadow/uses.py": "import random, json; print(random.random(), random.__file__, json.__file__)",
    "package/random/__init__.py": "print('own package')\n",
    "package/uses.py": "import random; print(random.__file__)",
    "typed/types.py": "print('own types')\n",
    "typed/x.py": "print('x')\n",
    **{
        f".local/lib/python3.{minor}/site-packages/of_the_user.py": "print('of the user')\n"
        for minor in range(11, 15)
    },
    "look.py": LOOK,
    "streams.py": STREAMS,
    "state.py": STATE,
    "later.py": LATER,
    "chained.py": CHAINED,
    "processes.py": PROCESSES,
    "latin.py": "# -*- coding: latin-1 -*-\nprint('\u00e9')\n",
    "syntax.py": "print(1)\nx = = 2\n",
    "indent.py": "if 1:\nx\n",
    "warned.py": "x = 1\nprint(x is 1, '\\d')\n",
    "future.py": "'''doc'''\nfrom __future__ import annotations\nx: Foo = 1\nprint(__annotations__, __doc__)\n",
    "names.py": "import look2, sys; print(look2.__name__, look2.__file__, 'look2' in sys.modules)",
    "look2.py": "import __main__; print(__main__.__file__, __main__.__spec__)",
    "tree/__main__.py": LOOK,
    "tree/sub.py": LOOK + "print(__package__, __spec__.name)\nraise OSError('here')\n",
    "pack/__init__.py": "print('init')",
    "pack/__main__.py": LOOK,
    "pack/relative.py": "from . import other; print(other.__name__, __package__); 1 / 0",
    "pack/other.py": "",
    "broken/__init__.py": "raise RuntimeError('in the package')",
    "broken/x.py": "",
    "deep/one.py": LOOK,
    "cli.py": "import argparse; p = argparse.ArgumentParser(); p.add_argument('n', type=int); print(p.parse_args())",
    "tests.py": "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(1, 2)\n"
    "import contextlib, io\nwith contextlib.redirect_stderr(io.StringIO()): unittest.main(exit=False)\n",
    "noeol.py": "print('no end of line')#",
    "bom.py": "\ufeffprint('bom')\n",
    "crlf.py": "print('crlf')\r\nif 1:\r\n    raise KeyError('x')\r\n",
    "empty.py": "",
    "kill.py": "import os, signal, sys; os.kill(os.getpid(), int(sys.argv[1]))",
    "interrupted.py": "import os, signal\ntry: os.kill(os.getpid(), 2)\nexcept KeyboardInterrupt: print('caught')",
    "pickled.py": "import pickle\nclass A: pass\nprint(pickle.loads(pickle.dumps(A())).__class__, A.__module__)",
    "classes.py": "import dataclasses, enum, typing\n@dataclasses.dataclass\nclass D:\n    x: int\nprint(D(1), "
    "typing.get_type_hints(D))\nimport inspect; print(inspect.getsource(D))",
}


@dataclass(frozen=True)
class Call:
    """One command. ``stdin`` None: there is none."""

    argv: tuple[str, ...]
    stdin: bytes | None = None
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = "/workspace"


def _call(*argv: str, stdin: bytes | None = None, cwd: str = "/workspace", **env: str) -> Call:
    return Call(("python3", *argv), stdin, env, cwd)


SCRIPTS = [_call(name) for name in FILES if "/" not in name and name != "processes.py"]
KINDS = [
    _call(*argv, stdin=stdin)
    for code in (LOOK, STREAMS, STATE, LATER, CHAINED)
    for argv, stdin in (
        (("-c", code, "a", "-b"), None),
        (("-c", code), b"in\nput"),
        (("-", "a", ""), code.encode()),
        ((), code.encode()),
    )
]
OTHERS = [
    _call("look.py", "a", "-c", "--", "", "\u00e9"),
    _call("./look.py"),
    _call("/workspace/look.py"),
    _call("deep/one.py"),
    _call("deep/../deep/one.py"),
    _call("../workspace/deep//one.py", cwd="/tmp"),
    _call("look.py", cwd="/"),
    _call("look.py", cwd="/nowhere"),
    _call("streams.py", stdin=b"some\ninput"),
    _call("streams.py", stdin=b""),
    _call("processes.py"),
    _call("tree"),
    _call("tree/"),
    _call("pack"),
    _call("none.py"),
    _call("/etc/passwd"),
    _call("/etc/shadow"),
    _call("/usr/bin/python3"),
    _call("/dev/null"),
    _call("/proc/self/fd/0", stdin=b"print('from stdin')"),
    _call("-m", "look", "a"),
    _call("-m", "pack", "a"),
    _call("-m", "pack.relative"),
    _call("-m", "tree.sub", "-x"),
    _call("-m", "broken"),
    _call("-m", "broken.x"),
    _call("-m", "none"),
    _call("-m", "none.none"),
    _call("-m", "syntax"),
    _call("-m", "json.tool", stdin=b'{"a": [1, 2]}'),
    _call("-m", "json.tool", stdin=b"{"),
    _call("-m", "timeit", "-h"),
    _call("-m", "unittest", "-h"),
    _call("-m", "this"),
    _call("-", stdin=b"import os, stat\nprint(stat.S_ISFIFO(os.fstat(0).st_mode), os.read(0, 9), 1 is 1)"),
    _call("-", stdin=b"print(1 is 1)\n# " + b"x" * (1 << 20)),
    _call("-", stdin=b"x = = 1"),
    _call("-m"),
    _call("-m", ""),
    _call("-m", "a b"),
    _call("-c"),
    _call("-c", ""),
    _call("-c", "x = = 1"),
    _call("-c", " print(1)"),
    _call("-c", "print(1)\n\nraise SystemExit"),
    _call("-c", "raise SystemExit(3)"),
    _call("-c", "raise SystemExit(None)"),
    _call("-c", "raise SystemExit('said')"),
    _call("-c", "raise SystemExit(-1)"),
    _call("-c", "raise SystemExit(2**40)"),
    _call("-c", "raise SystemExit((1, 2))"),
    _call("-c", "exit(4)"),
    _call("-c", "quit()"),
    _call("-c", "import os; os._exit(9)"),
    _call("-c", "import os; print('lost'); os._exit(9)"),
    _call("-c", "import os; os.abort()"),
    _call("-c", "raise KeyboardInterrupt"),
    _call("-c", "import sys; sys.excepthook = lambda *a: print('hook', a[1]); 1/0"),
    _call("-c", "import sys; sys.stdout.close(); print('x', file=sys.stderr)"),
    _call("-c", "import sys; sys.stdout = None; print('x')"),
    _call("-c", "import os; os.close(1); print('x')"),
    _call("-c", "print('\\udcff')"),
    _call("-c", "print('\u00e9\u4f60')"),
    _call("-c", "raise ExceptionGroup('g', [ValueError(1), KeyError('k')])"),
    _call("-c", "e = ValueError('n'); e.add_note('a note'); raise e"),
    _call("-c", "def f(): return f()\nf()"),
    _call("-c", "import warnings; warnings.warn('w', stacklevel=2); warnings.warn('d', DeprecationWarning)"),
    _call("-c", "import traceback; traceback.print_stack()"),
    _call(
        "-c",
        "import inspect; print([(f.filename, f.lineno, f.function, f.code_context) for f in inspect.stack()])",
    ),
    _call("-c", "import asyncio; asyncio.run(asyncio.sleep(0)); print('slept')"),
    _call("-c", "import faulthandler; faulthandler.dump_traceback(all_threads=False)"),
    _call(
        "-c",
        "import logging; logging.warning('%s', 'logged'); logging.getLogger('x').error('y', stack_info=True)",
    ),
    _call("-c", "import sys; print(sys.stdin.readline(), input())", stdin=b"one\ntwo\n"),
    _call("-c", "input()"),
    _call("-c", "import os; print(os.read(0, 100))", stdin=b"raw"),
    _call("-c", "import threading; threading.Thread(target=lambda: 1/0, name='t').start()"),
    _call("-c", "import os; pid = os.fork(); pid and os.waitpid(pid, 0); print('forked')"),
    _call("-c", "import gc; class_ = type('A', (), {'__del__': lambda s: print('del')}); a = class_()"),
    _call("-c", "import numpy; print(numpy.arange(3), numpy.random.default_rng(1).random())"),
    _call("-c", "import json; print(json.dumps({'a': 1}), json.__file__, json.__spec__.name)"),
    _call("-c", "help(len)"),
    _call("-", stdin=b"x = = 1\n"),
    _call("-", stdin=b"import sys\nprint(sys.stdin.read())\n1/0\n"),
    _call("-", stdin=b""),
    _call("-"),
    _call(),
    _call("-u", "-c", LOOK + STREAMS),
    _call("-B", "-c", LOOK),
    _call("-I", "-c", LOOK),
    _call("-E", "-c", LOOK),
    _call("-S", "-c", LOOK),
    _call("-O", "-c", "assert 0; print(__debug__)"),
    _call("-W", "error", "-c", "import warnings; warnings.warn('x')"),
    _call("-X", "dev", "-c", LOOK),
    _call("-q", "-c", LOOK),
    _call("-V"),
    _call("--version"),
    _call("-h"),
    _call("--no-such-option"),
    _call("-c", LOOK, SAID="a request's own"),
    _call("-c", LOOK + STREAMS, PYTHONUNBUFFERED=""),
    _call("-c", LOOK, PYTHONPATH="/workspace/deep"),
    _call("-c", LOOK, PYTHONOPTIMIZE="1"),
    _call("-c", STATE, LC_ALL="C"),
    _call("-c", "import time; print(time.tzname)", TZ="UTC+3"),
    _call("-c", "import os; print(os.path.expanduser('~'))", HOME="/workspace"),
    _call("kill.py", "15"),
    _call("kill.py", "13"),
    _call("kill.py", "9"),
    _call("kill.py", "2"),
]
OTHERS += [
    _call("-m", "sets"),
    _call("-m", "nested"),
    _call("-c", FILES["nested.py"]),
    _call("-", stdin=FILES["nested.py"].encode()),
    _call("-", stdin=FILES["nested.py"].encode() + b"# " + b"x" * (2 << 20)),
    _call("-c", SETS),
    _call("-", stdin=SETS.encode()),
    _call("-m", "x", cwd="/workspace/typed"),
    _call("x.py", cwd="/workspace/typed"),
]
CALLS = [*SCRIPTS, *KINDS, *OTHERS]

BUFFERED = "process: {env: {PYTHONUNBUFFERED: !remove }}\n"
PRELOADED = "warm: {command: python3, preload: [random, json.tool]}\n"


def _env(**env: str) -> str:
    return "process: {env: {" + ", ".join(f"{name}: {value!r}" for name, value in env.items()) + "}}\n"


EVERYWHERE = [
    *(
        _call(*argv, stdin=stdin)
        for argv, stdin in (
            (("-c", LOOK + STREAMS + STATE), b"in"),
            (("-", "a"), (LOOK + STREAMS + STATE).encode()),
            (("look.py", "a"), None),
            (("-m", "pack", "a"), None),
            (("-m", "tree.sub"), None),
        )
    ),
    _call("names.py"),
    _call("-c", "import sys; print('half', end=''); assert not 1, 'asserted'; sys.exit('bye')"),
]
POLICIES = {
    # what extends the policy, and the calls
    "plain": ("", CALLS),
    "bare": (
        "warm: {command: python3, preload: [!remove json]}\n",
        [_call("-c", "import sys; print(sorted(sys.modules.keys() - {'_socket'}))")],
    ),
    "safe path": (_env(PYTHONSAFEPATH="1"), EVERYWHERE),
    "lang c": (_env(LANG="C"), [*EVERYWHERE, _call("-c", "import os; os.execvp('env', ['env'])")]),
    "lang c warned": (_env(LANG="C", PYTHONCOERCECLOCALE="warn"), EVERYWHERE[:1]),
    "lc ctype c": (_env(LC_CTYPE="C"), EVERYWHERE[:1]),
    "lc all c": (_env(LC_ALL="C"), EVERYWHERE),
    "ascii": (
        _env(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"),
        [*EVERYWHERE, _call("-c", "print('\u00e9')", "\u00e9")],
    ),
    "latin": (_env(PYTHONIOENCODING="latin-1:replace"), EVERYWHERE),
    "development": (_env(PYTHONDEVMODE="1"), EVERYWHERE),
    "faults": (_env(PYTHONFAULTHANDLER="1"), EVERYWHERE),
    "traced": (_env(PYTHONTRACEMALLOC="3"), EVERYWHERE),
    "errors": (_env(PYTHONWARNINGS="error"), [*EVERYWHERE, _call("warned.py")]),
    "wrong warnings": (_env(PYTHONWARNINGS="nonsense"), EVERYWHERE[:2]),
    "encoding warned": (_env(PYTHONWARNDEFAULTENCODING="1"), EVERYWHERE),
    "optimized": (_env(PYTHONOPTIMIZE="2"), EVERYWHERE),
    "inspected": (_env(PYTHONINSPECT="1"), EVERYWHERE),
    "not of the user": (_env(PYTHONNOUSERSITE="1"), EVERYWHERE),
    "no random": (
        _env(PYTHONHASHSEED="0"),
        [*EVERYWHERE, _call("sets.py"), _call("-c", "print({*'abcdefg'}, {'a', 'b', 'c'})")],
    ),
    "verbose": (_env(PYTHONVERBOSE="1"), []),
    "buffered": (BUFFERED, EVERYWHERE),
    "printing": (
        BUFFERED + "warm: {command: python3, preload: [this]}\n",
        [
            _call("-c", "print('mine')"),
            _call("-m", "this"),
            _call("-u", "-c", "print('mine')"),
            _call("kill.py", "9"),
        ],
    ),
    "preloaded": (
        PRELOADED,
        [
            *EVERYWHERE,
            _call("uses.py", cwd="/workspace/shadow"),
            _call("shadow/uses.py"),
            _call("-m", "uses", cwd="/workspace/shadow"),
            _call("-m", "random", cwd="/workspace/shadow"),
            _call("-c", "import random", cwd="/workspace/shadow"),
            _call("-", stdin=b"import random; print(random.random())", cwd="/workspace/shadow"),
            _call("uses.py", cwd="/workspace/package"),
            _call("-m", "json.tool", stdin=b"[1]"),
            _call("-m", "json"),
            _call("-m", "site", "--user-site"),
        ],
    ),
    "packages": ("warm: {command: python3, preload: [unittest]}\n", [_call("-m", "unittest", "-q", "none")]),
    "packages and main": (
        "warm: {command: python3, preload: [asyncio.__main__]}\n",
        [_call("-m", "asyncio", stdin=b"1 + 1")],
    ),
    "home": (_env(HOME="/workspace"), [*EVERYWHERE, _call("-c", "import of_the_user")]),
    "small files": (
        "limits: {file_size: 1KiB}\n",
        [
            *EVERYWHERE,
            _call("long.py"),
            _call("-m", "long"),
            _call("-c", FILES["long.py"]),
            _call("-", stdin=FILES["long.py"].encode()),
            _call("-", stdin=b"x = = 1\n" * 200_000),
            _call(
                "-", stdin=FILES["long.py"].encode() + FILES["nested.py"].encode() + b"# " + b"x" * (2 << 20)
            ),
        ],
    ),
}
