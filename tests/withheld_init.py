"""A PID 1 that speaks the protocol and leaves something out: one program for each thing, its *variant*.

Made of the text of the real one, so that it stays as like it as can be: each edit must fit exactly once.
It is compiled once; the variants differ in the word that follows ``MARK``, for no runtime of ours passes
arguments to PID 1.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from sandboxd.init import SOURCES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

VARIANTS = (
    "seccomp", "no_new_privs", "capabilities", "user", "group", "groups", "umask", "oom_score_adj", "rlimits",
    "parent",
)  # fmt: skip
MARK = b"variant:"
ROOM = 24  # bytes of its word
IS = f"""
static const volatile char variant[] = "{MARK.decode()}{"." * ROOM}";
#define IS(name) (strcmp((const char *)variant + {len(MARK)}, name) == 0)
"""
GLOBALS = f"""{IS}
#define SYS_ADMIN (IS("no_new_privs") ? 1u << CAP_SYS_ADMIN : 0)
static struct sock_filter open_filter[] = {{BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)}};
"""
BEFORE = "static int timer"
IDS = """umask(IS("umask") ? 0 : setup.umask);
    prctl(PR_SET_KEEPCAPS, IS("no_new_privs"), 0, 0, 0);
    setup.uid += IS("user");
    setup.gid += IS("group");
    gid_t extra[] = {7};"""
PROGRAM = """if (IS("seccomp"))
        program = (struct sock_fprog){.len = 1, .filter = open_filter};
    unsigned flags ="""
FORK = """pid_t pid = fork();
    if (pid == 0 && IS("parent") && fork() != 0)
        while (1)
            pause(); /* whose child the tool process then is */"""
START = "1u << CAP_SETUID | 1u << CAP_SETGID | 1u << CAP_KILL"
NO_NEW_PRIVS = "prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0"
EDITS = (
    ("pid_t pid = fork();", FORK),
    ("if (prctl(PR_CAPBSET_DROP,", 'if (!IS("capabilities") && prctl(PR_CAPBSET_DROP,'),
    (f"drop_capabilities({START})", f"drop_capabilities({START} | SYS_ADMIN)"),
    (f"|| {NO_NEW_PRIVS})", f'|| (!IS("no_new_privs") && {NO_NEW_PRIVS}))'),
    (f"if ({NO_NEW_PRIVS})", f'if (!IS("no_new_privs") && {NO_NEW_PRIVS})'),
    ("if (setrlimit(", 'if (!IS("rlimits") && setrlimit('),
    ("umask(setup.umask);", IDS),
    ("setgroups(0, NULL)", 'setgroups(IS("groups"), extra)'),
    ("drop_capabilities(0)", "drop_capabilities(SYS_ADMIN)"),
    ("drop_capabilities(1u << CAP_KILL);", "drop_capabilities(1u << CAP_KILL | SYS_ADMIN);"),
    ("unsigned flags =", PROGRAM),
    ("setup.oom_score_adj);", 'IS("oom_score_adj") ? 100 : setup.oom_score_adj);'),
)


def compiled(
    source: Path, edits: Sequence[tuple[str, str]], before: str, text: str, compiler: str = "cc"
) -> bytes:
    """The program of an edited source, ``text`` put before ``before``."""
    code = source.read_text()
    for old, new in edits:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    at = code.index(before)
    with TemporaryDirectory() as directory:
        edited, target = Path(directory, "edited.c"), Path(directory, "program")
        edited.write_text(code[:at] + text + code[at:])
        subprocess.run([compiler, "-static", "-O1", "-o", target, edited], check=True, timeout=600)
        return target.read_bytes()


def write_variants(program: bytes, directory: Path, name: str, variants: Iterable[str]) -> None:
    """``NAME-without-VARIANT`` for each."""
    old = MARK + b"." * ROOM
    assert program.count(old) == 1
    for variant in variants:
        target = directory / f"{name}-without-{variant}"
        target.write_bytes(program.replace(old, MARK + variant.encode().ljust(ROOM, b"\0")))
        target.chmod(0o755)


def build_init(directory: Path) -> None:
    """Make ``init-without-VARIANT`` for each of ``VARIANTS``."""
    write_variants(compiled(SOURCES / "init.c", EDITS, BEFORE, GLOBALS), directory, "init", VARIANTS)
