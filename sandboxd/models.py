"""The wire types: what goes over the socket, into the journal, and out of ``--json``.

Times are integer microseconds since the Unix epoch, durations integer microseconds, sizes bytes.
Bytes are never assumed to be text: see ``Content``.
"""

from __future__ import annotations

import base64
import signal as signals
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)

from sandboxd import canonical, units

__all__ = [
    "Artifact",
    "Bytes",
    "CallerInfo",
    "Cause",
    "Content",
    "Control",
    "Denial",
    "DigestRef",
    "Event",
    "Failure",
    "Health",
    "ImageInfo",
    "Input",
    "Invocation",
    "InvocationList",
    "LimitReached",
    "Narrowing",
    "Outcome",
    "PlanDocument",
    "PolicyInfo",
    "PolicyProblem",
    "Problem",
    "Receipt",
    "Request",
    "SecretInfo",
    "SecretUse",
    "SlotInfo",
    "State",
    "Times",
    "Usage",
    "Withheld",
]

MAX_ARGV = 4096  # items; the kernel bounds the bytes (E2BIG)
MAX_ARG = 131_071  # MAX_ARG_STRLEN - 1, execve(2)
MAX_ENV = 1024
MAX_INPUTS = 4096
MAX_LABELS = 64
MAX_PATH = 4095


class Wire(BaseModel):
    """The base of every wire type: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", validate_by_name=True)


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    return value


def _absolute(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("must be an absolute path, such as /workspace")
    return value


def _duration(value: object) -> object:
    return units.parse_duration(value) if isinstance(value, str) else value


def _size(value: object) -> object:
    return units.parse_size(value) if isinstance(value, str) else value


def _count(value: object) -> object:
    return units.parse_count(value) if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_no_nul)]
Duration = Annotated[int, BeforeValidator(_duration), Field(gt=0, le=units.MAX)]
"""Microseconds; a text with a unit (``"1.5s"``) is accepted too."""
Size = Annotated[int, BeforeValidator(_size), Field(ge=0, le=units.MAX)]
"""Bytes; a text with a unit (``"64MiB"``) is accepted too."""
Count = Annotated[int, BeforeValidator(_count), Field(gt=0, le=units.MAX)]


class Bytes(Wire):
    """Bytes on the wire: exactly one of ``text`` (valid UTF-8) and ``base64``."""

    text: str | None = None
    base64: str | None = None
    _decoded: bytes | None = PrivateAttr(None)  # decoding tens of MiB once is slow enough

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.text is None) == (self.base64 is None):
            raise ValueError("give exactly one of text and base64")
        if self.base64 is not None:
            try:
                self._decoded = base64.b64decode(self.base64, validate=True)
            except ValueError:
                raise ValueError("base64 is not valid base64") from None
        return self

    def decode(self) -> bytes:
        """The bytes themselves."""
        if self.text is not None:
            return self.text.encode("utf-8", "surrogatepass")
        return base64.b64decode(self.base64 or "") if self._decoded is None else self._decoded

    @classmethod
    def of(cls, data: bytes) -> Self:
        """The wire form of bytes: text when they are valid UTF-8."""
        try:
            return cls(text=data.decode())
        except UnicodeDecodeError:
            return cls(base64=base64.b64encode(data).decode())


class Content(Bytes):
    """A stream or a file. ``text``/``base64`` hold its head; ``size`` and ``digest`` speak of all of it.

    ``complete`` is false when the head is shorter than what is stored (fetch the rest by its own URL);
    ``truncated`` is true when the tool made more than the policy keeps, ``dropped`` bytes of it.
    """

    size: int
    digest: str
    complete: bool = True
    truncated: bool = False
    dropped: int = 0


class Input(Wire):
    """One file that is put into the workspace before the call starts."""

    path: Annotated[Text, Field(min_length=1, max_length=MAX_PATH)]
    """Relative to the workspace; no empty, ``.`` or ``..`` component."""
    content: Bytes
    mode: Annotated[int, Field(ge=0, le=0o777)] = 0o644


class Narrowing(Wire):
    """Limits that a request lowers below its policy's. A value above the policy's is refused."""

    wall: Duration | None = None
    cpu_time: Duration | None = None
    cpus: Annotated[float, Field(gt=0, le=1000)] | None = None
    memory: Size | None = None
    pids: Count | None = None
    stdout: Size | None = None
    stderr: Size | None = None


class Request(Wire):
    """What a caller asks for."""

    argv: Annotated[
        list[Annotated[Text, Field(max_length=MAX_ARG)] | Bytes], Field(min_length=1, max_length=MAX_ARGV)
    ]
    policy: Annotated[Text, Field(min_length=1, max_length=128)] = "default"
    env: Annotated[
        dict[
            Annotated[Text, Field(min_length=1, max_length=1024, pattern="^[^=]+$")],
            Annotated[Text, Field(max_length=MAX_ARG)],
        ],
        Field(max_length=MAX_ENV),
    ] = Field(default_factory=dict)
    cwd: Annotated[Text, AfterValidator(_absolute), Field(max_length=MAX_PATH)] = "/workspace"
    stdin: Literal["none", "stream"] | Bytes = "none"
    inputs: Annotated[list[Input], Field(max_length=MAX_INPUTS)] = Field(default_factory=list)
    tar: Bytes | None = None
    """A tar (plain, gzip, bzip2 or xz) that is unpacked into the workspace after ``inputs``."""
    artifacts: (
        Annotated[list[Annotated[Text, Field(min_length=1, max_length=MAX_PATH)]], Field(max_length=64)]
        | None
    ) = None
    """Patterns; of the files that the policy releases only those that match one of these too."""
    limits: Narrowing = Field(default_factory=Narrowing)
    deadline: Duration | None = None
    """Counts from acceptance, queueing included."""
    labels: Annotated[
        dict[Annotated[Text, Field(min_length=1, max_length=128)], Annotated[Text, Field(max_length=1024)]],
        Field(max_length=MAX_LABELS),
    ] = Field(default_factory=dict)
    key: Annotated[Text, Field(min_length=1, max_length=256)] | None = None
    """Idempotency key, unique per caller."""
    session: Annotated[Text, Field(min_length=1, max_length=128)] | None = None


class State(StrEnum):
    """Where an invocation is."""

    ACCEPTED = "accepted"
    HELD = "held"
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    COLLECTING = "collecting"
    ENDED = "ended"


class Cause(StrEnum):
    """How a call ended. All but the last two speak of the tool."""

    EXITED = "exited"
    SIGNALLED = "signalled"
    WALL_TIME = "wall_time"
    CPU_TIME = "cpu_time"
    MEMORY = "memory"
    OUTPUT = "output"
    CANCELLED = "cancelled"
    EXEC_FAILED = "exec_failed"
    DENIED = "denied"
    FAILED = "failed"


class Failure(Wire):
    """Why an attempt failed through a fault of ours; ``code`` is one of ``errors.AttemptFailed``'s."""

    code: str
    message: str
    details: dict[str, Any] = Field(default_factory=dict)


class Outcome(Wire):
    """How the call ended: one cause, with the evidence for it."""

    cause: Cause
    message: str
    """One sentence for a person, or for an agent that decides what to do next."""
    exit_code: int | None = None
    signal: int | None = None
    signal_name: str | None = None
    errno: str | None = None
    """The name of the errno of ``exec_failed``, such as ``ENOENT``."""
    error: Failure | None = None
    evidence: dict[str, Any] = Field(default_factory=dict)
    """The kernel's counters that the cause was read from."""
    redacted: int | None = None
    """How many places of output, names and texts had a secret of the call; None: it was granted none."""

    def exit_status(self) -> int:
        """The status that ``run-in-sandbox`` exits with."""
        match self.cause:
            case Cause.EXITED:
                return self.exit_code or 0
            case Cause.SIGNALLED:
                return 128 + (self.signal or 0)
            case Cause.EXEC_FAILED:
                return 127 if self.errno in {"ENOENT", "ENOTDIR"} else 126
            case Cause.WALL_TIME | Cause.CPU_TIME | Cause.OUTPUT:
                return 124
            case Cause.MEMORY:
                return 137
            case Cause.CANCELLED:
                return 130
            case Cause.DENIED | Cause.FAILED:
                return 125


class DigestRef(Wire):
    """A name and the digest that it stood for at the time."""

    name: str
    digest: str


class CallerInfo(Wire):
    """Who asked, as the kernel told it."""

    uid: int
    gid: int
    role: str


class Times(Wire):
    """When the invocation entered each state, if it did."""

    accepted: int
    started: int | None = None
    ended: int | None = None


class Usage(Wire):
    """What the call used, read from its cgroup and its tool process's rusage."""

    wall: int = 0
    cpu_user: int = 0
    cpu_system: int = 0
    memory_peak: int = 0
    pids_peak: int | None = None
    """None where the kernel does not count it (cgroup v2 before 6.1, cgroup v1 before ``pids.peak``)."""
    io_read: int = 0
    io_written: int = 0
    stdout: int = 0
    stderr: int = 0
    connections: int = 0
    """Of a policy with a network, and so are the bytes."""
    requests: int = 0
    """Of HTTP, where rules look into it."""
    network_in: int = 0
    network_out: int = 0


class Denial(Wire):
    """Something that the policy refused while the tool ran."""

    kind: str
    """``syscall``, ``connection``, ``request`` of HTTP, or ``name``: one that was asked of the resolver."""
    name: str
    """Of a connection, the host or address and the port."""
    count: int
    detail: str = ""
    """What the first of them asked for, such as ``socket(AF_PACKET)``; or why it was refused."""
    errno: str = ""
    rule: str = ""
    """File and line of the rule that refused it; empty where no rule allowed it."""


Counted = Annotated[int, Field(ge=0, le=units.MAX)]
"""Told by a process that is not believed."""


class NetworkRefusal(Wire):
    """What was refused, told apart by where it was to go and why."""

    protocol: str = Field(max_length=32)
    target: str = Field(max_length=1024)
    port: int | None = Field(default=None, ge=0, le=65535)
    why: str = Field(max_length=4096)
    rule: str | None = Field(default=None, max_length=8192)
    count: Counted = Field(ge=1)


class NetworkUse(Wire):
    """What a call did with its network, in sum."""

    refusals: list[NetworkRefusal] = Field(default_factory=list, max_length=1000)
    limits: list[Annotated[str, Field(max_length=32)]] = Field(default_factory=list, max_length=16)
    """Of ``network.budget``, those that were reached."""
    connections: Counted = 0
    requests: Counted = 0
    """Of HTTP, where rules look into it."""
    bytes_in: Counted = 0
    bytes_out: Counted = 0


class NetworkEvent(Wire):
    """A connection that has ended, or one, or a name, that was refused."""

    verdict: Literal["allowed", "denied", "failed", "limit"]
    """failed: the policy allowed it, and the network did not let it happen; limit: a budget ended it."""
    direction: Literal["out", "in"] = "out"
    """in: the caller's, to a port that the policy exposes."""
    protocol: str = Field(default="", max_length=32)
    """``tcp``; ``dns`` of a question for a name; ``http`` or ``https`` of a request in a connection; another
    one only where it was refused."""
    name: str | None = Field(default=None, max_length=1024)
    """What the program asked the resolver for; None: it gave the address itself."""
    address: str = Field(default="", max_length=64)
    """What the program connected to; of a name, the address that stands for it in its container."""
    port: int = Field(default=0, ge=0, le=65535)
    upstream: str | None = Field(default=None, max_length=64)
    """The address that was connected to outside."""
    why: str = Field(default="", max_length=4096)
    rule: str | None = Field(default=None, max_length=8192)
    """File and line of the rule that decided."""
    bytes_out: Counted = 0
    bytes_in: Counted = 0
    duration: Counted = 0
    method: str = Field(default="", max_length=32)
    """Of a request, where rules look into HTTP; its bytes are those of the bodies."""
    path: str = Field(default="", max_length=4096)
    """Of a request, without the query."""
    status: int = Field(default=0, ge=0, le=999)
    """Of the answer; 0: there was none."""
    secrets: list[Annotated[str, Field(max_length=160)]] = Field(default_factory=list, max_length=64)
    """Those that were put into the request, as NAME@VERSION."""


class LimitReached(Wire):
    """A limit that was reached; it ended the call only where ``ended`` says so."""

    limit: str
    value: int
    ended: bool = False
    count: int | None = None


class Control(Wire):
    """One line of a receipt."""

    name: str
    asked: str
    in_force: str
    read_from: str
    enforced: bool = True


class Receipt(Wire):
    """What was in force when the command was handed over, and how that was read back."""

    engine: str
    runtime: str
    controls: list[Control]
    read_at: int
    """When every control was read: as soon as the slot was made, unless it had to be done once more."""
    checked_at: int | None = None
    """When the slot was read again, at hand-over, and found to be as it was at ``read_at``."""
    warnings: list[str] = Field(default_factory=list)
    """Boundaries that the policy takes away, each as a sentence."""
    _digest: str | None = PrivateAttr(None)

    def digest(self) -> str:
        """``sha256:…`` of its canonical JSON; made once, since it has hundreds of values."""
        if self._digest is None:
            self._digest = canonical.digest(self.model_dump(mode="json"))
        return self._digest


class Artifact(Wire):
    """A file released from a call, content-addressed. Non-UTF-8 names are percent-encoded."""

    path: str
    size: int
    digest: str
    executable: bool = False


class Withheld(Wire):
    """A file that matched an artifact pattern and was not released, and why."""

    path: str
    reason: str
    detail: str = ""


class SecretUse(Wire):
    """A secret that a call was given: which version, and how."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: str
    version: int
    as_: Annotated[Literal["env", "file", "proxy"], Field(alias="as")]


class Invocation(Wire):
    """One accepted call."""

    id: str
    state: State
    caller: CallerInfo
    policy: DigestRef
    image: DigestRef
    plan: str
    """Digest of the plan."""
    argv: list[str | Bytes]
    labels: dict[str, str] = Field(default_factory=dict)
    key: str | None = None
    times: Times
    outcome: Outcome | None = None
    stdout: Content | None = None
    stderr: Content | None = None
    receipt: Receipt | None = None
    usage: Usage | None = None
    denials: list[Denial] = Field(default_factory=list)
    limits_reached: list[LimitReached] = Field(default_factory=list)
    artifacts: list[Artifact] = Field(default_factory=list)
    withheld: list[Withheld] = Field(default_factory=list)
    secrets: list[SecretUse] = Field(default_factory=list)
    """The secrets that its command was given."""
    attempts: int = 0


class InvocationList(Wire):
    """A page of invocations, newest first; ``next`` is the ``before`` of the following page."""

    invocations: list[Invocation]
    next: str | None = None


class Event(Wire):
    """One numbered event of a call. ``offset`` is the byte offset of ``data`` in its stream."""

    seq: int
    at: int
    type: Literal["accepted", "started", "output", "network", "denied", "limit", "ended"]
    id: str | None = None
    stream: Literal["stdout", "stderr"] | None = None
    offset: int | None = None
    data: Bytes | None = None
    network: NetworkEvent | None = None
    denial: Denial | None = None
    limit: LimitReached | None = None
    invocation: Invocation | None = None
    """On ``ended``: the invocation as ``GET`` would give it."""


class PolicyProblem(Wire):
    """One error of a policy file. Lines and columns count from 1."""

    file: str
    line: int
    column: int
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


class PolicyInfo(Wire):
    """A policy as the daemon has it; ``problems`` are those of a later bad edit that is not in force."""

    name: str
    digest: str
    description: str
    file: str
    image: str
    resolved: dict[str, Any] | None = None
    problems: list[PolicyProblem] = Field(default_factory=list)


class PlanDocument(Wire):
    """The answer of ``POST /v1/plans``: what would run, exactly, and where each value came from."""

    digest: str
    plan: dict[str, Any]
    explain: list[dict[str, Any]]


class ImageInfo(Wire):
    """An image in the store."""

    name: str
    digest: str
    size: int
    created: int
    source: str
    architecture: str
    used_by: list[str] = Field(default_factory=list)


class SecretInfo(Wire):
    """A stored secret. Its value is never given back, nor what would tell something of it."""

    name: str
    version: int | None = None
    """Counts from 1; no number is used twice for a name. None where the record is damaged."""
    created: int | None = None
    rotated: int | None = None
    """When this version was stored."""
    problem: str | None = None
    """Why it cannot be used."""


class SlotInfo(Wire):
    """A container that the daemon holds. ``id`` is None while it is being created."""

    id: str | None = None
    state: Literal["creating", "waiting", "running", "destroying"]
    policy: str
    image: str
    shape: str
    """The digest of what it was made for; only a call of exactly this gets it."""
    since: int
    """Since when it waits, and else since when it is being made."""
    warm: bool = False
    """Made ahead of its call."""


class Health(Wire):
    """The answer of ``GET /v1/health``."""

    status: Literal["ready", "draining"]
    version: str
    engine: str
    runtime: str
    running: int
    queued: int
    problems: list[PolicyProblem] = Field(default_factory=list)


class Problem(BaseModel):
    """An RFC 9457 problem document; ``code`` is stable, the rest explains it."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; real-time and unknown signals are ``SIG<number>``."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"SIG{number}"
