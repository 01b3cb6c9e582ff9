"""Compilers, make and git under the shipped ``build`` policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sandboxd.models import Bytes, Cause, Input

if TYPE_CHECKING:
    from pathlib import Path

    from daemons import Daemon

HELLO = '#include <stdio.h>\nint main(void) { puts("hello"); return 0; }\n'
MAKEFILE = """
all: $(patsubst %,p%,1 2 3 4 5 6 7 8)
p%: hello.c
\tgcc -O2 -o $@ $< && ./$@
install: p1
\tinstall -D p1 /usr/local/bin/hello
"""
CPP = r"""
#include <iostream>
#include <thread>
int main() { std::thread t([] { std::cout << "c++\n"; }); t.join(); }
"""
SOURCES = [
    Input(path="hello.c", content=Bytes(text=HELLO)),
    Input(path="Makefile", content=Bytes(text=MAKEFILE)),
    Input(path="x.cc", content=Bytes(text=CPP)),
]
SCRIPTS = {
    "gcc": "gcc -Wall -O2 hello.c && ./a.out",
    "static and debug": """
gcc -g -static -o s hello.c && ./s
gcc -c hello.c && ar rc l.a hello.o && ranlib l.a && nm l.a | grep -c main
""",
    "c++ with threads": "g++ -O1 -pthread -o x x.cc && ./x",
    "make -j4": "make -s -j4 all",
    "make install": "make -s p1 install && hello",
    "git": """
set -e
git init -q r; cd r; git config user.name n; git config user.email e@x
echo a > a; git add .; git commit -qm one
git checkout -q -b b; echo b >> a; git commit -qam two; git checkout -q -; git merge -q b; git log --format=%s
git gc -q; git clone -q . ../c; git -C ../c status --short; git fsck --no-progress
git diff HEAD~1 --stat | tail -1
""",
    "python": "python3 -c 'print(1 + 1)'",
    "patch": """
cp hello.c h.c; sed -i s/hello/bye/ h.c; diff -u hello.c h.c > d; patch -s hello.c < d
gcc hello.c && ./a.out
""",
}
EXPECTED = {
    "gcc": "hello\n",
    "static and debug": "hello\n1\n",
    "c++ with threads": "c++\n",
    "make -j4": "hello\n" * 8,
    "make install": "hello\nhello\n",
    "git": "two\none\n 1 file changed, 1 insertion(+)\n",
    "python": "2\n",
    "patch": "bye\n",
}


@pytest.mark.parametrize("what", SCRIPTS)
def test_building(daemon: Daemon, what: str) -> None:
    found = daemon.run("sh", "-c", SCRIPTS[what], policy="build", inputs=SOURCES)
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.exit_code) == (Cause.EXITED, 0), (found.outcome, found.stderr)
    assert found.stderr is not None
    assert (found.stderr.text, found.denials) == ("", [])
    assert found.stdout is not None
    assert found.stdout.text == EXPECTED[what]


def test_a_program_that_was_built_comes_back(daemon: Daemon, tmp_path: Path) -> None:
    found = daemon.run("sh", "-c", "mkdir out; gcc -o out/hello hello.c", policy="build", inputs=SOURCES)
    (artifact,) = daemon.client().save_artifacts(found.id, tmp_path)
    assert (artifact.path, artifact.executable) == ("out/hello", True)
    assert (tmp_path / "out/hello").read_bytes()[:4] == b"\x7fELF"


def test_a_compiler_error_is_the_tools_own_affair(daemon: Daemon) -> None:
    found = daemon.run("gcc", "-x", "c", "-", policy="build", stdin=b"int main(void) { return x; }\n")
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.exit_code) == (Cause.EXITED, 1)
    assert found.stderr is not None
    assert "undeclared" in (found.stderr.text or "")
