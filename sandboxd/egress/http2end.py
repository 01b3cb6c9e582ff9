"""One end of HTTP/2: what comes, as events of ``h2``; what goes, as fast as the other end takes it.

Bodies wait in a ``Flow`` each, and go in turn, a frame at a time, when the other end has given room for them
and little else waits to be written. What came is acknowledged only when it has gone on, so that no more of a
body waits here than the windows below.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, RemoteSettingsChanged, StreamReset, WindowUpdated
from h2.exceptions import (
    DenialOfServiceError,
    FrameTooLargeError,
    InvalidBodyLengthError,
    ProtocolError,
)
from h2.settings import SettingCodes, Settings
from hyperframe.frame import DataFrame, GoAwayFrame, SettingsFrame, WindowUpdateFrame

from sandboxd.egress.relay import Cut
from sandboxd.egress.streams import Broken

if TYPE_CHECKING:
    from collections.abc import Callable

    from h2.events import Event
    from hyperframe.frame import Frame

    from sandboxd.egress.streams import Stream

__all__ = ["FULL", "MAX_STREAMS", "End", "Flow", "Frames"]

STREAM_WINDOW = 512 * 1024
CONNECTION_WINDOW = 4 << 20
FIRST_WINDOW = 65535  # RFC 9113, section 6.9.2
MAX_STREAMS = 100
MAX_HEAD = 64 * 1024
MAX_TABLE = 4096  # bytes of what is remembered for compression, whatever the other end offers
MAX_SETTINGS = 32
FULL = 64 * 1024  # bytes that wait to be written, above which no body is added to them
BACKLOG = 1 << 20  # above which nothing more is read
SLICE = 16 * 1024
FRAME = 16 * 1024
FINISH_SECONDS = 2.0


class _Allowance:
    """How often something may happen: so often at once, and so often a second."""

    def __init__(self, burst: float, rate: float) -> None:
        self._burst, self._rate = burst, rate
        self._left, self._at = burst, time.monotonic()

    def give(self, count: float) -> None:
        self._left = min(self._burst, self._left + count)

    def take(self, what: str) -> None:
        """Raises DenialOfServiceError."""
        self._left -= 1
        if self._left < 0:
            now = time.monotonic()
            self._left = min(self._burst, self._left + (now - self._at) * self._rate)
            self._at = now
            if self._left < 0:
                raise DenialOfServiceError(f"too many {what}")


class Frames(H2Connection):
    """The protocol's state, with bounds that ``h2`` itself does not have."""

    def __init__(self, *, client_side: bool) -> None:
        # Outbound validation raises in the middle of compression, after which the other end's table is not
        # ours; what goes out is checked before.
        super().__init__(H2Configuration(client_side=client_side, validate_outbound_headers=False))
        self.control = _Allowance(4000, 400)
        """Of frames that carry no body."""
        self.resets = _Allowance(500, 50)
        """Of streams that end before their time."""
        self.local_settings = Settings(
            client=client_side,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEAD,
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            },
        )
        self.initiate_connection()
        self.increment_flow_control_window(CONNECTION_WINDOW - FIRST_WINDOW)

    @property
    def unwritten(self) -> int:
        """Bytes that wait to be written."""
        return len(self._data_to_send)

    def receive(self, data: memoryview) -> list[Event]:
        """The events of some bytes. Raises ProtocolError, with a GOAWAY among what is to be written."""
        events = self.receive_data(data)
        head = self.incoming_buffer._data[:3]  # noqa: SLF001  (h2 looks at a frame's length when it is all there)
        if len(head) == 3 and int.from_bytes(head) > self.max_inbound_frame_size:
            self._terminate_connection(ErrorCodes.FRAME_SIZE_ERROR)
            raise FrameTooLargeError(f"a frame of {int.from_bytes(head)} bytes")
        try:
            for event in events:
                if isinstance(event, StreamReset) and not self.config.client_side:
                    self.resets.take("requests that were given up")
        except DenialOfServiceError as error:
            self._terminate_connection(error.error_code)
            raise
        return events

    def going_away(self) -> None:
        """Say that no new stream is served; those that are there go on (h2's own way ends them)."""
        frame = GoAwayFrame(0)
        frame.last_stream_id = self.highest_inbound_stream_id
        frame.error_code = ErrorCodes.NO_ERROR
        self._prepare_for_sending([frame])

    def open_connection(self, count: int) -> None:
        """Let so much more come on the connection, and no more on any stream than before."""
        if increment := self._inbound_flow_control_window_manager.process_bytes(count):
            frame = WindowUpdateFrame(0)
            frame.window_increment = increment
            self._prepare_for_sending([frame])

    def open_stream(self, count: int, stream: int) -> None:
        """Let so much more come on a stream, and no more on the connection than before."""
        if self.is_open(stream):
            self._prepare_for_sending(self.streams[stream].acknowledge_received_data(count))

    def is_open(self, stream: int) -> bool:
        """Whether anything of a stream is still to come or to go."""
        found = self.streams.get(stream)
        return found is not None and not found.closed

    # what h2 does otherwise

    def _receive_frame(self, frame: Frame) -> list[Event]:
        if not (isinstance(frame, DataFrame) and frame.data and self.is_open(frame.stream_id)):
            self.control.take("frames that carry nothing")
        if isinstance(frame, SettingsFrame) and len(frame.settings) > MAX_SETTINGS:
            raise DenialOfServiceError("too many settings")
        try:
            events = super()._receive_frame(frame)
        except InvalidBodyLengthError:  # one stream's, and no reason to end the others
            return self._cut_short(frame)
        if isinstance(frame, SettingsFrame):
            if len(self.remote_settings) > 2 * MAX_SETTINGS:  # those of no meaning are kept too
                raise DenialOfServiceError("too many settings")
            if self.encoder.header_table_size > MAX_TABLE:  # noqa: PLR1730  (to set it is to say so)
                self.encoder.header_table_size = MAX_TABLE
        return events

    def _cut_short(self, frame: Frame) -> list[Event]:
        code = ErrorCodes.PROTOCOL_ERROR
        self.reset_stream(frame.stream_id, code)
        self.acknowledge_received_data(frame.body_len, frame.stream_id)
        return [StreamReset(stream_id=frame.stream_id, error_code=code, remote_reset=False)]

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        """Without an end to the streams that the other end still serves."""
        event = ConnectionTerminated()
        event.error_code, event.last_stream_id = frame.error_code, frame.last_stream_id
        return [], [event]


class Flow:
    """A body on its way out, and what comes after it."""

    def __init__(self, over: Callable[[], None]) -> None:
        """``over`` is called when there is nothing of it to be sent any more."""
        self.id = 0
        """Of its stream, once it has one."""
        self.end: End | None = None
        """Where it goes, once that is known."""
        self.source: tuple[End, int] | None = None
        """Where it comes from, and the stream there; None where it is our own."""
        self.data = bytearray()
        self.ended = False
        """Nothing is to be added."""
        self.early = self.paid = 0
        """Of the bytes that wait, those in front that hold up their own stream alone, or nothing at all."""
        self.trailers: list[tuple[bytes, bytes]] = []
        self.over = False
        self.moved = 0
        """Bytes that have gone on."""
        self.on_over = over

    def put(self, data: bytes, *, last: bool = False) -> None:
        """Add to it."""
        self.data += data
        self.ended = self.ended or last
        if self.end is not None:
            self.end.touch(self)

    def take(self, most: int) -> bytes:
        """Bytes that go on."""
        piece = bytes(self.data[:most])
        del self.data[:most]
        self.moved += len(piece)
        self._acknowledge(len(piece))
        return piece

    def drop(self) -> None:
        """Nothing more of it is sent."""
        self.over = self.ended = True
        if self.end is not None:
            self.end.forget(self)
        count = len(self.data)
        self.data.clear()
        self._acknowledge(count)

    def put_early(self, data: bytes) -> None:
        """Add what is not to hold up other streams while it waits: its stream's window bounds it."""
        assert self.source is not None  # noqa: S101
        self.early += len(data)
        self.source[0].open_connection(len(data))
        self.put(data)

    def put_paid(self, data: bytes) -> None:
        """Add what is wanted whole before any of it goes on: whoever calls bounds it."""
        assert self.source is not None  # noqa: S101
        self.paid += len(data)
        self.put(data)
        self.source[0].acknowledge(len(data), self.source[1])

    def pay(self) -> None:
        """Have the rest of it come, whatever waits."""
        if self.source is not None:
            self.source[0].open_stream(self.early, self.source[1])
            self.paid, self.early = self.paid + self.early, 0

    def _acknowledge(self, count: int) -> None:
        if self.source is None:
            return
        end, stream = self.source
        paid = min(count, self.paid)
        early = min(count - paid, self.early)
        self.paid -= paid
        self.early -= early
        end.open_stream(early, stream)
        end.acknowledge(count - paid - early, stream)


class End:
    """The connection over ``stream``; ``who`` is at its other end. ``refill`` may add to what is written."""

    def __init__(
        self, stream: Stream, who: str, *, client_side: bool, refill: Callable[[], None] | None = None
    ) -> None:
        self.http = Frames(client_side=client_side)
        self.greeted = False
        """The other end's settings are here."""
        self.leaving = False
        """The other end serves no more streams than those that it has."""
        self._stream = stream
        self._who = who
        self._refill = refill
        self._flows: dict[int, Flow] = {}
        self._ready: dict[int, Flow] = {}
        """Those that may have something to send, in turn."""
        self._unread = memoryview(b"")
        self._something, self._room, self._written = anyio.Event(), anyio.Event(), anyio.Event()
        self._ending = False

    # what comes

    async def receive(self) -> list[Event] | None:
        """Some events; None at the end. Raises OSError, Cut; Broken for what is no HTTP/2."""
        await anyio.lowlevel.checkpoint()  # a stream with bytes at hand does not wait
        await self.has_room()
        if not self._unread:
            self._unread = memoryview(await self._stream.receive())
            if not self._unread:
                return None
        piece, self._unread = self._unread[:SLICE], self._unread[SLICE:]
        try:
            events = self.http.receive(piece)
        except ProtocolError as error:
            raise Broken(f"{self._who} broke HTTP/2: {error or type(error).__name__}") from error
        finally:
            self.wake()
        for event in events:
            if isinstance(event, RemoteSettingsChanged):
                self.greeted = True
                self._ready |= self._flows
            elif isinstance(event, WindowUpdated):
                if event.stream_id == 0:
                    self._ready |= self._flows
                elif event.stream_id in self._flows:
                    self._ready[event.stream_id] = self._flows[event.stream_id]
        return events

    async def has_room(self) -> None:
        """Wait while too much is to be written."""
        while self.http.unwritten > BACKLOG and not self._ending:
            await self._room.wait()

    def acknowledge(self, count: int, stream: int) -> None:
        """Bytes that came have gone on."""
        if count:
            self.http.acknowledge_received_data(count, stream)
            self.wake()

    def open_connection(self, count: int) -> None:
        """Bytes that came hold up no other stream, but have not gone on."""
        if count:
            self.http.open_connection(count)
            self.wake()

    def open_stream(self, count: int, stream: int) -> None:
        """Of those, some have gone on."""
        if count:
            self.http.open_stream(count, stream)
            self.wake()

    # what goes

    def say(self, stream: int, headers: list[tuple[bytes, bytes]], *, last: bool) -> None:
        """Headers, of a stream that is open or new; nothing where the peer gave it up in the same piece."""
        if not self.http.config.client_side and not self.http.is_open(stream):
            return
        self.http.send_headers(stream, headers, end_stream=last)
        self.wake()

    def add(self, flow: Flow, *, ended: bool = False) -> None:
        """Send a flow, after the headers of its stream; ``ended``: they were the last of it."""
        flow.end = self
        if ended:
            self._over(flow)
        else:
            self._flows[flow.id] = flow
            self.touch(flow)

    def touch(self, flow: Flow) -> None:
        """Something was added to a flow."""
        if flow.id in self._flows:
            self._ready[flow.id] = flow
            self.wake()

    def forget(self, flow: Flow) -> None:
        """Send no more of a flow."""
        self._flows.pop(flow.id, None)
        self._ready.pop(flow.id, None)

    def reset(self, stream: int, code: int) -> None:
        """End a stream, where it has not ended."""
        if self.http.is_open(stream):
            self.http.reset_stream(stream, code)
            self.wake()

    def wake(self) -> None:
        """There may be something to write."""
        self._something.set()

    async def write(self) -> None:
        """Write, until ``finish``. Raises OSError, Cut."""
        while True:
            if not self._ending:
                self._fill()
            if data := self.http.data_to_send():
                await self._stream.send(data)
                self._room.set()
                self._room = anyio.Event()
                await anyio.lowlevel.checkpoint()
            elif self._ending:
                self._written.set()
                return
            else:
                self._something = anyio.Event()
                await self._something.wait()

    async def finish(self) -> None:
        """End the connection, so that what was said last arrives, whatever the other end still sends."""
        self._ending = True
        self.wake()
        self._room.set()
        with suppress(OSError, Cut), anyio.move_on_after(FINISH_SECONDS):
            await self._written.wait()
            await self._stream.finish()
            while await self._stream.receive():
                await anyio.lowlevel.checkpoint()

    def _fill(self) -> None:
        if self._refill is not None:
            self._refill()
        while self._ready and self.http.unwritten < FULL:
            key = next(iter(self._ready))
            flow = self._ready.pop(key)
            if self._step(flow):
                self._ready[key] = flow

    def _step(self, flow: Flow) -> bool:
        """Send a frame of a flow; whether another may follow at once."""
        if flow.data:
            room = self.http.local_flow_control_window(flow.id)
            room = min(room, self.http.max_outbound_frame_size, FRAME)
            if room <= 0:
                return False
            piece = flow.take(room)
            last = flow.ended and not flow.data and not flow.trailers
            self.http.send_data(flow.id, piece, end_stream=last)
            self.http.control.give(4)  # its windows are opened for it
        elif flow.ended:
            last = True
            if flow.trailers:
                self.http.send_headers(flow.id, flow.trailers, end_stream=True)
            else:
                self.http.end_stream(flow.id)
        else:
            return False
        if last:
            self._over(flow)
        return not last

    def _over(self, flow: Flow) -> None:
        self.http.control.give(20)
        flow.drop()
        flow.on_over()
