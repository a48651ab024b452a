"""What a run says: what it is, ten lines at least, how fast it goes."""

import dataclasses
import re
from types import SimpleNamespace

import pytest

from trix_jax.lm.accounting import costs
from trix_jax.lm.train import display
from trix_jax.lm.train.display import Display, clock
from trix_jax.lm.train.header import header, products_text
from trix_jax.lm.train.summary import _routing
from trix_kernels import choice, device
from trix_kernels.gpu_specs import GPUS


@pytest.fixture
def now(monkeypatch):
    """A clock that the test moves."""
    time = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(display.time, "monotonic", lambda: time.seconds)
    return time


def line(step, loss):
    return {"step": step, "tokens": 100 * step, "loss": loss, "lr": 1e-3}


def test_a_quiet_terminal_has_ten_lines_with_the_pace_of_all_steps_but_the_first(now):
    said = []
    with Display(100, 0, said.append) as shown:
        now.seconds = 60.0  # the first step compiles
        shown.step(line(1, 4.0))
        for step in range(2, 51):
            now.seconds += 0.5
            shown.step(line(step, 3.0))
        now.seconds += 100.0  # an evaluation
        shown.restart_clock()
        shown.evaluation(
            50,
            SimpleNamespace(
                val_loss=3.25,
                val_ppl=25.79,
                entropy=[1.5, 1.25],
                dead_tiles=[0, 1],
                val_loss_unquantized=None,
            ),
        )
        for step in range(51, 101):
            now.seconds += 0.5
            shown.step(line(step, 2.0))
    steps = [int(re.match(r"step (\d+)/100  ", text).group(1)) for text in said]
    assert steps == sorted(steps)
    assert {1, *range(10, 101, 10)} <= set(steps)
    assert "step 1/100  loss 4.0000  rate 1.00e-03" in said
    expected = (
        "step 50/100  loss 3.0000  rate 1.00e-03  200 tokens/s  1:24 elapsed  0:25 left"
    )
    assert expected in said or expected.replace("1:24", "1:25") in said
    assert (
        "step 50/100  validation loss 3.2500 (training 3.0200), perplexity 25.790  "
        "entropy 1.25 nats, 1 dead tiles" in said
    )
    assert said[-1].endswith("200 tokens/s  3:30 elapsed  0:00 left")


def test_the_time_left_has_the_evaluations_still_to_come(now):
    result = SimpleNamespace(
        val_loss=3.0, val_ppl=20.0, entropy=[], dead_tiles=[], val_loss_unquantized=None
    )
    said, due = [], [4, 8, 10]
    shown = Display(10, 0, said.append, due)
    for step in range(1, 11):
        now.seconds += 1.0
        shown.step(line(step, 1.0))
        if step in due:
            now.seconds += {4: 100.0, 8: 140.0, 10: 120.0}[step]
            shown.evaluation(step, result)
            shown.restart_clock()
    left = [text.rsplit("  ", 1)[1] for text in said if " left" in text]
    before, between = ["0:08", "0:07", "0:06"], ["3:25", "3:24", "3:23", "3:22"]
    assert left == [f"{t} left" for t in [*before, *between, "2:01", "2:00"]]
    assert display.seconds_left(3, 2.0, 2, [10.0, 20.0]) == 36.0
    assert display.seconds_left(3, 2.0, 2, []) == 6.0


def test_slow_steps_are_told_every_quarter_of_a_minute(now):
    said = []
    shown = Display(1000, 0, said.append)
    for step in range(1, 9):
        now.seconds += 8.0
        shown.step(line(step, 1.0))
    assert [text.split("/")[0] for text in said] == [
        "step 1",
        *map("step {}".format, (3, 5, 7)),
    ]


def test_clock():
    assert [clock(s) for s in (0.0, 59.6, 3661.0)] == ["0:00", "1:00", "1:01:01"]


def test_header_says_what_a_run_is(tiny_config, one_device, tmp_path):
    model = dataclasses.replace(tiny_config.model, vocab_size=7)
    config = dataclasses.replace(tiny_config, model=model)
    text = "\n".join(header(config, one_device * 2, tmp_path, 5))
    cost = costs(model)
    assert "sparse FFN, 4 tiles of 16, 2 a token; D=16, layers 1" in text
    assert f"{cost.total:,} parameters" in text
    assert "compute of a dense one 34 wide" in text  # two tiles of 16 and four scores
    assert "2 x cpu, float32; 10 steps of 128 tokens, 1,280 in all" in text
    assert (
        "tiles' products: xla. The Mosaic GPU kernels need a GPU. This is cpu" in text
    )
    assert f"{tmp_path}: from step 5" in text
    assert header(config, one_device, tmp_path, 0)[-1].endswith("from the start")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, "xla. The GPU kernels of this FFN: not measured on a GPU yet; --model"),
        ({"implementation": "mosaic_gpu"}, "mosaic_gpu, as asked for"),
        (
            {"implementation": "mosaic_gpu", "activation": "gelu"},
            "mosaic_gpu, gelu by xla, as asked for",
        ),
        ({"implementation": "xla"}, "xla, as asked for"),
        ({"dtype": "float32"}, "xla. The Mosaic GPU kernels take bfloat16"),
        ({"num_tiles": 2, "expansion": 1}, "Got 128 and 64."),
        ({"context": 1}, "Got 8 for 2 tiles."),
        ({"ffn": "dense"}, None),
    ],
)
def test_header_says_what_computes_the_tiles(tiny_config, changed, told):
    wide = {"d_model": 128, "num_tiles": 2, "tiles_per_token": 1, "expansion": 2}
    sizes = {"ffn": "sparse", "context": 16, "dtype": "bfloat16"} | wide | changed
    model = dataclasses.replace(tiny_config.model, **sizes)
    train = dataclasses.replace(tiny_config.train, batch_size=16, accumulate=1)
    config = dataclasses.replace(tiny_config, model=model, train=train)
    with device.assumed(GPUS["h100"]):
        found = products_text(config, 2)
    assert found is None if told is None else told in found


def test_header_asks_for_the_tiles_that_a_device_holds(tiny_config, monkeypatch):
    measured = choice.Choice("mosaic_gpu", "1.4 times as fast")
    monkeypatch.setattr(choice, "choose_whole", lambda arch: measured)
    sizes = {"d_model": 128, "num_tiles": 8, "expansion": 8, "tiles_per_token": 1}
    how = {"ffn": "sparse", "context": 16, "dtype": "bfloat16", **sizes}
    model = dataclasses.replace(tiny_config.model, **how)
    train = dataclasses.replace(tiny_config.train, batch_size=16, accumulate=1)
    config = dataclasses.replace(tiny_config, model=model, train=train)
    with device.assumed(GPUS["h100"]):
        assert "Got 128 for 8 tiles." in products_text(config, 2)
        assert products_text(config, 2, spread=2) == "mosaic_gpu"


def test_one_tile_has_all_of_its_entropy():
    line = {"routing_entropy": [-0.0], "tile_usage": [[1.0]], "dead_tiles": [0]}
    found = _routing([line])
    assert found["min_entropy_share"] == 1
    assert found["routing"] == [{"entropy": -0.0, "max_load": 1.0, "dead_tiles": 0}]
