"""What `None` is where the kernels and XLA's path both run: by the committed table."""

import jax.numpy as jnp
import pytest

from trix_kernels import block_matmul, choice, device, grouped_matmul
from trix_kernels.grouped_matmul import hopper
from trix_kernels.tile_matmul import api
from trix_kernels.weights import pack

TABLE = [
    {"arch": "sm_90a", "activations": "float", "rows": "few", "implementation": "xla"},
    {"arch": "sm_90a", "activations": "float", "rows": "many"}
    | {"implementation": "mosaic_gpu", "reason": "2.0 times"},
]
TABLE[0]["reason"] = "0.5 times"
WHOLE = {"arch": "sm_90a", "weights": "whole", "implementation": "mosaic_gpu"}
WHOLE |= {"reason": "1.4 times"}


def test_a_hopper_takes_its_kernels_where_they_were_measured_faster():
    for rows in (8, 16, 64, 128):
        chosen = choice.choose("sm_90a", rows)
        assert chosen.implementation == "mosaic_gpu"
        assert "times as fast as XLA's path (NVIDIA H100" in chosen.reason
    assert choice.choose("sm_90a", 8, "int8").reason.startswith("2.4 times")


@pytest.mark.parametrize(
    "kind", [("sm_90a", 64, "int8"), ("sm_100a", 8), ("sm_100a", 8, "int8")]
)
def test_what_no_gpu_has_timed_is_xla(kind):
    assert choice.choose(*kind) == ("xla", "not measured on a GPU yet")


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(choice, "_table", lambda: TABLE)
    monkeypatch.setattr(device, "unsupported_reason", lambda: None)
    monkeypatch.setattr(device, "arch", lambda: "sm_90a")


def test_the_table_decides_by_rows_and_is_told(table):
    assert choice.choose("sm_90a", 16) == ("xla", "0.5 times")
    assert choice.choose("sm_90a", 32) == ("mosaic_gpu", "2.0 times")
    assert choice.told("sm_90a")[:2] == [
        "packed weights, float activations, blocks of up to 16 rows: xla, 0.5 times",
        "packed weights, float activations, blocks of more rows: mosaic_gpu, 2.0 times",
    ]


def test_whole_weights_meet_xla_until_a_gpu_has_timed_the_kernels(monkeypatch):
    monkeypatch.setattr(choice, "_table", lambda: TABLE)
    expected = ("xla", "not measured on a GPU yet")
    assert choice.choose_whole("sm_90a") == expected
    monkeypatch.setattr(choice, "_table", lambda: [*TABLE, WHOLE])
    assert choice.choose_whole("sm_90a") == ("mosaic_gpu", "1.4 times")
    assert choice.choose_whole("sm_100a") == expected
    assert choice.choose("sm_90a", 8) == ("xla", "0.5 times")


@pytest.mark.parametrize("rows", [[], [WHOLE], [WHOLE | {"implementation": "xla"}]])
def test_none_of_grouped_products_runs_what_the_table_says(rows, table, monkeypatch):
    monkeypatch.setattr(choice, "_table", lambda: rows)
    ran = []

    def kernel(x, w, tile, used, *, transposed=False):
        ran.append(x.shape)
        return x

    monkeypatch.setattr(hopper, "grouped_matmul", kernel)
    x, w = jnp.ones((1, 128, 128), jnp.bfloat16), jnp.ones((1, 128, 128))
    y = grouped_matmul(x, w, jnp.zeros(1, jnp.int32))
    takes_kernel = rows == [WHOLE]
    assert float(y[0, 0, 0]) == (1 if takes_kernel else 128)
    assert len(ran) == takes_kernel
    grouped_matmul(x, w, jnp.zeros(1, jnp.int32), implementation="mosaic_gpu")
    assert len(ran) == takes_kernel + 1


def test_none_runs_what_the_table_says_and_a_name_what_it_names(table, monkeypatch):
    ran = []

    def kernel(x, weights, tile, used, **how):
        ran.append(x.shape[1])
        return jnp.zeros((*x.shape[:2], 128), x.dtype)

    monkeypatch.setattr(api, "_mosaic", kernel)
    weights = pack(jnp.ones((1, 128, 128)), jnp.ones((1, 1, 1)), "planar")
    tile = jnp.zeros(1, jnp.int32)
    for rows in (8, 64):
        x = jnp.ones((1, rows, 128), jnp.bfloat16)
        y = block_matmul(x, weights, tile, 128)
        assert float(y[0, 0, 0]) == (128 if rows == 8 else 0)
    assert ran == [64]
    x = jnp.ones((1, 8, 128), jnp.bfloat16)
    block_matmul(x, weights, tile, 128, implementation="mosaic_gpu")
    assert ran == [64, 8]
