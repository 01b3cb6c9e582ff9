"""The wire types: what goes over the socket, into the journal, and out of ``--json``.

Times are integer microseconds since the Unix epoch, durations integer microseconds, sizes bytes.
Bytes are never assumed to be text: see ``Content``.
"""

from sandboxd.models.batch import Batch, BatchResult
from sandboxd.models.callback import Callback, CallbackState
from sandboxd.models.container import ContainerLost, ContainerUse, SessionContainer, SessionEnd
from sandboxd.models.files import FileChange, FileInfo, FileList, FileWritten, SessionDiff
from sandboxd.models.invocation import (
    Artifact,
    CallerInfo,
    DigestRef,
    Event,
    Invocation,
    InvocationList,
    SecretUse,
    State,
    Times,
    Withheld,
)
from sandboxd.models.lineage import Lineage, Release
from sandboxd.models.network import NetworkEvent, NetworkRefusal, NetworkUse, SessionNetwork
from sandboxd.models.operating import (
    Health,
    ImageInfo,
    PlanDocument,
    PolicyInfo,
    PolicyProblem,
    Problem,
    SecretInfo,
    SlotInfo,
)
from sandboxd.models.outcome import Cause, Denial, Failure, LimitReached, Outcome, Usage, signal_name
from sandboxd.models.receipt import Control, Receipt
from sandboxd.models.replay import Difference, Replay, ReplayedCall, ReplayEvent, SessionReplay
from sandboxd.models.request import Input, Narrowing, Request
from sandboxd.models.retry import FailedAttempt
from sandboxd.models.search import Hit, Pruning, SearchResults
from sandboxd.models.session import (
    CheckpointInfo,
    CheckpointList,
    SessionFork,
    SessionInfo,
    SessionLend,
    SessionList,
    SessionQuota,
    SessionRequest,
    SessionRollback,
)
from sandboxd.models.wire import Bytes, Content, Count, Counted, Duration, Size, Text, Wire

__all__ = [
    "Artifact",
    "Batch",
    "BatchResult",
    "Bytes",
    "Callback",
    "CallbackState",
    "CallerInfo",
    "Cause",
    "CheckpointInfo",
    "CheckpointList",
    "ContainerLost",
    "ContainerUse",
    "Content",
    "Control",
    "Count",
    "Counted",
    "Denial",
    "Difference",
    "DigestRef",
    "Duration",
    "Event",
    "FailedAttempt",
    "Failure",
    "FileChange",
    "FileInfo",
    "FileList",
    "FileWritten",
    "Health",
    "Hit",
    "ImageInfo",
    "Input",
    "Invocation",
    "InvocationList",
    "LimitReached",
    "Lineage",
    "Narrowing",
    "NetworkEvent",
    "NetworkRefusal",
    "NetworkUse",
    "Outcome",
    "PlanDocument",
    "PolicyInfo",
    "PolicyProblem",
    "Problem",
    "Pruning",
    "Receipt",
    "Release",
    "Replay",
    "ReplayEvent",
    "ReplayedCall",
    "Request",
    "SearchResults",
    "SecretInfo",
    "SecretUse",
    "SessionContainer",
    "SessionDiff",
    "SessionEnd",
    "SessionFork",
    "SessionInfo",
    "SessionLend",
    "SessionList",
    "SessionNetwork",
    "SessionQuota",
    "SessionReplay",
    "SessionRequest",
    "SessionRollback",
    "Size",
    "SlotInfo",
    "State",
    "Text",
    "Times",
    "Usage",
    "Wire",
    "Withheld",
    "signal_name",
]
