"""The interchange format: exact, the same bytes from numpy and jax, and refused where
no `pack` wrote it.
"""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trix_kernels import packing

jit_pack = jax.jit(packing.pack)
jit_unpack = jax.jit(packing.unpack, static_argnums=(1, 2))

ternary_arrays = hnp.arrays(
    np.int8,
    hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=9),
    elements=st.integers(-1, 1),
)


@given(ternary_arrays)
@settings(max_examples=200)
def test_pack_of_any_shape_round_trips_exactly_in_numpy(q):
    words = packing.pack(q)
    assert words.dtype == np.uint8
    assert words.shape == (*q.shape[:-1], -(-q.shape[-1] // 4))
    packing.check(words, q.shape[-1])
    back = packing.unpack(words, q.shape[-1])
    assert isinstance(back, np.ndarray)
    np.testing.assert_array_equal(back, q)


@given(ternary_arrays)
@settings(max_examples=12)
def test_pack_under_jit_gives_the_bytes_of_numpy_and_round_trips(q):
    words = jit_pack(jnp.asarray(q))
    assert isinstance(words, jax.Array)
    np.testing.assert_array_equal(words, packing.pack(q))
    np.testing.assert_array_equal(jit_unpack(words, q.shape[-1], jnp.int8), q)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0, 0, 0, 0], [0b00000000]),
        ([1, 0, 0, 0], [0b00000001]),
        ([-1, 0, 0, 0], [0b00000010]),
        ([0, 1, 0, 0], [0b00000100]),
        ([0, 0, 0, -1], [0b10000000]),
        ([1, -1, 0, 1], [0b01001001]),
        ([-1, -1, -1, -1], [0b10101010]),
        ([1, 1, 1, 1, -1], [0b01010101, 0b00000010]),
        ([0, -1, 1], [0b00011000]),
        ([], []),
    ],
)
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_pack_of_a_hand_table_gives_the_documented_bytes(weights, expected, array):
    words = packing.pack(array(weights, np.float32))
    np.testing.assert_array_equal(words, np.asarray(expected, np.uint8))


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.float32, jnp.bfloat16])
def test_unpack_into_any_dtype_is_exact(dtype):
    q = np.random.default_rng(0).integers(-1, 2, (3, 11))
    back = packing.unpack(packing.pack(q), 11, dtype)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back.astype(np.int64), q)


def test_packed_kernel_takes_a_sixteenth_of_float32():
    q = np.zeros((4, 64, 128), np.float32)
    assert 16 * packing.pack(q).nbytes == q.nbytes


@pytest.mark.parametrize("value", [2, -2, 0.5, np.nan, np.inf])
def test_pack_of_another_value_is_refused(value):
    with pytest.raises(ValueError, match=r"q must hold only -1, 0 and \+1\. Got .*"):
        packing.pack(np.asarray([0, 1, value], np.float32))


def test_pack_of_a_scalar_is_refused(no_type_hook):
    with pytest.raises(ValueError, match="at least one axis"):
        packing.pack(np.asarray(1.0))


@pytest.mark.parametrize("place", range(4))
def test_check_of_the_code_eleven_names_the_byte(place):
    words = np.zeros((2, 3), np.uint8)
    words[1, 2] = 0b11 << (2 * place)
    with pytest.raises(ValueError, match=r"code 11.*\(1, 2\)"):
        packing.check(words, 12)


@pytest.mark.parametrize("code", [0b01, 0b10])
@pytest.mark.parametrize("n", [5, 6, 7])
def test_check_of_set_padding_bits_is_refused(n, code):
    words = packing.pack(np.ones((2, n), np.int8))
    packing.check(words, n)
    words[0, -1] |= code << 6
    with pytest.raises(ValueError, match=f"zero behind weight {n}"):
        packing.check(words, n)


@pytest.mark.parametrize("n", [4, 9, 0])
def test_row_length_that_does_not_fit_is_refused(n):
    words = np.zeros((1, 2), np.uint8)
    for refuse in (packing.check, packing.unpack):
        with pytest.raises(ValueError, match=f"n={n} weights take rows of"):
            refuse(words, n)


@pytest.mark.parametrize("words", [np.zeros((2, 2), np.int8), np.uint8(0)])
def test_check_of_something_that_is_no_byte_array_is_refused(words, no_type_hook):
    with pytest.raises(ValueError, match="words must be uint8"):
        packing.check(words, 8)
