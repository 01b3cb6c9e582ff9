"""Classic BPF: from a verdict per system call number to the bytes that the kernel runs, and back.

The program checks the architecture, then finds the number by binary search over *ranges* of equal
verdict, then, for calls that are filtered by argument, runs that call's tests. libseccomp emits an
instruction or two per call; ranges make the program a fraction of that, which matters because the
kernel emulates the whole program once per number when it is installed (the bitmap of calls that are
always allowed, ``seccomp_cache_prepare`` in kernel/seccomp.c). That emulation follows loads of
``nr`` and ``arch``, jumps and returns alone, so constant verdicts are decided before any argument is
loaded. A number of the x32 ABI is above every range and falls to the default.

``run`` evaluates those same bytes, so what a policy's examples are judged by is what is enforced.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sandboxd.policy.rule import ArgTest

__all__ = ["ALLOW", "ERRNO", "MAX_INSTRUCTIONS", "NOTIFY", "Block", "assemble", "run", "run_any"]

ALLOW = 0x7FFF0000  # SECCOMP_RET_*, linux/seccomp.h
NOTIFY = 0x7FC00000
ERRNO = 0x00050000
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS

LD, AND, JA, JEQ, JGT, JGE, RET = 0x20, 0x54, 0x05, 0x15, 0x25, 0x35, 0x06  # linux/bpf_common.h
NR, ARCH, ARGS = 0, 4, 16  # offsets in struct seccomp_data
FAIL = -1  # a jump to the next alternative, known when the alternative's length is
LOW = 2**32 - 1
INSTRUCTION = struct.Struct("<HBBI")  # struct sock_filter

Instruction = tuple[int, int, int, int]
Block = tuple[tuple[tuple["ArgTest", ...], int], ...]
"""Alternatives in order: the tests that must all hold, and the return value if they do."""


def _half(value: int, offset: int, mask: int, *, negate: bool, skip: int) -> Iterator[Instruction]:
    yield (LD, 0, 0, offset)
    if mask != LOW:
        yield (AND, 0, 0, mask)
    yield (JEQ, FAIL, skip, value) if negate else (JEQ, 0, FAIL, value)


def _test(test: ArgTest) -> Iterator[Instruction]:
    low = ARGS + 8 * test.index  # both architectures are little-endian
    high = low + 4
    value_low, value_high = test.value & LOW, test.value >> 32
    mask_low, mask_high = test.bits & LOW, test.bits >> 32
    match test.op:
        case "eq" | "masked_eq":
            if mask_high:
                yield from _half(value_high, high, mask_high, negate=False, skip=0)
            if mask_low:
                yield from _half(value_low, low, mask_low, negate=False, skip=0)
        case "ne":
            if not test.bits:
                yield (JA, FAIL, 0, 0)
            elif not mask_high or not mask_low:
                value, offset, mask = (
                    (value_low, low, mask_low) if mask_low else (value_high, high, mask_high)
                )
                yield from _half(value, offset, mask, negate=True, skip=0)
            else:
                rest = tuple(_half(value_low, low, mask_low, negate=True, skip=0))
                yield (LD, 0, 0, high)
                if mask_high != LOW:
                    yield (AND, 0, 0, mask_high)
                yield (JEQ, 0, len(rest), value_high)
                yield from rest
        case "ge" | "gt":
            yield (LD, 0, 0, high)
            yield (JGT, 3, 0, value_high)
            yield (JEQ, 0, FAIL, value_high)
            yield (LD, 0, 0, low)
            yield (JGE if test.op == "ge" else JGT, 0, FAIL, value_low)
        case "lt" | "le":
            yield (LD, 0, 0, high)
            yield (JGT, FAIL, 0, value_high)
            yield (JEQ, 0, 2, value_high)
            yield (LD, 0, 0, low)
            yield (JGE if test.op == "lt" else JGT, FAIL, 0, value_low)


def _block(block: Block, default: int) -> list[Instruction]:
    code: list[Instruction] = []
    for tests, verdict in block:
        body = [instruction for test in tests for instruction in _test(test)] + [(RET, 0, 0, verdict)]
        for at, (op, yes, no, value) in enumerate(body):
            out = len(body) - at - 1  # just behind the return: the next alternative
            if op == JA:
                body[at] = (JA, 0, 0, out)
            else:
                body[at] = (op, out if yes == FAIL else yes, out if no == FAIL else no, value)
        code += body
        if not tests:
            return code
    return [*code, (RET, 0, 0, default)]


def _tree(leaves: Sequence[tuple[int, list[Instruction]]]) -> list[Instruction]:
    if len(leaves) == 1:
        return leaves[0][1]
    middle = len(leaves) // 2
    below, above = _tree(leaves[:middle]), _tree(leaves[middle:])
    pivot = leaves[middle][0]
    if len(below) <= 0xFF:
        return [(JGE, len(below), 0, pivot), *below, *above]
    return [(JGE, 0, 1, pivot), (JA, 0, 0, len(below)), *below, *above]


def assemble(audit: int, verdicts: dict[int, int | Block], default: int) -> bytes:
    """The program for one architecture.

    ``verdicts`` maps numbers to a return value or to alternatives by argument; every other number,
    and every other architecture, gets ``default``. Raises ValueError if the kernel would find the
    program too long.
    """
    leaves: list[tuple[int, list[Instruction]]] = []
    previous: int | Block | None = None
    for number in range(max(verdicts, default=-1) + 2):
        verdict = verdicts.get(number, default)
        if verdict != previous:
            code = [(RET, 0, 0, verdict)] if isinstance(verdict, int) else _block(verdict, default)
            leaves.append((number, code))
            previous = verdict
    program = [
        (LD, 0, 0, ARCH),
        (JEQ, 1, 0, audit),
        (RET, 0, 0, default),
        (LD, 0, 0, NR),
        *_tree(leaves),
    ]
    if len(program) > MAX_INSTRUCTIONS:
        raise ValueError(f"the filter has {len(program)} instructions, the kernel takes {MAX_INSTRUCTIONS}")
    return b"".join(INSTRUCTION.pack(*instruction) for instruction in program)


def _jump(op: int, accumulator: int, value: int) -> bool:
    match op:
        case 0x15:  # JEQ
            return accumulator == value
        case 0x25:  # JGT
            return accumulator > value
        case 0x35:  # JGE
            return accumulator >= value
        case 0x45:  # JSET, which libseccomp emits and this compiler does not
            return bool(accumulator & value)
        case _:
            raise ValueError(f"unknown instruction {op:#x}")


def run(program: bytes, number: int, audit: int, args: Sequence[int]) -> int:
    """The return value of the program for one call. Raises ValueError for what is no program."""
    filled = [*(argument & (2**64 - 1) for argument in args), 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<IIQ6Q", number & LOW, audit, 0, *filled)
    code = list(INSTRUCTION.iter_unpack(program))
    accumulator = at = 0
    while at < len(code):
        op, yes, no, value = code[at]
        at += 1
        if op == RET:
            return int(value)
        if op == LD:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif op == AND:
            accumulator &= value
        elif op == JA:
            at += value
        else:
            at += yes if _jump(op, accumulator, value) else no
    raise ValueError("the program does not return")


def run_any(program: bytes, number: int, audit: int) -> int:
    """``ALLOW`` if some arguments are allowed, else the return value for arguments of zero."""
    code = list(INSTRUCTION.iter_unpack(program))
    known = {NR: number & LOW, ARCH: audit}
    seen: set[tuple[int, int | None]] = set()
    todo: list[tuple[int, int | None]] = [(0, 0)]
    while todo:
        state = at, accumulator = todo.pop()
        if state in seen or at >= len(code):
            continue
        seen.add(state)
        op, yes, no, value = code[at]
        at += 1
        if op == RET:
            if value == ALLOW:
                return ALLOW
        elif op == LD:
            todo.append((at, known.get(value)))
        elif op == AND:
            todo.append((at, None if accumulator is None else accumulator & value))
        elif op == JA:
            todo.append((at + value, accumulator))
        elif accumulator is None:
            todo += [(at + yes, None), (at + no, None)]
        else:
            todo.append((at + (yes if _jump(op, accumulator, value) else no), accumulator))
    return run(program, number, audit, ())
