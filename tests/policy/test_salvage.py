"""All errors of a file come at once, and none that only follows from another."""

from __future__ import annotations

from typing import Any

import pytest


def test_checks_floor_and_examples_are_run_on_what_is_right_of_a_file(folder: Any) -> None:
    folder.write("floor", "limits: {pids: 32}\n")
    folder.write("parent", "limits: {pids: 8}\n")
    folder.write(
        "p",
        "extends: parent\n"
        "description: [no text]\n"
        "limits:\n"
        "  wal: 1s\n"
        "  pids: 33\n"
        "  memory: 64MiB\n"
        "process: {umask: 9, usr: 0}\n"
        "mounts:\n"
        "  - {source: /a, target: /x}\n"
        "  - {source: data, target: /y}\n"
        "  - {source: /b, target: /x/y}\n"
        "artifacts: [{path: a}, {path: a}, {pth: b}]\n"
        "network: {allow: [{host: a.example, ports: [443]}]}\n"
        "syscalls: {allow: [ptrace], deny: [kill]}\n"
        "examples:\n"
        "  allows: [syscall kill, write usr, connect a.example:443]\n"
        "  denies: [syscall ptrace, write /workspace/x, syscall ptrase]\n",
    )
    assert folder.codes() == [
        ("wrong_type", 4),
        ("unknown_key", 6),
        ("wider_than_floor", 7),
        ("impossible", 8),
        ("bad_value", 9),
        ("unknown_key", 9),
        ("bad_value", 12),
        ("impossible", 13),
        ("impossible", 14),
        ("missing_key", 14),
        ("unknown_key", 14),
        ("wider_than_floor", 15),
        ("wrong_example", 18),
        ("bad_value", 18),
        ("wrong_example", 19),
        ("bad_value", 19),
    ]


SIZES = "limits: {MEMORY, workspace: {size: 900MiB}}\n"
BIG_ROOT = "filesystem: {root: overlay, size: 600MiB}\n"
WRITABLE = "filesystem: {root: overlay, size: 1MiB}\nexamples: {denies: [write /x/y]}\n"
INJECTED = "network: {allow: [{host: a.b, ports: [1], inject: {header: X, value: '{secret:A}'}}]}\n"
PTRACE = "examples: {allows: [syscall ptrace]}\n"


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        (SIZES.replace("MEMORY", "memroy: 1GiB"), ["unknown_key"]),
        (SIZES.replace("MEMORY", "mem: 1GiB"), ["unknown_key"]),
        (SIZES.replace("MEMORY", "memory: 1GB2"), ["bad_value"]),
        (SIZES.replace("MEMORY", "memory: "), ["wrong_type"]),
        (SIZES.replace("MEMORY", "wal: 1s"), ["impossible", "unknown_key"]),
        (f"limts: {{memory: 1GiB}}\n{BIG_ROOT}", ["unknown_key"]),
        (f"much: {{memory: 1GiB}}\n{BIG_ROOT}", ["unknown_key"]),
        (f"limits: {{pids: 1}}\nlimits: {{memory: 1GiB}}\n{BIG_ROOT}", ["duplicate_key"]),
        ("filesystem: {root: overly, size: 1MiB}\n", ["bad_value"]),
        (f"syscalls: {{alow: [ptrace]}}\n{PTRACE}", ["unknown_key"]),
        (f"sycalls: {{allow: [ptrace]}}\n{PTRACE}", ["unknown_key"]),
        (f"syscalls: {{allow: [ptrase]}}\n{PTRACE}", ["unknown_syscall"]),
        (f"syscalls: {{allow: [7]}}\n{PTRACE}", ["wrong_type"]),
        (f"something: {{allow: [ptrace]}}\n{PTRACE}", ["unknown_key"]),
        (f"extends: [parent]\n{PTRACE}", ["wrong_type"]),
        ("network: {mode: non, allow: [{host: a.b, ports: [1]}]}\n", ["bad_value"]),
        (f"mounts: [{{source: /a, target: x}}]\n{WRITABLE}", ["bad_value"]),
        (
            f"secrets: [{{nam: A, as: proxy}}]\n{INJECTED}",
            ["missing_key", "unknown_key"],
        ),
    ],
)
def test_nothing_is_said_of_what_depends_on_a_wrong_value(folder: Any, text: str, codes: list[str]) -> None:
    folder.write("p", text)
    assert sorted(code for code, _ in folder.codes()) == codes


@pytest.mark.parametrize(
    ("parent", "text", "codes"),
    [
        (
            "limits: {stdout: {on_limit: truncate}}\n",
            "limits: {stdout: {on_limit: kil}, stderr: {on_limit: kill}}\n",
            ["bad_value"],
        ),
        (
            "mounts: [{source: /a, target: /x}]\n",
            "mounts: [!remove /y, {source: /b, target: /x}]\n",
            ["bad_remove"],
        ),
        (
            "syscalls: {deny: [ptrace]}\n",
            f"syscalls: {{allow: [ptrace], deny: [!remove ptrac]}}\n{PTRACE}",
            ["bad_remove"],
        ),
        # the same of its own is wrong whatever it inherits
        (
            "syscalls: {deny: [ptrace]}\n",
            f"syscalls: {{allow: [fork], deny: [!remove ptrac, fork, bp]}}\n{PTRACE}",
            ["bad_remove", "impossible", "unknown_syscall"],
        ),
    ],
)
def test_nothing_is_said_of_what_is_inherited_for_a_mistake(
    folder: Any, parent: str, text: str, codes: list[str]
) -> None:
    folder.write("parent", parent)
    folder.write("p", f"extends: parent\n{text}")
    assert sorted(code for code, _ in folder.codes()) == codes


def test_nothing_is_said_of_what_a_broken_parent_might_have_set(folder: Any) -> None:
    folder.write("parent", "limits: {memory: 1GB2}\n")
    path = folder.write(
        "p",
        f"extends: parent\n{SIZES.replace('MEMORY, ', '')}{PTRACE}"
        "syscalls: {allow: [fork], deny: [fork, bp, !remove bpf]}\n",
    )
    found = [problem for problem in folder.load().problems if problem.file == str(path)]
    assert [problem.code for problem in found] == ["bad_parent", "impossible", "unknown_syscall"]


def test_a_flow_mapping_does_not_say_where_a_key_was_dropped(folder: Any) -> None:
    path = folder.write("p")
    path.write_text("{version: 1, name: p, limits: {memory: 64MiB}, filesystem: {size: 1MiB}, limits: {}}")
    assert folder.codes() == [("duplicate_key", 1)]


def test_what_nothing_can_be_made_of_is_left_at_its_own_errors(folder: Any) -> None:
    folder.write("p", "".join(f"key{number}: 1\n" for number in range(5000)) + PTRACE)
    assert {code for code, _ in folder.codes()} == {"unknown_key"}
    folder.write("p", "version: 2\nname: A\nimage: 3\nsyscalls: {allow: [bp]}\n")
    assert [code for code, _ in folder.codes()] == ["bad_value", "bad_value", "wrong_type", "unknown_syscall"]
