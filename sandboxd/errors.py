"""Every error that sandboxd raises, and the stable ``code`` that each leaf has on the wire.

SandboxdError
├── Refused                        the request was not accepted; nothing ran
│   ├── InvalidRequest             invalid_request          400
│   ├── NotIdentified              not_identified           401
│   ├── NotPermitted               not_permitted            403
│   ├── PortNotExposed             port_not_exposed         403
│   ├── NotFound                   not_found                404
│   ├── Pruned                     pruned                   410
│   ├── KeyConflict                key_conflict             409
│   ├── StateConflict              state_conflict           409
│   │   ├── SessionExists          session_exists           409
│   │   ├── SessionBusy            session_busy             409
│   │   ├── SessionIdle            session_idle             409
│   │   ├── ContainerLive          container_live           409
│   │   ├── CallNotStarted         call_not_started         409
│   │   └── CallEnded              call_ended               409
│   ├── ImageInUse                 image_in_use             409
│   ├── PreconditionFailed         precondition_failed      412
│   ├── TooLarge                   too_large                413
│   ├── RangeNotSatisfiable        range_not_satisfiable    416
│   ├── RequestTooWide             request_too_wide         422
│   ├── PolicyInvalid              policy_invalid           422
│   ├── ControlNotSupported        control_not_supported    422
│   ├── ImageInvalid               image_invalid            422
│   ├── SecretMissing              secret_missing           422
│   ├── SecretUnfit                secret_unfit             422
│   ├── QuotaExceeded              quota_exceeded           422
│   ├── WorkspaceUnfit             workspace_unfit          422
│   ├── QueueFull                  queue_full               429
│   ├── RequestTimeout             request_timeout          408
│   ├── PortNotAnswering           port_not_answering       502
│   ├── PortAnswerInvalid          port_answer_invalid      502
│   ├── SecretsUnavailable         secrets_unavailable      503
│   └── Draining                   draining                 503
├── AttemptFailed                  an accepted call that failed through a fault of ours
│   ├── EngineFailed               engine
│   ├── HostFailed                 host
│   ├── Corrupt                    corrupt
│   ├── ControlNotEnforced         control_not_enforced
│   └── Interrupted                interrupted
├── ConfigInvalid                  config_invalid           the daemon does not start
├── HostUnsupported                host_unsupported         the daemon does not start
├── JournalCorrupt                 journal_corrupt
└── Unavailable                    unavailable              raised by clients: no daemon answers

How a *tool* ended is never an exception: see ``models.Outcome``.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "AttemptFailed",
    "CallEnded",
    "CallNotStarted",
    "ConfigInvalid",
    "ContainerLive",
    "ControlNotEnforced",
    "ControlNotSupported",
    "Corrupt",
    "Draining",
    "EngineFailed",
    "HostFailed",
    "HostUnsupported",
    "ImageInUse",
    "ImageInvalid",
    "Interrupted",
    "InvalidRequest",
    "JournalCorrupt",
    "KeyConflict",
    "NotFound",
    "NotIdentified",
    "NotPermitted",
    "PolicyInvalid",
    "PortAnswerInvalid",
    "PortNotAnswering",
    "PortNotExposed",
    "PreconditionFailed",
    "Pruned",
    "QueueFull",
    "QuotaExceeded",
    "RangeNotSatisfiable",
    "Refused",
    "RequestTimeout",
    "RequestTooWide",
    "SandboxdError",
    "SecretMissing",
    "SecretUnfit",
    "SecretsUnavailable",
    "SessionBusy",
    "SessionExists",
    "SessionIdle",
    "StateConflict",
    "TooLarge",
    "Unavailable",
    "WorkspaceUnfit",
]


class SandboxdError(Exception):
    """The root of the tree.

    ``code`` is stable and meant for programs, the message for people; ``details`` is JSON-compatible
    and goes out with the problem document.
    """

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details: dict[str, Any] = details


class Refused(SandboxdError):
    """Raised when a request is not accepted; nothing ran and nothing has to be undone."""

    code = "refused"
    status: ClassVar[int] = 400


class InvalidRequest(Refused):
    """Raised when a request or a field of it is malformed; ``details["field"]`` names it."""

    code = "invalid_request"


class NotIdentified(Refused):
    """Raised when the peer of the socket matches no caller of the configuration."""

    code = "not_identified"
    status = 401


class NotPermitted(Refused):
    """Raised when the caller is known but its role or its policies do not allow this."""

    code = "not_permitted"
    status = 403


class PortNotExposed(Refused):
    """Raised when the policy does not expose a port; ``details["exposed"]`` lists those that it does."""

    code = "port_not_exposed"
    status = 403


class NotFound(Refused):
    """Raised when what was named does not exist, or belongs to somebody else."""

    code = "not_found"
    status = 404


class Pruned(Refused):
    """Raised when what was named was removed by retention; ``details["pruned"]`` says when."""

    code = "pruned"
    status = 410


class KeyConflict(Refused):
    """Raised when an idempotency key was used before with another request."""

    code = "key_conflict"
    status = 409


class StateConflict(Refused):
    """Raised when the state of what was named does not allow this, such as stdin for an ended call."""

    code = "state_conflict"
    status = 409


class CallNotStarted(StateConflict):
    """Raised when something is asked of a command that does not run yet."""

    code = "call_not_started"


class CallEnded(StateConflict):
    """Raised when something is asked of a command that has ended.

    ``details["offset"]``, of standard input, is how much of it was taken.
    """

    code = "call_ended"


class SessionExists(StateConflict):
    """Raised when a session is made by a name that another of the caller's has, ``details["id"]``."""

    code = "session_exists"


class SessionBusy(StateConflict):
    """Raised when something is asked of a session that does not go while calls run in it or wait for it."""

    code = "session_busy"


class SessionIdle(StateConflict):
    """Raised when something is asked of the container of a session in which no call runs."""

    code = "session_idle"


class ContainerLive(StateConflict):
    """Raised when something is asked of a session that does not go with the container that it keeps.

    ``details``: the ``session``, and ``since``, the call that the container was made for.
    """

    code = "container_live"


class ImageInUse(Refused):
    """Raised when an image is removed that a policy or a running call uses."""

    code = "image_in_use"
    status = 409


class PreconditionFailed(Refused):
    """Raised when a file is not what ``If-Match`` or ``If-None-Match`` said.

    ``details["digest"]`` is what it is; None where there is no file.
    """

    code = "precondition_failed"
    status = 412


class TooLarge(Refused):
    """Raised when a body, a header or a field is over its limit, ``details["limit"]``.

    It counts bytes; of the field that ``details["field"]`` names, if any, characters, items or members.
    """

    code = "too_large"
    status = 413


class RangeNotSatisfiable(Refused):
    """Raised when a range lies outside of what there is; ``details["size"]`` says how much that is."""

    code = "range_not_satisfiable"
    status = 416


class RequestTooWide(Refused):
    """Raised when a request asks for more than its policy allows; both values are in ``details``."""

    code = "request_too_wide"
    status = 422


class PolicyInvalid(Refused):
    """Raised when a policy file has errors; ``details["problems"]`` lists all of them."""

    code = "policy_invalid"
    status = 422


class ControlNotSupported(Refused):
    """Raised when a policy declares a control that this build or this host cannot enforce."""

    code = "control_not_supported"
    status = 422


class ImageInvalid(Refused):
    """Raised when an image cannot be imported, or its content no longer has its digest."""

    code = "image_invalid"
    status = 422


class SecretMissing(Refused):
    """Raised when a policy grants a secret that is not stored; ``details["secret"]`` names it."""

    code = "secret_missing"
    status = 422


class SecretUnfit(Refused):
    """Raised when a secret cannot be given as the policy grants it, such as one with a NUL as a variable."""

    code = "secret_unfit"
    status = 422


class QuotaExceeded(Refused):
    """Raised when a quota has no room; ``details`` has its name, ``quota``, and ``allowed`` and ``asked``.

    Where a call's files are what does not fit, it is the call's outcome, ``denied``.
    """

    code = "quota_exceeded"
    status = 422


class WorkspaceUnfit(Refused):
    """Raised when no layer can hold a workspace's files, such as one with a name that is too long.

    Where it is found after a call, it is the call's outcome, ``denied``.
    """

    code = "workspace_unfit"
    status = 422


class QueueFull(Refused):
    """Raised when the queue holds as many calls as it may; ``details["retry_after"]`` is in seconds."""

    code = "queue_full"
    status = 429


class RequestTimeout(Refused):
    """Raised when a peer did not send its whole request in time."""

    code = "request_timeout"
    status = 408


class PortNotAnswering(Refused):
    """Raised when nobody in the container takes a connection to an exposed port."""

    code = "port_not_answering"
    status = 502


class PortAnswerInvalid(Refused):
    """Raised when the server in the container answers with what is no HTTP, or ends before its answer."""

    code = "port_answer_invalid"
    status = 502


class SecretsUnavailable(Refused):
    """Raised when secrets are needed and their key is not there or is another one, or one is damaged."""

    code = "secrets_unavailable"
    status = 503


class Draining(Refused):
    """Raised when the daemon finishes what runs and takes nothing new."""

    code = "draining"
    status = 503


class AttemptFailed(SandboxdError):
    """Raised when an accepted call fails through a fault of ours; becomes ``Outcome(cause="failed")``."""

    code = "failed"


class EngineFailed(AttemptFailed):
    """Raised when the engine or its runtime could not make, keep or end a container."""

    code = "engine"


class HostFailed(AttemptFailed):
    """Raised when the host refused what we need: no space, no memory, no descriptor."""

    code = "host"


class Corrupt(AttemptFailed):
    """Raised when files of a session are gone, or are not those that were kept.

    ``details``: the ``session``, and the ``checkpoint`` and ``digest`` that their layer makes.
    """

    code = "corrupt"


class ControlNotEnforced(AttemptFailed):
    """Raised when the receipt differs from the plan; ``details["control"]`` names the control."""

    code = "control_not_enforced"


class Interrupted(AttemptFailed):
    """Raised when the daemon ended while the call ran."""

    code = "interrupted"


class ConfigInvalid(SandboxdError):
    """Raised when the daemon's configuration has errors; the message has file, line and column."""

    code = "config_invalid"


class HostUnsupported(SandboxdError):
    """Raised when this host lacks what no policy can do without."""

    code = "host_unsupported"


class JournalCorrupt(SandboxdError):
    """Raised when a record, or the chain of records, does not have its digest."""

    code = "journal_corrupt"


class Unavailable(SandboxdError):
    """Raised by clients when no daemon answers on the socket."""

    code = "unavailable"
