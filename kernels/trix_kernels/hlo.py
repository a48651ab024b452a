"""What a compiled module starts on a GPU, and what each launch reads, writes and
multiplies, read off its text (`compiled.as_text()`).
"""

import math
import re
from typing import NamedTuple

# Instructions that start no kernel; those that call are followed, not counted.
FREE = frozenset(
    "parameter constant iota tuple get-tuple-element bitcast after-all call while "
    "conditional async-done copy-done".split()
)
HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\(([^)]*)\)"
)
CALLED = re.compile(
    r"(?:to_apply|body|condition|calls|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)"
)
NAME = re.compile(r'op_name="([^"]*)"')
TARGET = re.compile(r'custom_call_target="([^"]*)"')
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


class Shape(NamedTuple):
    """An array's type."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of all elements; none of what is no array."""
        named = re.search(r"\d+", self.dtype)
        bits = 8 if self.dtype == "pred" else int(named.group()) if named else 0
        return bits * math.prod(self.sizes) // 8


class Launch(NamedTuple):
    """An instruction that starts a kernel.

    Attributes:
        op: the operation.
        name: the scopes it was traced in, "" where the compiler made it.
        target: of a custom call, else "".
        operands, results: the arrays that it reads and writes.
        macs: multiply-accumulates of its matrix products at the rate of bfloat16: float32
            (as TF32) counts twice. What a custom call computes is not known.
        turns: of the loops that it is in, 1 of one whose turns the compiler does not
            know.
    """

    op: str
    name: str
    target: str = ""
    operands: tuple[Shape, ...] = ()
    results: tuple[Shape, ...] = ()
    macs: int = 0
    turns: int = 1

    @property
    def bytes(self) -> int:
        """Read and written, each operand once: what is read again, by gathers for one,
        is taken to come from the L2 cache.
        """
        return sum(a.bytes for a in (*self.operands, *self.results))


class _Instruction(NamedTuple):
    name: str
    results: tuple[Shape, ...]
    op: str
    operands: tuple[str, ...]
    line: str

    @property
    def called(self) -> list[str]:
        return re.findall(r"[\w.-]+", " ".join(CALLED.findall(self.line)))


def launches(text: str) -> list[Launch]:
    """Every launch of a module, those of a loop's body once."""
    bodies, entry = _computations(text)

    def of(computation):
        types, found = {i.name: i.results for i in bodies[computation]}, []
        for one in bodies[computation]:
            if one.op in ("call", "while", "conditional"):
                known = TURNS.search(one.line)
                turns = int(known.group(1)) if known else 1
                called = (launch for name in one.called for launch in of(name))
                found += [x._replace(turns=turns * x.turns) for x in called]
            if one.op not in FREE:
                found.append(_launch(one, types, bodies))
        return found

    return of(entry)


def while_loops(text: str) -> int:
    """Loops of a module, inside others or not."""
    return sum(" while(" in line for line in text.splitlines())


def _launch(one, types, bodies):
    name, target = NAME.search(one.line), TARGET.search(one.line)
    parts = [bodies[called] for called in one.called if called in bodies]
    return Launch(
        one.op,
        name.group(1) if name else "",
        target.group(1) if target else "",
        tuple(a for operand in one.operands for a in types.get(operand, ())),
        one.results,
        sum(map(_macs, parts)),
    )


def _macs(instructions):
    """Of the matrix products of a fusion."""
    types, macs = {i.name: i.results for i in instructions}, 0
    for one in instructions:
        contracted = CONTRACTED.search(one.line)
        if one.op == "dot" and contracted:
            ((left,), (result,)) = types[one.operands[0]], one.results
            along = [left.sizes[int(i)] for i in contracted.group(1).split(",") if i]
            twice = 2 if left.dtype == "f32" else 1
            macs += twice * math.prod(result.sizes) * math.prod(along)
    return macs


def _computations(text):
    """Every computation's instructions, and the entry's name."""
    bodies: dict[str, list[_Instruction]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            name = head.group(2)
            bodies[name] = []
            entry = name if head.group(1) else entry
        elif name and (found := INSTRUCTION.match(line)):
            own, results, op, operands = found.groups()
            read = tuple(dict.fromkeys(re.findall(r"%([\w.-]+)", operands)))
            bodies[name].append(_Instruction(own, _arrays(results), op, read, line))
    return bodies, entry


def _arrays(text):
    return tuple(
        Shape(dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in ARRAY.findall(text)
    )
