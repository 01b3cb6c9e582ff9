"""Policy files become a ``PolicySet``: either a policy is whole and checked, or it is not in the set
and its problems say why, all of them at once.

Theory of operation. Each file is read on its own: text to tree (``source``), tree against the schema
(``diagnosis``). Then, parents first: the tree is merged with its parent's (``inherit``), what the
floors deny is added, the merged tree is validated again, and the result is checked for what makes no
sense (``checks``), against the floors (``floor``), and by its own examples (``examples``). What is left
of a tree that the schema refuses goes the same way (``salvage``). A file that is wrong anywhere makes no
policy, and neither do those that extend it; but one that is only wider than a floor can be extended by
one that is not, since floors judge what would be in force. A file in a later directory
replaces one of the same name in an earlier one even when it is wrong: falling back to the other would
run calls under a policy that the operator had replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from sandboxd import errors
from sandboxd.policy.checks import UNSUPPORTED, check
from sandboxd.policy.diagnosis import validate
from sandboxd.policy.examples import check_examples
from sandboxd.policy.floor import Floor, make_floor
from sandboxd.policy.inherit import combine, nearest
from sandboxd.policy.resolved import Places, Policy
from sandboxd.policy.salvage import ALL, salvage, section_at
from sandboxd.policy.schema import PolicyFile
from sandboxd.policy.source import MAX_PROBLEMS, MappingNode, Origin, ScalarNode, parse, read

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sandboxd.models import PolicyProblem

__all__ = [
    "PolicySet",
    "check_text",
    "load_policies",
    "policy_files",
    "rebuild",
    "recorded",
    "shipped_policies",
]

FLOOR = "floor"
ENDINGS = (".yaml", ".yml")  # the second only to be told from a file that is no policy
MAX_FILES = 10_000
MAX_PARENTS = 16


@dataclass(frozen=True)
class PolicySet:
    """The policies of one moment. Immutable; a reload makes another."""

    policies: Mapping[str, Policy] = field(default_factory=dict)
    problems: tuple[PolicyProblem, ...] = ()
    floors: tuple[Floor, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """The file of every name, also of those that are no policy because of their problems."""
    parents: Mapping[str, MappingNode] = field(default_factory=dict)
    """The merged tree of every file that can be extended, also of those that are wider than a floor."""
    causes: Mapping[str, PolicyProblem] = field(default_factory=dict)
    """Why each other file cannot be extended."""
    host_network: bool = False
    """Whether the daemon's configuration lets policies have the host's network."""
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
    part: MappingNode | None = None
    """What of the tree can be merged and checked: all of it, or what is left without its errors."""
    doubtful: frozenset[str] = frozenset()
    """Paths of that part whose values are not what was meant."""

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
    part: MappingNode | None = tree
    doubtful = frozenset(section_at(tree, problem) for problem in problems)
    spec, wrong = validate(PolicyFile, tree)
    problems += wrong
    if spec is None:
        part, more = salvage(tree)
        doubtful |= more
    written = tree.get("name")
    if spec is not None and name is not None and spec.name != name:
        at = written.at if written else tree.at
        problems.append(at.problem("bad_value", f"name {spec.name!r} must be that of the file, {name!r}"))
    if spec is not None and spec.name == FLOOR:
        problems.append((written or tree).at.problem("bad_value", "floor is not a policy's name"))
    own = name if name is not None else (spec.name if spec else "")
    return _File(own, file, tree, tuple(problems), part, doubtful)


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
    file: _File, tree: MappingNode, floors: Sequence[Floor], *, host_network: bool
) -> tuple[Policy | None, list[PolicyProblem]]:
    """A policy of a merged tree, or everything that is wrong with it but what the file's reading found."""
    for floor in floors:
        tree = floor.apply(tree)
    places = Places(file.file, tree, file.doubtful)
    spec, problems = validate(PolicyFile, tree)
    if spec is None:
        return None, [_here(problem, places) for problem in problems]
    found = check(spec, places, host_network=host_network)
    problems = [*chain.from_iterable(found.values())]
    problems += chain.from_iterable(floor.exceeded(spec, places) for floor in floors)
    policy = Policy(spec.name, file.file, spec, tree)
    # examples are not judged by rules that nobody can have
    refused = {section for section, wrong in found.items() if wrong}
    problems += check_examples(policy, replace(places, doubtful=places.doubtful | refused))
    return (None if problems else policy), problems


def _here(problem: PolicyProblem, places: Places) -> PolicyProblem:
    """A problem of an inherited line, reported in the file that inherits it."""
    if problem.file == places.file:
        return problem
    at = places.tree.find("extends") or places.tree.at
    return at.problem(problem.code, f"{problem.message} (inherited from {problem.file}:{problem.line})")


def rebuild(policy: Policy, current: PolicySet) -> tuple[Policy | None, list[PolicyProblem]]:
    """A policy that was good before, under the floors of now; or why it cannot stay."""
    file = _File(policy.name, policy.file, policy.tree, ())
    return _build(file, policy.tree, current.floors, host_network=current.host_network)


def recorded(text: str, name: str, current: PolicySet) -> tuple[Policy | None, list[PolicyProblem]]:
    """A policy of the JSON of its merged tree, under the floors of now; or why it cannot be one."""
    where = f"{name}, as it was recorded"
    tree, problems = parse(text, where)
    if tree is None or problems:
        return None, problems
    return _build(_File(name, where, tree, ()), tree, current.floors, host_network=current.host_network)


class _Resolution:
    """Parents before children; every file is resolved once."""

    def __init__(self, files: Mapping[str, _File], floors: Sequence[Floor], *, host_network: bool) -> None:
        self.files = files
        self.floors = floors
        self.host_network = host_network
        self.policies: dict[str, Policy] = {}
        self.parents: dict[str, MappingNode] = {}
        self.causes: dict[str, PolicyProblem] = {}
        """Why a file is no parent: its own first problem, or that of the ancestor that has one."""
        self.problems: list[PolicyProblem] = []

    def run(self) -> None:
        done: set[str] = set()
        for name in self.files:
            if name in done:
                continue
            for step in (*reversed(self.ancestors(name)), name):
                if step not in done:
                    done.add(step)
                    self.resolve(self.files[step])

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
        if parent not in self.parents:
            return at.problem("bad_parent", f"{parent!r} cannot be extended: {self.causes[parent]}")
        return None

    def resolve(self, file: _File) -> None:
        """The policy of a file, and the tree that others may extend, or what is wrong with it."""
        parent = file.parent
        wrong = self.parent_problem(file, parent) if parent is not None else None
        problems = [*file.problems, *([wrong] if wrong else [])]
        if file.tree is not None and file.part is not None:
            inherited = self.parents[parent] if parent is not None and wrong is None else None
            tree, removals = combine(file.part, inherited)
            doubtful = file.doubtful
            if wrong or "extends" in doubtful:
                doubtful |= ALL  # nobody knows what it would inherit
            else:
                problems += removals
                doubtful |= {section_at(file.tree, problem) for problem in removals}
            problems = self.judge(replace(file, doubtful=doubtful), tree, problems)
        if file.name not in self.parents and file.name not in self.causes:
            above = self.causes.get(parent or "") if wrong else None
            self.causes[file.name] = above or problems[0]
        problems.sort(key=lambda problem: (problem.line, problem.column))
        self.problems += problems[:MAX_PROBLEMS]

    def judge(self, file: _File, tree: MappingNode, problems: list[PolicyProblem]) -> list[PolicyProblem]:
        """Take in what a merged tree is good for; ``problems`` and what is wrong with the tree."""
        policy, found = _build(file, tree, self.floors, host_network=self.host_network)
        if problems:
            return problems + found
        # what is wider than a floor can still be the parent of what is not
        own = found
        if policy is None and self.floors:
            own = _build(file, tree, (), host_network=self.host_network)[1]
        if own:
            self.causes[file.name] = own[0]
        else:
            self.parents[file.name] = tree
        if policy is not None:
            self.policies[file.name] = policy
        return found


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


def load_policies(
    dirs: Sequence[Path], floor: Path | None = None, *, host_network: bool = False
) -> PolicySet:
    """All policies of the directories, a later one of the same name in place of an earlier one.

    ``floor`` and every ``floor.yaml`` of the directories hold for all of them; while a floor has
    errors there is no policy at all, because nobody can say what it would have forbidden.
    ``host_network``: whether the daemon's configuration lets policies have the host's network. Raises
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
        return PolicySet({}, tuple(problems), (), names, host_network=host_network, floor_failed=True)
    files = {name: _load_file(path) for name, path in chosen.items()}
    resolution = _Resolution(files, floors, host_network=host_network)
    resolution.run()
    return PolicySet(
        resolution.policies,
        tuple(resolution.problems),
        tuple(floors),
        names,
        resolution.parents,
        resolution.causes,
        host_network,
    )


def check_text(text: str, file: str, base: PolicySet) -> list[PolicyProblem]:
    """Everything that is wrong with a text, were it a policy file beside those of ``base``.

    ``file`` is only a name for the problems; ``X.yaml`` also says that the policy must be called X.
    """
    path = PurePath(file)
    if path.name == f"{FLOOR}.yaml":
        tree, problems = parse(text, file)
        return problems + (make_floor(tree, file)[1] if tree else [])
    read_as = _read_file(text, file, path.stem if path.suffix == ".yaml" else None)
    beside = {name: _File(name, where, base.parents.get(name), ()) for name, where in base.files.items()}
    files = {**beside, read_as.name: read_as}
    resolution = _Resolution(files, base.floors, host_network=base.host_network)
    resolution.parents = {name: tree for name, tree in base.parents.items() if name != read_as.name}
    resolution.causes = {
        # with a floor that has errors nothing was resolved, and it is the reason
        name: base.causes.get(name) or base.problems[0]
        for name in base.files
        if name not in base.parents and name != read_as.name
    }
    resolution.resolve(read_as)
    return resolution.problems
