"""What single threads of a warpgroup do, in the operations of MLIR: Pallas has no words for
copies that each thread addresses itself.
"""

from collections.abc import Callable, Iterable
from typing import Any

from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, nvvm
from jax.experimental.mosaic.gpu import utils

BYTES = 16  # of a copy


class Number:
    """`value + constant`: a 32-bit integer of a thread, not negative, in formulas with
    Python's integers. Constants stay apart until they are part of an address, where they
    cost no register.
    """

    def __init__(self, value: Any, constant: int = 0):
        self.value, self.constant = value, constant

    def __add__(self, other: "Number | int") -> "Number":
        if isinstance(other, int):
            return Number(self.value, self.constant + other)
        total = self.constant + other.constant
        return Number(arith.addi(self.value, other.value), total)

    def __mul__(self, other: int) -> "Number":
        return Number(self._with(arith.muli, other), self.constant * other)

    def __floordiv__(self, other: int) -> "Number":
        return Number(self._whole()._with(arith.divui, other))

    def __mod__(self, other: int) -> "Number":
        return Number(self._whole()._with(arith.remui, other))

    def __xor__(self, other: "Number") -> "Number":
        value = arith.xori(self._whole().value, other._whole().value)
        return Number(value)

    def _whole(self):
        return Number(self._with(arith.addi, self.constant)) if self.constant else self

    def _with(self, operation, other):
        return operation(self.value, utils.c(other, ir.IntegerType.get_signless(32)))

    def after(self, pointer: Any, of: Any) -> Any:
        """The pointer to this element behind `pointer`, of elements of a type."""
        pointer = utils.getelementptr(pointer, [self.value], of)
        return utils.getelementptr(pointer, [self.constant], of)


def copy_rows(
    x: Any, rows: Any, smem: Any, pieces_of: Callable[[Any], Iterable]
) -> None:
    """Starts `smem[byte] = x[rows[row], column]`, 16 bytes each, of every piece of this
    thread; 0 where the row's number is negative.

    Args:
        x: `[T, _]` of two bytes each, in global memory.
        rows: int32, there too.
        pieces_of: the pieces of a thread of its warpgroup.
    """
    i8, i32, i64 = (ir.IntegerType.get_signless(n) for n in (8, 32, 64))
    (stride, _), _ = ir.MemRefType(x.type).get_strides_and_offset()
    x_at, rows_at, smem_at = _global(x), _global(rows), utils.memref_ptr(smem)
    zero = utils.c(0, i32)
    thread = Number(_thread()) % utils.WARPGROUP_SIZE
    for piece in pieces_of(thread):
        number = llvm.load(i32, piece.row.after(rows_at, i32))
        is_row = arith.cmpi(arith.CmpIPredicate.sge, number, zero)
        read = arith.select(is_row, utils.c(BYTES, i32), zero)  # the rest is zeros
        number = arith.maxsi(number, zero)
        row_bytes = arith.muli(arith.extui(i64, number), utils.c(2 * stride, i64))
        row = utils.getelementptr(x_at, [row_bytes], i8)
        source, target = (
            (piece.column * 2).after(row, i8),
            piece.byte.after(smem_at, i8),
        )
        past_l1 = nvvm.LoadCacheModifierKind.CG
        nvvm.cp_async_shared_global(target, source, BYTES, past_l1, cp_size=read)


def commit() -> None:
    """Makes a group of the copies since the last one."""
    nvvm.cp_async_commit_group()


def wait(groups: int) -> None:
    """Waits until all but the last `groups` groups of this thread have come."""
    nvvm.cp_async_wait_group(groups)


def _thread():
    """The thread's number, asked for anew: what is made of it is not kept in registers
    from the start of a program, where they are few.
    """
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)


def _global(ref):
    space = llvm.PointerType.get(address_space=1)
    return llvm.addrspacecast(space, utils.memref_ptr(ref))
