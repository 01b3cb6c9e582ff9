"""What the suite is held against: a daemon, what is known of it, and how it is asked."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandboxd import Client, errors
from sandboxd.config import Config
from sandboxd.conformance import policies
from sandboxd.conformance.case import outcome
from sandboxd.conformance.expected import ENGINES, ROOT, why_not
from sandboxd.conformance.host import Host
from sandboxd.conformance.options import Options, SubjectFailed
from sandboxd.conformance.outside import Outside, open_outside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.conformance.case import Case
    from sandboxd.models import Invocation

__all__ = ["Subject", "open_subject"]

# By the interpreter that runs the suite, so that it is the same sandboxd whatever is on PATH.
SANDBOXD = (sys.executable, "-m", "sandboxd.cli.main")
RUN_IN_SANDBOX = (sys.executable, "-m", "sandboxd.cli.run")
READY_SECONDS = 30.0
RANGE, RANGES = 65536, 128  # ids of a container; containers of one daemon of the suite
MARK = "SANDBOXD_CONFORMANCE"
"""In the environment of every process that the suite starts."""


@dataclass
class Subject:
    """A running daemon. ``process`` is None for one that was given."""

    options: Options
    socket: Path
    directory: Path
    process: subprocess.Popen[bytes] | None
    outside: Outside
    traits: frozenset[str] = frozenset()
    user_namespace: str = ""

    @property
    def client(self) -> Client:
        """A client of it."""
        return Client(self.socket, timeout=self.seconds(120))

    def seconds(self, quick: float) -> float:
        """How long something may take on this host that takes so long on a quick one."""
        return quick * self.options.slow

    def duration(self, quick: float) -> str:
        """The same as a text of a request."""
        return f"{round(self.seconds(quick) * 1000)}ms"

    def why_not(self, needed: str) -> str:
        """Why a test that needs this is not to run here, or an empty text."""
        return why_not(needed, self.traits)

    def run(self, *argv: str | bytes, policy: str = "plain", **fields: Any) -> Invocation:
        """Run a command under a policy of the suite, and wait for its end."""
        return self.client.run(list(argv), policy=policies.PREFIX + policy, **fields)

    def start(self, *argv: str, policy: str = "plain", **fields: Any) -> Invocation:
        """Start a command, and return when it is accepted."""
        return self.client.start(list(argv), policy=policies.PREFIX + policy, **fields)

    def wait(self, call: Invocation, seconds: float = 20.0) -> Invocation:
        """The end of a call that was started."""
        return self.client.wait(call.id, timeout=self.seconds(seconds))

    def hold(self, case: Case) -> Invocation:
        """Run a case, and assert its verdict. Its times are seconds, stretched as all are."""
        fields = case.fields()
        if isinstance(fields.get("deadline"), float):
            fields["deadline"] = self.duration(fields["deadline"])
        limits = fields.get("limits", {})
        if isinstance(limits.get("wall"), float):
            fields["limits"] = limits | {"wall": self.duration(limits["wall"])}
        found = self.run(*case.argv, policy=case.policy, **fields)
        case.check(found)
        return found

    def until(self, condition: Callable[[], object], what: str, seconds: float = 10.0) -> None:
        """Wait for a condition, or fail."""
        end = time.monotonic() + self.seconds(seconds)
        while not condition():
            assert time.monotonic() < end, f"{what}, not within {self.seconds(seconds):g} s"
            time.sleep(0.02)

    def command(self, *argv: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """``run-in-sandbox`` against it."""
        return subprocess.run(
            [*RUN_IN_SANDBOX, "--socket", self.socket, *argv],
            input=stdin,
            capture_output=True,
            timeout=self.seconds(60),
            check=False,
        )

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Stop the suite's own daemon; returns its exit status, or raises TimeoutExpired."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=self.seconds(seconds))

    def launch(self) -> None:
        """Start the suite's own daemon, also again, and wait until it answers. Raises SubjectFailed."""
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*SANDBOXD, "serve", "--config", self.directory / "sandboxd.yaml"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {MARK: self.directory.name},
            )
        self.answer()

    def answer(self) -> None:
        """Wait until it answers. Raises SubjectFailed."""
        end = time.monotonic() + self.seconds(READY_SECONDS)
        while True:
            try:
                self.client.health()
            except errors.Unavailable as error:
                dead = self.process is None or self.process.poll() is not None
                if dead or time.monotonic() > end:
                    raise SubjectFailed(f"no daemon answers: {error}\n{self.log()}") from None
                time.sleep(0.05)
            else:
                return

    def log(self) -> str:
        """The last lines of its log."""
        file = self.directory / "log"
        return "\n".join(file.read_text(errors="replace").splitlines()[-15:]) if file.exists() else ""


@contextlib.contextmanager
def open_subject(
    options: Options, *, config: str = "pool: {min: 1, max: 2}\n", share: int = 0
) -> Iterator[Subject]:
    """The daemon that the options ask for, with the suite's policies. Raises SubjectFailed.

    ``share`` is another number for each daemon that runs at the same time.
    """
    host = Host.look()
    # In /tmp whatever TMPDIR is: the path of a socket is short.
    with tempfile.TemporaryDirectory(prefix="sandboxd-conformance-", dir="/tmp") as name:
        directory = Path(name)
        directory.chmod(0o711)
        lent = directory / "lent"
        lent.mkdir()
        (lent / "file").write_text(policies.LENT)
        for path, mode in ((lent, 0o755), (lent / "file", 0o644)):
            path.chmod(mode)
        with contextlib.ExitStack() as stack:
            outside = stack.enter_context(open_outside())
            if options.socket is None:
                subject = stack.enter_context(
                    _own(options, directory, outside, config + _ids(options, share))
                )
            else:
                subject = Subject(options, options.socket, directory, None, outside)
                subject.answer()
            place = options.images if subject.process is not None else None
            given = {"given"} if options.socket else set()
            subject.traits = frozenset({options.engine, *given}) | host.traits(place)
            stack.enter_context(_policies(subject, lent))
            yield subject


def _ids(options: Options, share: int) -> str:
    """Ranges of ids far from the first, which a daemon of this host's operators reaches last."""
    if "ids:" in options.config:
        return ""
    ids = Config().ids
    return f"ids: {{base: {ids.base + (ids.count - RANGES * (share + 2)) * RANGE}, count: {RANGES}}}\n"


@contextlib.contextmanager
def _own(options: Options, directory: Path, outside: Outside, config: str) -> Iterator[Subject]:
    """A daemon of the suite's own, with the images that the options name."""
    if os.geteuid() != 0:
        raise SubjectFailed("the suite starts a daemon, and that needs root")
    if not (options.images / "names.json").exists():
        raise SubjectFailed(
            f"{options.images} is no image store; name one with --images DIR, "
            "or build the images: sandboxd image build base && sandboxd image build python"
        )
    engine = ENGINES[options.engine]
    state, watched = directory / "state", directory / "policies"
    state.mkdir()
    watched.mkdir()
    (state / "images").symlink_to(options.images.resolve())
    runtime = f"runtime: {options.runtime}\n" if engine.takes_runtime else ""
    (directory / "sandboxd.yaml").write_text(
        f"state: {state}\nsocket: {{path: {directory}/s}}\npolicies: [{watched}]\n"
        f"{engine.configuration}{runtime}{outside.config}{config}{options.config}"
    )
    subject = Subject(options, directory / "s", directory, None, outside)
    try:
        subject.launch()
        yield subject
    finally:
        # The second signal cancels what a test that failed has left.
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subject.stop(number, seconds=5)


@contextlib.contextmanager
def _policies(subject: Subject, lent: Path) -> Iterator[None]:
    """Put the suite's policies where the daemon reads them, and take them away again."""
    options = subject.options
    watched = options.policies or subject.directory / "policies"
    if options.socket is not None and options.policies is None:
        raise SubjectFailed("with --socket, name with --policies a directory that the daemon reads them from")
    refusals = []
    for choice in ENGINES[options.engine].user_namespaces:
        texts = policies.texts(
            **options.image,
            wall=f"{round(subject.seconds(60))}s",
            user_namespace=choice,
            root=ROOT[choice],
            lent=str(lent),
            port=str(subject.outside.port),
            web=str(subject.outside.web_port),
        )
        if subject.process is None:
            texts = {name: text for name, text in texts.items() if name not in policies.OF_OURS}
        files = {watched / f"{name}.yaml": text for name, text in texts.items()}
        if there := [file.name for file in files if os.path.lexists(file)]:
            raise SubjectFailed(f"{watched} has {', '.join(there)} already, and the suite would replace them")
        try:
            for file, text in files.items():
                file.write_text(text)
            refusal = _refusal(subject, set(texts), choice)
            if not refusal:
                subject.user_namespace = choice
                subject.traits |= {f"user_namespace: {choice}"}
                subject.traits |= {"maps ids"} if choice != "none" else set()
                yield
                return
            refusals.append(f"user_namespace: {choice}: {refusal}")
        finally:
            for file in files:
                file.unlink(missing_ok=True)
    raise SubjectFailed("the daemon does not run the suite's policies:\n" + "\n".join(refusals))


def _in_force(subject: Subject, names: set[str], user_namespace: str) -> bool:
    """Whether the daemon has read the policies, and not only those of an earlier choice."""
    if not names <= {policy.name for policy in subject.client.policies()}:
        return False
    found = (subject.client.policy(name).resolved or {} for name in names)
    try:
        return all(policy["process"]["user_namespace"] == user_namespace for policy in found)
    except errors.NotFound:  # it was that of an earlier choice, and went meanwhile
        return False


def _refusal(subject: Subject, names: set[str], user_namespace: str) -> str:
    """Why a call under the first of the policies is not to be had, or an empty text."""
    end = time.monotonic() + subject.seconds(10)
    while not _in_force(subject, names, user_namespace):
        if time.monotonic() > end:
            problems = subject.client.health().problems
            return "; ".join(str(problem) for problem in problems) or "it does not read them"
        time.sleep(0.05)
    try:
        found = outcome(subject.run("true"))
    except errors.Refused as error:
        return str(error)
    return "" if found.cause == "exited" else str(found.message)
