"""``Policy``: one policy with everything it inherits, and where each value came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from sandboxd import canonical
from sandboxd.models import PolicyInfo, PolicyProblem
from sandboxd.policy.source import BUILT_IN, MappingNode, Origin

if TYPE_CHECKING:
    from sandboxd.policy.schema import Artifact, PolicyFile
    from sandboxd.policy.seccomp import Rule

__all__ = ["Places", "Policy"]


@lru_cache(maxsize=256)
def _rules(base: str, allow: tuple[str, ...], deny: tuple[str, ...]) -> tuple[Rule, ...]:
    # most policies of a large set share their system calls with others
    from sandboxd.policy import seccomp  # noqa: PLC0415, its tables are large: load when first asked

    return seccomp.resolve(base, allow, deny)


@dataclass(frozen=True)
class Places:
    """Where the values of a merged tree stand, seen from the file that is being loaded."""

    file: str
    tree: MappingNode
    doubtful: frozenset[str] = frozenset()
    """Paths whose values are not what was meant, because something there is wrong; see ``salvage``."""

    def sure(self, *paths: str) -> bool:
        """Whether nothing about these values, or within these sections, is doubtful."""
        return not any(
            not doubt or f"{path}.".startswith(f"{doubt}.") or doubt.startswith(f"{path}.")
            for doubt in self.doubtful
            for path in paths
        )

    def stand(self, section: str, *paths: str) -> bool:
        """Whether items of a section's lists are there whatever is doubtful: the file itself has them."""
        return self.sure(section) or all(self.is_own(path) for path in paths)

    def origin(self, path: str) -> Origin:
        """The place of a value or of the nearest section around it that somebody wrote."""
        while path:
            found = self.tree.find(path)
            if found is not None:
                return found
            path = path.rpartition(".")[0]
        return self.tree.at

    def is_own(self, path: str) -> bool:
        """Whether the file itself sets the value."""
        at = self.tree.find(path)
        return at is not None and at.file == self.file

    def problem(self, path: str, code: str, message: str) -> PolicyProblem:
        """A problem with the value at a path; one that is inherited is reported where it is inherited."""
        at = self.origin(path)
        if at.file == self.file:
            return at.problem(code, message)
        here = self.tree.find("extends") or self.tree.at
        return here.problem(code, f"{message} (inherited from {at})")


@dataclass(frozen=True, eq=False)
class Policy:
    """What an operator allows: resolved, checked and under the floor. Immutable."""

    name: str
    file: str
    spec: PolicyFile
    """Every value, inherited and default ones included."""
    tree: MappingNode = field(repr=False)
    """The merged nodes that the values were read from."""

    @property
    def description(self) -> str:
        """For people; not part of the digest."""
        return self.spec.description

    @property
    def image(self) -> str:
        """The name of the image; ``host`` stands for this host's own programs."""
        return self.spec.image

    @property
    def shares_host_network(self) -> bool:
        """Whether its calls have the host's own network."""
        return self.spec.network is not None and self.spec.network.mode == "host"

    @property
    def commit(self) -> Literal["exited", "success", "always", "never"]:
        """When a session keeps the files of a call: exited, success, always or never."""
        return self.spec.commit

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """Patterns of the files that are released, each with the largest size in bytes, if any."""
        return self.spec.artifacts

    @cached_property
    def digest(self) -> str:
        """``sha256:…`` of the resolved form."""
        return canonical.digest(self.spec.resolved())

    @cached_property
    def syscalls(self) -> tuple[Rule, ...]:
        """The rules of the seccomp filter. Raises ValueError for names that ``checks`` would refuse."""
        asked = self.spec.syscalls
        return _rules(asked.base, asked.allow, asked.deny)

    def origin(self, path: str) -> Origin:
        """Where the value at a dotted path such as ``limits.memory`` was set.

        An inherited value has the file of the ancestor that set it; a default nobody wrote has line 0.
        """
        return self.tree.find(path) or BUILT_IN

    def info(self, *, resolved: bool = False, problems: tuple[PolicyProblem, ...] = ()) -> PolicyInfo:
        """The wire form of the policy."""
        form: dict[str, Any] | None = self.spec.resolved() if resolved else None
        return PolicyInfo(
            name=self.name,
            digest=self.digest,
            description=self.description,
            file=self.file,
            image=self.image,
            resolved=form,
            problems=list(problems),
        )
