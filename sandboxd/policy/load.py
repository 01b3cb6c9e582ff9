"""Policy files become a ``PolicySet``: either a policy is whole and checked, or it is not in the set
and its problems say why, all of them at once.

Theory of operation. Each file is read on its own: text to tree (``source``), tree against the schema
(``diagnosis``). Then, parents first: the tree is merged with its parent's (``inherit``), what the
floors deny is added, the merged tree is validated again, and the result is checked for what makes no
sense (``checks``), against the floors (``floor``), and by its own examples (``examples``). A file that
is wrong anywhere makes no policy, and neither do those that extend it. A file in a later directory
replaces one of the same name in an earlier one even when it is wrong: falling back to the other would
run calls under a policy that the operator had replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.policy.checks import UNSUPPORTED, check, check_syscalls
from sandboxd.policy.diagnosis import validate
from sandboxd.policy.examples import check_examples
from sandboxd.policy.floor import Floor, make_floor
from sandboxd.policy.inherit import combine, nearest
from sandboxd.policy.resolved import Places, Policy
from sandboxd.policy.schema import PolicyFile
from sandboxd.policy.source import MappingNode, Origin, ScalarNode, SequenceNode, is_removal, parse, read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sandboxd.models import PolicyProblem

__all__ = ["PolicySet", "check_text", "load_policies", "policy_files", "rebuild", "shipped_policies"]

FLOOR = "floor"
ENDINGS = (".yaml", ".yml")  # the second only to be told from a file that is no policy
MAX_FILES = 10_000
MAX_PARENTS = 16
MAX_NAMES = 1024  # of system calls, as in the schema


@dataclass(frozen=True)
class PolicySet:
    """The policies of one moment. Immutable; a reload makes another."""

    policies: Mapping[str, Policy] = field(default_factory=dict)
    problems: tuple[PolicyProblem, ...] = ()
    floors: tuple[Floor, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """The file of every name, also of those that are no policy because of their problems."""
    floor_failed: bool = False
    """A floor has errors: there are no policies, because nobody can say what it would have forbidden."""

    def get(self, name: str) -> Policy:
        """The policy of a name.

        Raises NotFound, with the nearest name; for a file that is no policy, PolicyInvalid, or
        ControlNotSupported where nothing is wrong but what this release does not enforce.
        """
        found = self.policies.get(name)
        if found is not None:
            return found
        if name not in self.files:
            raise errors.NotFound(f"there is no policy {name!r}{nearest(name, self.names())}", policy=name)
        # a floor that has errors stands in the way of every policy, whatever the file says
        problems = self.problems_of(name) or self.problems
        unsupported = problems and all(problem.code == UNSUPPORTED for problem in problems)
        kind = errors.ControlNotSupported if unsupported else errors.PolicyInvalid
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        first = f": {problems[0]}{more}" if problems else ""
        raise kind(
            f"policy {name!r} is not in force{first}",
            policy=name,
            problems=[problem.model_dump() for problem in problems],
        )

    def names(self) -> list[str]:
        """The names of all policies, sorted."""
        return sorted(self.policies)

    def problems_of(self, name: str) -> tuple[PolicyProblem, ...]:
        """The problems of the file that stands for a name."""
        return tuple(problem for problem in self.problems if problem.file == self.files.get(name))


@dataclass(frozen=True)
class _File:
    """One file as it was read: no tree means that reading stopped, problems that it is no policy."""

    name: str
    file: str
    tree: MappingNode | None
    problems: tuple[PolicyProblem, ...]

    @property
    def parent(self) -> str | None:
        node = self.tree.get("extends") if self.tree else None
        # the schema says what is wrong with anything else
        return node.value if isinstance(node, ScalarNode) and isinstance(node.value, str) else None

    def at(self, key: str) -> Origin:
        """The place of a top-level value."""
        node = self.tree.get(key) if self.tree else None
        return node.at if node else Origin(self.file, 1, 1)


def shipped_policies() -> Path:
    """The directory of the policies that come with the package."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_shipped" / "policies"
    return installed if installed.is_dir() else package.parent / "policies"


def policy_files(dirs: Sequence[Path]) -> list[Path]:
    """The policy files of the directories, in order. A directory that does not exist has none."""
    found: list[Path] = []
    for directory in dirs:
        try:
            names = sorted(entry.name for entry in directory.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            continue
        # hidden names are what editors write beside the file: .#python.yaml, .python.yaml.swp
        found += [directory / name for name in names if name.endswith(ENDINGS) and not name.startswith(".")]
    return found[:MAX_FILES]


def _read_file(text: str, file: str, name: str | None) -> _File:
    tree, problems = parse(text, file)
    if tree is None:
        return _File(name or "", file, None, tuple(problems))
    spec, wrong = validate(PolicyFile, tree)
    problems += wrong
    if spec is None:
        problems += _named_syscalls(tree, Places(file, tree))
    written = tree.get("name")
    if spec is not None and name is not None and spec.name != name:
        at = written.at if written else tree.at
        problems.append(at.problem("bad_value", f"name {spec.name!r} must be that of the file, {name!r}"))
    if spec is not None and spec.name == FLOOR:
        problems.append((written or tree).at.problem("bad_value", "floor is not a policy's name"))
    own = name if name is not None else (spec.name if spec else "")
    return _File(own, file, tree, tuple(problems))


def _named_syscalls(tree: MappingNode, places: Places) -> list[PolicyProblem]:
    """What is wrong with the system calls that a file names, whatever else is wrong in it.

    They need no whole policy, and all errors of a file come at once.
    """
    section = tree.get("syscalls")
    names: dict[str, list[str]] = {"allow": [], "deny": []}
    for key, found in names.items():
        node = section.get(key) if isinstance(section, MappingNode) else None
        items = node.items if isinstance(node, SequenceNode) else ()
        found += [
            item.value for item in items if isinstance(item, ScalarNode) and isinstance(item.value, str)
        ]
        # the schema says what is wrong with anything else; what is removed would shift the places
        if len(found) != len(items) or len(items) > MAX_NAMES or any(map(is_removal, items)):
            return []
    return check_syscalls(names["allow"], names["deny"], places)


def _load_file(path: Path) -> _File:
    if path.suffix != ".yaml":
        at = Origin(str(path), 1, 1)
        return _File(
            path.stem, str(path), None, (at.problem("unreadable", "rename this file to end in .yaml"),)
        )
    text, problems = read(path)
    if text is None:
        return _File(path.stem, str(path), None, tuple(problems))
    return _read_file(text, str(path), path.stem)


def _build(
    file: _File, tree: MappingNode, floors: Sequence[Floor]
) -> tuple[Policy | None, list[PolicyProblem]]:
    """A policy of a merged tree, or everything that is wrong with it."""
    for floor in floors:
        tree = floor.apply(tree)
    places = Places(file.file, tree)
    spec, problems = validate(PolicyFile, tree)
    if spec is None:
        return None, [_here(problem, places) for problem in problems]
    problems = check(spec, places)
    problems += chain.from_iterable(floor.exceeded(spec, places) for floor in floors)
    if problems:
        # the examples would be judged by rules that nobody can have
        return None, problems
    policy = Policy(spec.name, file.file, spec, tree)
    problems = list(check_examples(policy, places))
    return (None if problems else policy), problems


def _here(problem: PolicyProblem, places: Places) -> PolicyProblem:
    """A problem of an inherited line, reported in the file that inherits it."""
    if problem.file == places.file:
        return problem
    at = places.tree.find("extends") or places.tree.at
    return at.problem(problem.code, f"{problem.message} (inherited from {problem.file}:{problem.line})")


def rebuild(policy: Policy, floors: Sequence[Floor]) -> tuple[Policy | None, list[PolicyProblem]]:
    """A policy that was good before, under the floors of now; or why it cannot stay."""
    return _build(_File(policy.name, policy.file, policy.tree, ()), policy.tree, floors)


class _Resolution:
    """Parents before children; every file is resolved once."""

    def __init__(self, files: Mapping[str, _File], floors: Sequence[Floor]) -> None:
        self.files = files
        self.floors = floors
        self.done: dict[str, Policy | None] = {}
        self.problems: list[PolicyProblem] = []

    def run(self) -> dict[str, Policy]:
        for name in self.files:
            if name in self.done:
                continue
            for step in (*reversed(self.ancestors(name)), name):
                if step not in self.done:
                    self.done[step] = self.resolve(self.files[step])
        return {name: policy for name, policy in self.done.items() if policy is not None}

    def ancestors(self, name: str) -> list[str]:
        """The parents of a file that exist, nearest first, each once; ends where they come back."""
        line: dict[str, None] = {}
        parent = self.files[name].parent
        while parent is not None and parent in self.files and parent not in line:
            line[parent] = None
            parent = self.files[parent].parent
        return list(line)

    def parent_problem(self, file: _File, parent: str) -> PolicyProblem | None:
        at = file.at("extends")
        if parent not in self.files:
            others = [name for name in self.files if name not in {"", file.name}]
            return at.problem("unknown_policy", f"there is no policy {parent!r}{nearest(parent, others)}")
        line = self.ancestors(file.name)
        if file.name in line:
            circle = [file.name, *line[: line.index(file.name) + 1]]
            return at.problem(
                "extends_cycle", f"extends goes in a circle: {' -> '.join(circle[:MAX_PARENTS])}"
            )
        if len(line) > MAX_PARENTS:
            return at.problem("too_large", f"a policy has at most {MAX_PARENTS} ancestors")
        if self.done.get(parent) is None:
            return at.problem("bad_parent", f"{parent!r} has errors of its own ({self.files[parent].file})")
        return None

    def resolve(self, file: _File) -> Policy | None:
        problems = list(file.problems)
        parent = file.parent
        if parent is not None:
            wrong = self.parent_problem(file, parent)
            problems += [wrong] if wrong else []
        policy = None
        if file.tree is not None and not problems:
            inherited = self.done[parent] if parent is not None else None
            tree, problems = combine(file.tree, inherited.tree if inherited else None)
            if not problems:
                policy, problems = _build(file, tree, self.floors)
        self.problems += sorted(problems, key=lambda problem: (problem.line, problem.column))
        return policy


def _load_floors(paths: Sequence[Path]) -> tuple[list[Floor], list[PolicyProblem]]:
    floors: list[Floor] = []
    problems: list[PolicyProblem] = []
    for path in paths:
        text, wrong = read(path)
        tree = None
        if text is not None:
            tree, wrong = parse(text, str(path))
        if tree is not None:
            floor, more = make_floor(tree, str(path))
            wrong += more
            floors += [floor] if floor and not wrong else []
        problems += wrong
    return floors, problems


def load_policies(dirs: Sequence[Path], floor: Path | None = None) -> PolicySet:
    """All policies of the directories, a later one of the same name in place of an earlier one.

    ``floor`` and every ``floor.yaml`` of the directories hold for all of them; while a floor has
    errors there is no policy at all, because nobody can say what it would have forbidden. Raises
    nothing for what is in a file: that is in ``problems``. Raises OSError if a directory cannot be
    listed.
    """
    listed = policy_files(dirs)
    floor_paths = [path for path in listed if path.stem == FLOOR]
    if floor is not None and floor not in floor_paths:
        floor_paths.append(floor)
    floors, problems = _load_floors(floor_paths)
    chosen = {path.stem: path for path in listed if path not in floor_paths}
    names = {name: str(path) for name, path in chosen.items()}
    if problems:
        return PolicySet({}, tuple(problems), (), names, floor_failed=True)
    resolution = _Resolution({name: _load_file(path) for name, path in chosen.items()}, floors)
    policies = resolution.run()
    return PolicySet(policies, tuple(resolution.problems), tuple(floors), names)


def check_text(text: str, file: str, base: PolicySet) -> list[PolicyProblem]:
    """Everything that is wrong with a text, were it a policy file beside those of ``base``.

    ``file`` is only a name for the problems; ``X.yaml`` also says that the policy must be called X.
    """
    path = PurePath(file)
    if path.name == f"{FLOOR}.yaml":
        tree, problems = parse(text, file)
        return problems + (make_floor(tree, file)[1] if tree else [])
    read_as = _read_file(text, file, path.stem if path.suffix == ".yaml" else None)
    files = {name: _File(name, policy.file, policy.tree, ()) for name, policy in base.policies.items()}
    resolution = _Resolution({**files, read_as.name: read_as}, base.floors)
    resolution.done = {name: policy for name, policy in base.policies.items() if name != read_as.name}
    resolution.done[read_as.name] = resolution.resolve(read_as)
    return resolution.problems
