"""Python with its usual libraries under the shipped ``python`` policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sandboxd.models import Bytes, Cause, Input

if TYPE_CHECKING:
    from pathlib import Path

    from daemons import Daemon

    from sandboxd.models import Invocation


def passes(found: Invocation) -> str:
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.exit_code) == (Cause.EXITED, 0), (found.outcome, found.stderr)
    assert found.stderr is not None
    assert (found.stderr.text, found.denials, found.limits_reached) == ("", [], [])
    assert found.stdout is not None
    return found.stdout.text or ""


SCRIPTS = {
    "threads": """
import threading, queue
q = queue.Queue()
threads = [threading.Thread(target=lambda n=n: q.put(n * n)) for n in range(32)]
[t.start() for t in threads]; [t.join() for t in threads]
print(sum(q.get() for _ in threads))
""",
    "subprocesses": """
import subprocess
assert subprocess.run(["sh", "-c", "cat; exit 3"], input=b"in", capture_output=True).stdout == b"in"
with subprocess.Popen(["sleep", "9"]) as p: p.terminate(); print(p.wait())
print(subprocess.check_output("echo $((1+1))", shell=True, text=True).strip())
""",
    "multiprocessing": """
import multiprocessing as m, concurrent.futures as f, os
if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        context = m.get_context(method)
        with context.Pool(2) as pool: print(pool.map(abs, [-1, -2]))
        q = context.Queue(); q.put(method); print(q.get())
    with f.ProcessPoolExecutor(2) as pool: print(list(pool.map(abs, [-3])))
    from multiprocessing import shared_memory
    s = shared_memory.SharedMemory(create=True, size=100); s.buf[0] = 7; print(s.buf[0])
    s.close(); s.unlink()
""",
    "sqlite": """
import sqlite3
db = sqlite3.connect("x.db"); print(db.execute("pragma journal_mode=wal").fetchone())
db.execute("create table t(a, b)")
db.executemany("insert into t values(?, ?)", [(i, str(i)) for i in range(1000)])
db.commit(); print(db.execute("select count(*), sum(a) from t").fetchone())
db.execute("vacuum"); db.close()
""",
    "temporary files": """
import tempfile, os, shutil, mmap, pathlib, zipfile, tarfile
with tempfile.TemporaryDirectory() as d:
    p = pathlib.Path(d, "f"); p.write_text("x" * 10000); shutil.copytree(d, d + "/../copy")
    print(len(list(pathlib.Path(d).iterdir())))
with tempfile.TemporaryFile() as f:
    f.write(bytes(4096)); f.flush(); m = mmap.mmap(f.fileno(), 0); m[0] = 1; print(m[0]); m.close()
with tempfile.NamedTemporaryFile() as f: print(os.path.exists(f.name))
zipfile.ZipFile("z.zip", "w").writestr("a", "b"); print(zipfile.ZipFile("z.zip").read("a"))
""",
    "asyncio": """
import asyncio
async def main():
    server = await asyncio.start_server(lambda r, w: (w.write(b"hi"), w.close()), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    print(await reader.read())
    p = await asyncio.create_subprocess_exec("echo", "sub", stdout=asyncio.subprocess.PIPE)
    print((await p.communicate())[0])
    print(await asyncio.gather(*[asyncio.to_thread(abs, -n) for n in range(5)]))
    try: await asyncio.wait_for(asyncio.sleep(5), 0.05)
    except TimeoutError: print("late")
asyncio.run(main())
""",
    "ssl and hashes": """
import ssl, hashlib, secrets, uuid, hmac
print(ssl.create_default_context().verify_mode, len(ssl.create_default_context().get_ca_certs()) > 10)
print(hashlib.sha256(b"x").hexdigest()[:8], len(secrets.token_bytes(9)), uuid.uuid4().version)
""",
    "signals and time": """
import signal, time, os, datetime, zoneinfo, locale, resource, getpass
signal.signal(signal.SIGALRM, lambda *a: print("alarm"))
signal.setitimer(signal.ITIMER_REAL, 0.02); time.sleep(0.1)
print(datetime.datetime.now(datetime.timezone.utc).year > 2000, getpass.getuser())
print(locale.getpreferredencoding().lower())
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); print(resource.getrlimit(resource.RLIMIT_NOFILE))
""",
    "names are text": """
import os, sys
open("\\u00fcml\\u00e4ut", "w").write("\\u4f60\\u597d")
print(sorted(os.listdir()), sys.getfilesystemencoding(), sys.stdout.encoding)
""",
    "numpy": """
import numpy as np
a = np.random.default_rng(1).random((300, 300))
print((a @ np.linalg.inv(a)).trace().round()); print(np.fft.fft(np.ones(8))[0].real)
np.save("a.npy", a); print(np.load("a.npy", mmap_mode="r").shape)
""",
    "pandas": """
import pandas as pd
f = pd.DataFrame({"k": list("abab"), "v": range(4)}); f.to_csv("f.csv", index=False)
print(pd.read_csv("f.csv").groupby("k").v.sum().to_dict())
""",
    "yaml and requests": """
import yaml, requests
print(yaml.safe_load("a: [1, 2]"))
try: requests.get("http://127.0.0.1:9/", timeout=2)
except requests.ConnectionError: print("refused")
""",
}  # fmt: skip
EXPECTED = {
    "threads": "10416\n",
    "subprocesses": "-15\n2\n",
    "multiprocessing": "[1, 2]\nfork\n[1, 2]\nspawn\n[1, 2]\nforkserver\n[3]\n7\n",
    "sqlite": "('wal',)\n(1000, 499500)\n",
    "temporary files": "1\n1\nTrue\nb'b'\n",
    "asyncio": "b'hi'\nb'sub\\n'\n[0, 1, 2, 3, 4]\nlate\n",
    "ssl and hashes": "2 True\n2d711642 9 4\n",
    "signals and time": "alarm\nTrue sandbox\nutf-8\n(64, 64)\n",
    "names are text": "['script.py', 'ümläut'] utf-8 utf-8\n",
    "numpy": "300.0\n8.0\n(300, 300)\n",
    "pandas": "{'a': 2, 'b': 4}\n",
    "yaml and requests": "{'a': [1, 2]}\nrefused\n",
}


@pytest.mark.parametrize("what", SCRIPTS)
def test_python(daemon: Daemon, what: str) -> None:
    # A file, as `spawn` imports it again in each process.
    script = [Input(path="script.py", content=Bytes(text=SCRIPTS[what]))]
    assert passes(daemon.run("python3", "script.py", policy="python", inputs=script)) == EXPECTED[what]


def test_a_result_is_given_back(daemon: Daemon, tmp_path: Path) -> None:
    code = "import os; os.mkdir('out'); open('out/r.csv', 'w').write('a,b\\n1,2\\n'); print('done')"
    found = daemon.run("python", "-c", code, policy="python")
    assert passes(found) == "done\n"
    daemon.client().save_artifacts(found.id, tmp_path)
    assert (tmp_path / "out/r.csv").read_text() == "a,b\n1,2\n"


def test_an_exception_is_the_tools_own_affair(daemon: Daemon) -> None:
    found = daemon.run("python3", "-c", "raise RuntimeError('mine')", policy="python")
    assert found.outcome is not None
    assert (found.outcome.cause, found.outcome.exit_code) == (Cause.EXITED, 1)
    assert found.stderr is not None
    assert "RuntimeError: mine" in (found.stderr.text or "")


def test_pip_says_what_is_wrong_and_a_venv_can_be_made(daemon: Daemon) -> None:
    code = "python3 -m venv --without-pip v && v/bin/python -c 'import sys; print(sys.prefix)'"
    assert passes(daemon.run("sh", "-c", code, policy="python")) == "/workspace/v\n"
    found = daemon.run("pip", "--version", policy="python")
    assert passes(found).startswith("pip ")
