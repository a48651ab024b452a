"""What of `tile_ffn` fits a program of the fused kernel."""

FUSED_BLOCKS = 96  # a program computes a block: with fewer, most cores would idle
SHARED_BYTES = 220 * 1024  # of the 227 KiB that a program may have


def shared_bytes(rows: int, d_in: int, hidden: int) -> int:
    """Shared memory of a program: activations, one block of outputs, words in flight."""
    return 2 * rows * (d_in + hidden + 128) + 2 * 128 * 32 * 2
