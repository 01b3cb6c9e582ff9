"""What was in force when a command was handed over."""

from __future__ import annotations

from pydantic import Field, PrivateAttr

from sandboxd import canonical
from sandboxd.models.wire import Wire

__all__ = ["Control", "Receipt"]


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
