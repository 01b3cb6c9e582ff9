"""The secrets of one call: taken at hand-over, put where its policy says, and out of all that is told of it.

Nothing is taken before the call has its container and its acceptance is on disk, so a secret that was rotated
while the call waited is the new one. ``as: env`` goes into the command's environment, ``as: file`` onto the
container's own tmpfs, from where it is read back as the tool sees it. ``as: proxy`` is for whoever serves the
connections: ``proxied``, and ``on_rotated`` for what changes while the call runs.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, Self

import anyio.to_thread
import structlog

from sandboxd import artifacts, errors
from sandboxd.kernel import files
from sandboxd.models import Control, SecretUse
from sandboxd.policy.paths import SECRETS
from sandboxd.receipt import Parked
from sandboxd.redaction import Redactor
from sandboxd.secrets import MAX_VALUE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sandboxd.engine.base import Slot
    from sandboxd.models import Artifact, Denial, NetworkEvent, Outcome, Withheld
    from sandboxd.network.questions import Question
    from sandboxd.plan import Shape
    from sandboxd.secrets import SecretStore, Value

__all__ = ["CallSecrets"]

MODE = 0o400
MAX_TEXTS = {
    "protocol": 32, "name": 1024, "address": 64, "upstream": 64, "why": 4096, "rule": 8192, "method": 32,
    "path": 4096,
}  # fmt: skip
"""Characters of the texts of an event of the network, as its model has them."""

log = structlog.get_logger("sandboxd.secrets")


class CallSecrets:
    """Of a call of this shape. A context manager, which wipes what it took."""

    def __init__(self, store: SecretStore, shape: Shape) -> None:
        self._store = store
        self._shape = shape
        self._values: dict[str, Value] = {}
        self._stale: set[str] = set()
        self._closed = False
        self._told: list[Callable[[str, int | None, bytes], None]] = []
        self._stack = ExitStack()
        self.redactor: Redactor | None = None
        """None as long as the call has no secret."""
        self.uses: list[SecretUse] = []
        """What was given to the command, or to a request of it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wipe what was taken. Safe to call twice."""
        self._closed = True
        self._stack.close()
        for value in self._values.values():
            value.wipe()
        self._values.clear()
        self._told.clear()

    async def take(self) -> None:
        """Take the newest values, once. Raises SecretMissing, SecretsUnavailable, SecretUnfit."""
        if not self._shape.secrets or self.redactor is not None:
            return
        # from before they are read, so that no later value is missed
        self._stack.enter_context(self._store.watched(self._shape.granted("proxy"), self._rotated))
        self.redactor = await anyio.to_thread.run_sync(self._take)
        for name in self._stale:
            self._renew(name)

    def _take(self) -> Redactor:
        names = [grant.name for grant in self._shape.secrets]
        self._store.check(names, environment=self._shape.granted("env"))
        self._values = self._store.take(names)
        return Redactor({name: bytes(value.data) for name, value in self._values.items()})

    def environment(self) -> list[bytes]:
        """Variables for the command, ``NAME=value``."""
        names = self._shape.granted("env")
        for name in names:
            self.note_use(name, "env", self._values[name].version)
        return [b"%b=%b" % (name.encode(), bytes(self._values[name].data)) for name in names]

    def put(self, slot: Slot) -> list[Control]:
        """Write the files of the slot that gets the command; they are read back as its process sees them.

        Blocks for some 10 µs each. Raises HostFailed, ControlNotEnforced.
        """
        names = self._shape.granted("file")
        if not names or slot.secrets_fd is None:
            return []
        owner = slot.shape.process
        uid, gid = slot.id_base + owner.uid, slot.id_base + owner.gid
        with files.Writer(slot.secrets_fd, uid, gid) as writer:
            for name in names:
                writer.file([name.encode()], (bytes(self._values[name].data),), MODE)
        try:
            with Parked(slot.tool_pid) as process:
                controls = [self._read_back(process, name, (uid, gid)) for name in names]
                controls.append(_listed(process, names))
        except OSError as error:
            raise errors.ControlNotEnforced(
                f"the files of secrets cannot be read back: {error}", control="secret_files"
            ) from error
        for name in names:
            self.note_use(name, "file", self._values[name].version)
        return controls

    def _read_back(self, process: Parked, name: str, ids: tuple[int, int]) -> Control:
        """A control that says which version a file has, and never what is in it."""
        value = self._values[name]
        fd = process.open_inside(f"{SECRETS}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            data = os.read(fd, MAX_VALUE + 1) if stat.S_ISREG(found.st_mode) else b""
        finally:
            os.close(fd)
        holds = f"version {value.version}" if data == value.data else "something else"
        shown = f"{stat.S_IMODE(found.st_mode):04o} {found.st_uid}:{found.st_gid}, {found.st_nlink} link"
        asked = f"{MODE:04o} {ids[0]}:{ids[1]}, 1 link, version {value.version}"
        in_force = f"{shown}, {holds}"
        where = f"stat and content of {SECRETS}/{name}"
        return Control(
            name=f"secret {name}", asked=asked, in_force=in_force, read_from=where, enforced=asked == in_force
        )

    @property
    def proxied(self) -> dict[str, tuple[int, bytes]]:
        """Version and value of each secret that is granted ``as: proxy``, as they are now."""
        granted = self._shape.granted("proxy")
        return {
            name: (self._values[name].version, bytes(self._values[name].data))
            for name in granted
            if name in self._values
        }

    def on_rotated(self, told: Callable[[str, int | None, bytes], None]) -> None:
        """Call ``told`` on the event loop with name, version and value of a proxied secret that is new.

        What has the new value is redacted from before then. A version of None: it was removed, and no
        request may have it any more.
        """
        self._told.append(told)

    def note_use(self, name: str, kind: Literal["env", "file", "proxy"], version: int) -> None:
        """Record that a version was given to the command, or that a request of it carried it."""
        use = SecretUse(name=name, version=version, as_=kind)
        if use not in self.uses:
            self.uses.append(use)

    def _rotated(self, name: str) -> None:
        if self._closed:
            return
        if self.redactor is None:
            self._stale.add(name)
        else:
            self._renew(name)

    def _renew(self, name: str) -> None:
        assert self.redactor is not None  # noqa: S101
        old = self._values.get(name)
        try:
            new = self._store.take([name])[name]
        except errors.SecretMissing:
            if self._values.pop(name, None) is not None:
                self._tell(name, None, b"")
            return
        except errors.SecretsUnavailable as error:
            log.error("a running call keeps an earlier version", name=name, reason=str(error))  # noqa: TRY400
            return
        if old is not None and old.version == new.version:
            new.wipe()
            return
        self._values[name] = new
        self.redactor.also(name, bytes(new.data))
        self._tell(name, new.version, bytes(new.data))
        if old is not None:
            old.wipe()

    def _tell(self, name: str, version: int | None, value: bytes) -> None:
        for told in self._told:
            told(name, version, value)

    def event(self, event: NetworkEvent) -> NetworkEvent:
        """What the network says, without secrets. Names of hosts have lost their case."""
        if self.redactor is None:
            return event
        return event.model_copy(update=self._texts(event))

    def question(self, question: Question) -> Question:
        """The same of what somebody is asked to decide: who asks for it may be anybody."""
        return question if self.redactor is None else question.model_copy(update=self._texts(question))

    def _texts(self, told: NetworkEvent | Question) -> dict[str, str]:
        assert self.redactor is not None  # noqa: S101
        cleaned: dict[str, str] = {}
        for field, most in MAX_TEXTS.items():
            if isinstance(text := getattr(told, field, None), str):
                cleaned[field] = self.redactor.name(text)[:most]  # a marker may be longer than what it is for
        return cleaned

    def denials(self, denials: list[Denial]) -> list[Denial]:
        """The same of denials."""
        if self.redactor is None:
            return denials
        clean = self.redactor.name
        return [
            one.model_copy(update={"name": clean(one.name), "detail": clean(one.detail)}) for one in denials
        ]

    def outcome(self, outcome: Outcome) -> Outcome:
        """An outcome without secrets, and with the count of what was redacted. To be asked for last."""
        if self.redactor is None:
            return outcome
        error = outcome.error
        if error is not None:
            cleaned = {"message": self.redactor.text(error.message), "details": self._plain(error.details)}
            error = error.model_copy(update=cleaned)
        message = self.redactor.text(outcome.message)
        return outcome.model_copy(
            update={"message": message, "error": error, "redacted": self.redactor.count}
        )

    def _plain(self, value: Any) -> Any:
        """Plain data with its texts redacted."""
        assert self.redactor is not None  # noqa: S101
        if isinstance(value, str):
            return self.redactor.text(value)
        if isinstance(value, dict):
            return {self._plain(key): self._plain(one) for key, one in value.items()}
        return [self._plain(one) for one in value] if isinstance(value, list | tuple) else value

    def artifacts(self, released: list[Artifact]) -> list[Artifact]:
        """Released files under names that have no secret, each its own."""
        if self.redactor is None:
            return released
        paths = {one.path for one in released}
        found = []
        for one in released:
            path = self._path(one.path)
            if path != one.path:
                path = next(name for name in _numbered(path) if name not in paths)
                paths.add(path)
            found.append(one.model_copy(update={"path": path}))
        return found

    def withheld(self, withheld: list[Withheld]) -> list[Withheld]:
        """The same of files that are not released."""
        if self.redactor is None:
            return withheld
        clean = self.redactor.text
        return [
            one.model_copy(update={"path": self._path(one.path), "detail": clean(one.detail)})
            for one in withheld
        ]

    def _path(self, path: str) -> str:
        assert self.redactor is not None  # noqa: S101
        raw = artifacts.decode_path(path)
        clean = self.redactor.data(raw)
        return path if clean == raw else artifacts.encode_path(clean)


def _listed(process: Parked, names: Sequence[str]) -> Control:
    asked, found = " ".join(sorted(names)), " ".join(process.list_inside(SECRETS))
    return Control(
        name="secret_files", asked=asked, in_force=found, read_from=SECRETS, enforced=asked == found
    )


def _numbered(path: str) -> Iterator[str]:
    yield path
    number = 2
    while True:
        yield f"{path}~{number}"
        number += 1
