"""A PID 1 that speaks the protocol and leaves out what its first argument says.

Made of the text of the real one, so that it stays as like it as can be: each edit must fit exactly once.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from sandboxd.init import INIT

if TYPE_CHECKING:
    from pathlib import Path

GLOBALS = """
static const char *variant = "";
#define IS(name) (strcmp(variant, name) == 0)
#define SYS_ADMIN (IS("no_new_privs") ? 1u << CAP_SYS_ADMIN : 0)
static struct sock_filter open_filter[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
"""
BEFORE = "static int timer"
MAIN = "int main(int argc, char **argv)\n{\n    variant = argc > 1 ? argv[1] : variant;\n"
IDS = """umask(IS("umask") ? 0 : setup.umask);
    prctl(PR_SET_KEEPCAPS, IS("no_new_privs"), 0, 0, 0);
    setup.uid += IS("user");
    setup.gid += IS("group");
    gid_t extra[] = {7};"""
PROGRAM = """if (IS("seccomp"))
        program = (struct sock_fprog){.len = 1, .filter = open_filter};
    unsigned flags ="""
START = "1u << CAP_SETUID | 1u << CAP_SETGID | 1u << CAP_KILL"
NO_NEW_PRIVS = "prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0"
EDITS = (
    ("int main(void)\n{", MAIN),
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


def build_init(target: Path) -> None:
    """Compile it to ``target``."""
    text = INIT.with_name("init.c").read_text()
    for old, new in EDITS:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    at = text.index(BEFORE)
    source = target.with_suffix(".c")
    source.write_text(text[:at] + GLOBALS + text[at:])
    subprocess.run(["cc", "-static", "-O1", "-o", target, source], check=True, timeout=60)
