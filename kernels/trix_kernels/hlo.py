"""What a compiled module starts on a GPU, read off its text (`compiled.as_text()`)."""

import re
from typing import NamedTuple

# Instructions that start no kernel; those that call are followed, not counted.
FREE = frozenset(
    "parameter constant iota tuple get-tuple-element bitcast after-all call while "
    "conditional async-done copy-done".split()
)
HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(")
CALLED = re.compile(
    r"(?:to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)"
)
NAME = re.compile(r'op_name="([^"]*)"')


class Launch(NamedTuple):
    """An instruction that starts a kernel, and the scopes it was traced in ("" where
    the compiler made it).
    """

    op: str
    name: str


def launches(text: str) -> list[Launch]:
    """Every launch of a module, those of a loop's body once."""
    bodies, entry = _computations(text)

    def of(computation):
        found = []
        for op, line in bodies[computation]:
            if op in ("call", "while", "conditional"):
                called = re.findall(r"[\w.-]+", " ".join(CALLED.findall(line)))
                found += [launch for name in called for launch in of(name)]
            if op not in FREE:
                name = NAME.search(line)
                found.append(Launch(op, name.group(1) if name else ""))
        return found

    return of(entry)


def while_loops(text: str) -> int:
    """Loops of a module, inside others or not."""
    return sum(" while(" in line for line in text.splitlines())


def _computations(text):
    """Every computation's instructions, operation and line, and the entry's name."""
    bodies: dict[str, list[tuple[str, str]]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            name = head.group(2)
            bodies[name] = []
            entry = name if head.group(1) else entry
        elif name and (instruction := INSTRUCTION.match(line)):
            bodies[name].append((instruction.group(1), line))
    return bodies, entry
