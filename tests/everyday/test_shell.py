"""What people do all day in a shell has to work, and nothing of it may be denied."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import pytest

from sandboxd.models import Bytes, Cause, Input

if TYPE_CHECKING:
    from pathlib import Path

    from daemons import Daemon

    from sandboxd.models import Invocation


def passes(found: Invocation, code: int = 0) -> str:
    """What it printed, if it ended well, said nothing on standard error, and nothing was denied."""
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.exit_code) == (Cause.EXITED, code), (
        found.outcome,
        found.stderr,
    )
    assert found.stderr is not None
    assert (found.stderr.text, found.denials, found.limits_reached) == ("", [], [])
    assert found.stdout is not None
    return found.stdout.text or ""


SCRIPTS = {
    "a pipeline": r"""
printf 'b 2\na 1\nc 3\n' | sort | awk '{s += $2; print $1} END {print s}' | tr '\n' ' '
seq 100000 | grep -c 7
yes | head -n 5 | wc -l
""",
    "jobs and waiting": """
for i in 1 2 3; do (sleep 0.05; exit $i) & p=$!; wait $p; printf '%s ' $?; done
trap 'echo caught' TERM; kill $$
timeout 0.1 sleep 5; echo $?
""",
    "here documents and substitution": """
x=$(cat <<E
in
E
)
echo $x $((2 ** 10))
diff <(seq 3) <(seq 3) && echo same
""",
    "files": """
set -e
mkdir -p a/b; echo x > a/b/f; cp -a a c; ln -s b a/l; ln a/b/f hard; mv c d; find . -name f | sort
chmod 640 hard; stat -c %a hard; touch -d 2001-02-03 t; date -r t +%Y
rm -r a d; df -P . | tail -1 | wc -l
mkfifo p; (echo through > p &) ; cat p
split -b 1 hard; ls x*
mktemp -d | cut -c1-5; du -s . >/dev/null
""",
    "text tools": r"""
echo '{"a": [1, 2]}' | jq -c '.a[1]'
echo hello | sed s/l/L/g | rev
echo aGk= | base64 -d; echo
printf x | sha256sum | cut -c1-8
paste <(seq 2) <(seq 3 4)
printf 'a,b\n' | cut -d, -f2
xargs -n1 echo <<< 'p q'
""",
    "tar and gzip": """
set -e
mkdir d; seq 20000 > d/n; echo x > 'd/a b'
tar czf d.tgz d; mkdir o; tar xzf d.tgz -C o; diff -r d o/d
gzip -k d/n; gzip -dc d/n.gz | cmp - d/n
xz -k d/n; xz -dc d/n.xz | cmp - d/n
bzip2 -k d/n; bunzip2 -c d/n.bz2 | cmp - d/n
tar cf - d | tar tf - | wc -l
""",
    "a terminal of one's own": r"""
script -qec 'tty; stty size' /dev/null </dev/null | tr -d '\r' | head -1
""",
    "who and where": """
id -un; id -u; pwd; hostname; uname -s; nproc >/dev/null; umask; echo $HOME; test -w ~ && echo w
""",
    "perl": """
perl -e 'print join(",", map {$_ ** 2} 1..4), "\\n"; open F, "-|", "echo piped"; print <F>;'
""",
}
EXPECTED = {
    "a pipeline": "a b c 6 40951\n5\n",
    "jobs and waiting": "1 2 3 caught\n124\n",
    "here documents and substitution": "in 1024\nsame\n",
    "files": "./a/b/f\n./d/b/f\n640\n2001\n1\nthrough\nxaa\nxab\n/tmp/\n",
    "text tools": "2\noLLeh\nhi\n2d711642\n1\t3\n2\t4\nb\np\nq\n",
    "tar and gzip": "6\n",
    "a terminal of one's own": "/dev/pts/0\n",
    "who and where": "sandbox\n1000\n/workspace\nsandbox\nLinux\n0022\n/tmp\nw\n",
    "perl": "1,4,9,16\npiped\n",
}


@pytest.mark.parametrize("policy", ["default", "shell"])
@pytest.mark.parametrize("what", SCRIPTS)
def test_in_a_shell(daemon: Daemon, what: str, policy: str) -> None:
    assert passes(daemon.run("bash", "-c", SCRIPTS[what], policy=policy)) == EXPECTED[what]


def test_a_small_computation_under_strict(daemon: Daemon) -> None:
    script = "seq 1000 | awk '{s += $1} END {print s}'; echo x > f; cat f; ls; sort <<< b; "
    script += "head -c 3 /dev/urandom | wc -c"
    assert passes(daemon.run("bash", "-c", script, policy="strict")) == "500500\nx\nf\nb\n3\n"


def test_every_exit_code(daemon: Daemon, tmp_path: Path) -> None:
    for code in (0, 1, 2, 63, 64, 124, 125, 126, 127, 128, 137, 254, 255):
        assert passes(daemon.run("sh", "-c", f"exit {code}"), code) == ""
    for code in (0, 3, 255):
        found = daemon.cli("--", "sh", "-c", f"exit {code}")
        assert (found.returncode, found.stdout, found.stderr) == (code, b"", b"")


def test_a_hundred_megabytes_through_stdin_to_stdout(daemon: Daemon) -> None:
    block = os.urandom(1 << 20)
    data = block * 100
    found = daemon.cli("--policy", "loud", "-i", "--", "cat", stdin=data)
    assert found.returncode == 0, found.stderr
    assert len(found.stdout) == len(data)
    assert hashlib.sha256(found.stdout).digest() == hashlib.sha256(data).digest()


def test_a_stream_of_standard_input(daemon: Daemon) -> None:
    client = daemon.client()
    call = client.start(["sh", "-c", "while read -r line; do echo got $line; done; echo end"], stdin="stream")
    offset = client.write_stdin(call.id, b"one\n", eof=False)
    with client.stdout(call.id, follow=True) as output:
        assert next(output) == b"got one\n"
        assert client.write_stdin(call.id, b"two\nthree\n", offset=offset) == 14
        assert b"".join(output) == b"got two\ngot three\nend\n"
    assert passes(client.wait(call.id)) == "got one\ngot two\ngot three\nend\n"


def test_standard_input_in_every_form(daemon: Daemon) -> None:
    assert passes(daemon.run("cat")) == ""
    assert passes(daemon.run("cat", stdin=b"some\n")) == "some\n"
    assert passes(daemon.run("wc", "-c", stdin=b"")) == "0\n"
    data = bytes(range(256)) * 4096
    digest = hashlib.sha256(data).hexdigest()
    assert passes(daemon.run("sha256sum", stdin=data)) == f"{digest}  -\n"
    found = daemon.cli("--", "cat", stdin=b"not asked for")
    assert (found.returncode, found.stdout) == (0, b"")
    assert daemon.cli("-i", "--", "cat", stdin=b"asked for").stdout == b"asked for"


def test_scripts_of_the_callers_own(daemon: Daemon, tmp_path: Path) -> None:
    inputs = [
        Input(path="bin/run", content=Bytes(text='#!/bin/sh -e\necho "$0 $1"; cat data/x\n'), mode=0o755),
        Input(path="data/x", content=Bytes(text="content\n")),
        Input(path="count", content=Bytes(text="#!/usr/bin/awk -f\nBEGIN { print 6 * 7 }\n"), mode=0o755),
    ]  # fmt: skip
    assert passes(daemon.run("bin/run", "arg", inputs=inputs)) == "bin/run arg\ncontent\n"
    assert passes(daemon.run("./count", inputs=inputs)) == "42\n"
    assert (
        passes(daemon.run("stat", "-c", "%U %a", "data/x", "bin/run", inputs=inputs))
        == "sandbox 644\nsandbox 755\n"
    )
    (tmp_path / "tool").write_text("#!/bin/sh\necho from the caller\n")
    (tmp_path / "tool").chmod(0o755)
    found = daemon.cli("--input", f"{tmp_path}/tool:bin/tool", "--", "bin/tool")
    assert (found.returncode, found.stdout) == (0, b"from the caller\n")


def test_artifacts_come_back(daemon: Daemon, tmp_path: Path) -> None:
    code = "mkdir -p out/deep; seq 10 > out/deep/n; printf '#!/bin/sh\\n' > out/run; chmod +x out/run"
    options = ["--policy", "shell", "--artifacts", str(tmp_path / "got")]
    found = daemon.cli(*options, "--", "sh", "-c", code)
    assert (found.returncode, found.stderr) == (0, b"")
    assert [path.read_text() for path in (tmp_path / "got").rglob("n")] == [
        "".join(f"{n}\n" for n in range(1, 11))
    ]
    (run,) = (tmp_path / "got").rglob("run")
    assert os.access(run, os.X_OK)


def test_programs_of_the_host(daemon: Daemon) -> None:
    assert passes(
        daemon.run("sh", "-c", "echo from the host | tr a-z A-Z; ls / | grep -c .", policy="host")
    ).startswith("FROM THE HOST\n")


def test_a_large_environment_and_a_labelled_call(daemon: Daemon) -> None:
    env = {f"V{number}": "x" * 500 for number in range(500)}
    found = daemon.run("sh", "-c", "env | grep -c ^V", env=env, labels={"what": "environment"})
    assert passes(found) == "500\n"
    assert found.labels == {"what": "environment"}
