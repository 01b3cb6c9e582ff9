"""What a caller asks for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sandboxd.models.callback import Callback
from sandboxd.models.wire import Absolute, Bytes, Count, Duration, Size, Text, Wire

__all__ = ["Input", "Narrowing", "Request"]

MAX_ARGV = 4096  # items; the kernel bounds the bytes (E2BIG)
MAX_ARG = 131_071  # MAX_ARG_STRLEN - 1, execve(2)
MAX_ENV = 1024
MAX_INPUTS = 4096
MAX_LABELS = 64
MAX_PATH = 4095


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
    cwd: Annotated[Text, Absolute, Field(max_length=MAX_PATH)] = "/workspace"
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
    priority: Annotated[int, Field(ge=-10, le=10)] | None = None
    """Which of one's own calls goes first: those of a higher one. Others' calls are not passed. None: 0."""
    callback: Callback | None = None
    """Who is told of the end, where the configuration allows it."""
