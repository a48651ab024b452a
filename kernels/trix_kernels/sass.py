"""Reads what ptxas and nvdisasm say of a compiled Mosaic GPU kernel."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

# Integer, logic, permute and convert instructions of a lane. Uniform ones (U...) go to
# another unit, once a warp, and are not counted.
DECODE = ("IADD3", "IMAD", "LEA", "LOP3", "PRMT", "SEL", "SHF", "SHL", "SHR", "VIADD",
          "F2F", "F2FP", "I2F", "I2FP", "HADD2", "HMUL2", "HFMA2")  # fmt: skip
MULTIPLY = ("IMAD", "HADD2", "HMUL2", "HFMA2")  # run in the multiply-add pipe
PIPE = 64  # instructions of a lane that each of the two pipes takes in a clock, a core
_MATRIX = ("HGMMA", "IGMMA", "STTM")  # STTM hands a decoded plane to tensor memory
_LOADS = ("LDS", "LDSM")


class Resources(NamedTuple):
    """What a kernel takes of a core; see `Compiled`."""

    registers: int
    spill_bytes: int
    smem_bytes: int
    serialized: bool


class Compiled(NamedTuple):
    """A kernel on packed words as the compiler left it.

    Attributes:
        registers: of a thread.
        spill_bytes: stored and loaded.
        smem_bytes: of a program.
        serialized: whether ptxas makes wgmmas wait for each other, for want of registers.
        decode: `DECODE` instructions of a thread from loads of packed words to the last
            matrix instruction that they feed, by opcode.
        words_loaded: bytes of packed words that a thread loads there, four weights
            each.
    """

    registers: int
    spill_bytes: int
    smem_bytes: int
    serialized: bool
    decode: dict[str, int]
    words_loaded: int

    @property
    def decode_instructions_per_weight(self) -> float:
        """Instructions of a lane for each weight that it decodes."""
        return sum(self.decode.values()) / (4 * self.words_loaded)

    @property
    def decode_clocks_per_weight(self) -> float:
        """Clocks of a core for each weight that it decodes, by the busier of its two
        pipes.
        """
        multiplies = sum(self.decode.get(opcode, 0) for opcode in MULTIPLY)
        busier = max(multiplies, sum(self.decode.values()) - multiplies)
        return busier / (4 * self.words_loaded) / PIPE


def read(folder: Path, stem: str) -> Compiled:
    """Reads the dumps of one kernel on packed words.

    Raises:
        ValueError: one of them does not say what it should.
    """
    decode, loaded = _decode(_instructions((folder / f"{stem}.sass_ctrl").read_text()))
    return Compiled(*resources(folder, stem), decode, loaded)


def resources(folder: Path, stem: str) -> Resources:
    """Reads the dumps of any kernel.

    Raises:
        ValueError: one of them does not say what it should.
    """
    ptxas = (folder / f"{stem}.ptxas").read_text()
    scratch = (folder / f"{stem}.resources.txt").read_text()
    spills = re.findall(r"(\d+) bytes spill", ptxas)
    if len(spills) != 2:
        raise ValueError(
            f"{stem}.ptxas must tell spill stores and loads. Got {ptxas!r}."
        )
    return Resources(
        registers=_number(r"Used (\d+) registers", ptxas),
        spill_bytes=sum(map(int, spills)),
        smem_bytes=_number(r"smem_scratch_bytes=(\d+)", scratch),
        serialized="instructions are serialized" in ptxas,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"{pattern} must be in the compiler's output. Got {text!r}.")
    return int(found.group(1))


def _instructions(text: str) -> list[str]:
    """Opcodes with their suffixes, in order."""
    pattern = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]+)")
    return [m.group(1) for line in text.splitlines() if (m := pattern.search(line))]


def _decode(opcodes: list[str]) -> tuple[dict[str, int], int]:
    """Counts from each run of word loads to the last matrix instruction that follows
    it.
    """
    counted: Counter[str] = Counter()
    pending: Counter[str] = Counter()
    loaded, inside, consumed = 0, False, False
    for opcode in opcodes:
        base = opcode.split(".")[0]
        if base in _LOADS and _bytes(opcode) >= 8:
            if consumed:
                pending.clear()
            loaded, inside, consumed = loaded + _bytes(opcode), True, False
        elif inside and base in _MATRIX:
            counted, consumed = counted + pending, True
            pending.clear()
        elif inside and base in DECODE:
            pending[base] += 1
    if not loaded or not counted:
        raise ValueError(
            "The kernel must load packed words before a matrix instruction."
        )
    return dict(counted), loaded


def _bytes(opcode: str) -> int:
    """Bytes that a shared memory load brings to a thread."""
    if opcode.startswith("LDSM"):
        return 4 * int(opcode.rsplit(".", 1)[1]) if opcode[-1].isdigit() else 4
    widths = {"64": 8, "128": 16}
    return next((n for part, n in widths.items() if part in opcode.split(".")), 4)
