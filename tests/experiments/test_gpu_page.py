"""The kernels' page shows what the committed files say."""

import itertools
import json
import types

import pytest

from experiments.speed.gpu import __main__ as command
from experiments.speed.gpu import (
    choices,
    language_model,
    layer,
    page,
    products,
    record,
    timing,
)
from experiments.speed.gpu.shapes import REHEARSAL

EQUAL, ACTIVE = page.EQUAL, page.ACTIVE


def test_the_page_is_that_of_the_committed_files():
    assert "<!-- gpu: layer -->" in page.PAGE.read_text("utf-8")
    made = page.page()
    assert made == page.PAGE.read_text("utf-8"), "run python -m experiments.report"


def test_packed_kernels_are_shown_as_they_are_shipped():
    lines = page.packed().splitlines()
    assert lines[2] == (
        "| tile_matmul, 64 x 1 rows, 2048x2048 | 37.3 | 188.2 | **5.05** | 513 |"
    )
    # The kernel of the second card, and two matmuls where a fused one was measured.
    assert (
        "| ternary_matmul, 1 x 4096 rows, 4096x4096 | 193.4 | 168.7 | **0.87** | 255 |"
        in lines
    )
    assert (
        "| tile_ffn, 64 x 16 rows, 1024x1024x1024 | 32.0 | 98.8 | **3.09** | 227 |"
        in lines
    )
    assert not any("int8" in line for line in lines)  # nothing to compare with


def test_resources_on_the_page_are_those_of_the_committed_table():
    table = json.loads((page.ROOT / "kernels" / "resources.json").read_text("utf-8"))
    lines = page.PAGE.read_text("utf-8").splitlines()
    for kernels in table.values():
        for k in kernels:
            cells = [
                k["name"],
                k["registers"],
                k["spill_bytes"],
                f"{k['smem_bytes']:,}",
            ]
            if "decode_instructions_per_weight" in k:
                cells.append(f"{k['decode_instructions_per_weight']:.2f}")
            start = f"| {' | '.join(map(str, cells))} |"
            assert any(line.startswith(start) for line in lines), start


class Clock:
    """Of the module that generates: it goes on where a model generates, alone."""

    now = 0.0

    def perf_counter(self):
        return self.now


def way_of(config):
    """Of a language model at the rehearsal's shapes."""
    if config.ffn == "sparse":
        return "trix"
    widest = REHEARSAL.tiles[0] * REHEARSAL.tile_width
    return EQUAL if config.ffn_width == widest else ACTIVE


SECONDS = {"trix": 800e-6, EQUAL: 1600e-6, ACTIVE: 400e-6}
SECONDS |= {"ours": 60e-6, "batched": 50.04e-6, "lax.ragged_dot": 600e-6}
BYTES = {"trix": int(5e9), EQUAL: int(9e9), ACTIVE: int(4e9)}


class Stepper:
    """Trains in no time, and says that it took its way's."""

    loss, norm = 3.0, 1.0

    def __init__(self, config, sequences):
        self.way = way_of(config)

    def __call__(self):
        return SECONDS[self.way]

    def step_loss(self):
        return self.loss

    def about(self):
        return {"peak_bytes": BYTES[self.way]}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What the command writes where everything takes `SECONDS`: nothing is run."""
    clock, by_cupti = Clock(), itertools.cycle((90.0, 80.0))

    def interleaved(cases, rounds):
        return {name: [SECONDS.get(name, 1.0)] * rounds for name in cases}

    def generate(model, variables, prompts, new_tokens, config):
        clock.now += SECONDS[way_of(model)]

    def served(config):
        return config, types.SimpleNamespace(nbytes=BYTES[way_of(config)])

    def kernel_row(case):
        return {"kernel_us": next(by_cupti) if case.needs_gpu else None}

    monkeypatch.setattr(timing, "on_gpu", lambda: True)
    monkeypatch.setattr(timing, "interleaved", interleaved)
    monkeypatch.setattr(products, "by_cupti", kernel_row)
    monkeypatch.setattr(layer, "by_cupti", kernel_row)
    monkeypatch.setattr(layer, "memory", lambda case: {})
    monkeypatch.setattr(language_model, "Stepper", Stepper)
    monkeypatch.setattr(language_model, "served", served)
    monkeypatch.setattr(language_model, "generate_batch", generate)
    monkeypatch.setattr(language_model, "time", clock)
    path = tmp_path / record.NAME
    about = {"shapes": REHEARSAL.name, "device": "cpu"}
    record.append(path, {"part": "layer", "error": "out of memory"} | about)
    parts = "products", "baselines", "layer", "step", "losses", "generation"
    flags = ["--rehearse", "--output", str(tmp_path), "--parts", *parts]
    assert command.main(flags) == 0
    return path


@pytest.mark.slow
def test_what_a_part_measured_before_it_was_ended_is_in_its_table(
    measured, monkeypatch
):
    whole = {line["part"]: line for line in record.read(measured)}["layer"]
    rows = [row for row in whole["rows"] if row["what"] == "forward"]
    rows += [row for row in whole["rows"] if row not in rows and row["way"] == "trix"]
    ended = {k: v for k, v in whole.items() if k != "rows"}
    path = measured.with_name("ended.jsonl")
    record.append(path, ended | {"error": "it did not end", "rows_before_error": rows})
    monkeypatch.setattr(page, "GPU", path)
    (line,) = page.layer().splitlines()[2:]
    assert line == "| forward, 4 tiles | 0.80 | 2.00 | 0.50 |"


@pytest.mark.slow
def test_a_measured_file_becomes_tables(measured, monkeypatch):
    monkeypatch.setattr(page, "GPU", measured.with_name("none"))
    assert page.step() == page.NOTHING
    monkeypatch.setattr(page, "GPU", measured)
    found = {name: part().splitlines()[2:] for name, part in page.PARTS.items()}
    up, *others = found["products"]
    # Of jax's two kernels the better one, by CUPTI; tokamax is not installed.
    assert up == "| up, 4 tiles, 128x128 | 60.0 | 50.0 | 600.0 | 80.0 |  |"
    assert len(others) == 5
    assert found["layer"] == [
        "| forward, 4 tiles | 0.80 | 2.00 | 0.50 |",
        "| forward and backward, 4 tiles | 0.80 | 2.00 | 0.50 |",
    ]
    assert found["step"] == ["| 4 tiles | 40,000 | 2.00 | 0.50 | 5.00 | 9.00 |"]
    assert found["generation"] == [
        "| batch 1 | 2,500 | 2.00 | 0.50 | 5.00 | 9.00 |",
        "| batch 2 | 5,000 | 2.00 | 0.50 | 5.00 | 9.00 |",
    ]


def test_a_row_never_takes_anothers_place(monkeypatch, tmp_path):
    path = tmp_path / record.NAME
    monkeypatch.setattr(page, "GPU", path)
    row = {"way": "trix", "tiles": 4, "us": 2.0}
    rows = [{"name": "step", **row}, {"name": "step again", **row}]
    record.append(path, {"part": "step", "rows": rows})
    with pytest.raises(ValueError, match="'step' and 'step again'"):
        page.step()


@pytest.fixture
def layers(monkeypatch, tmp_path):
    """Writes the parts that choose what trains, with the layer's time by XLA."""
    monkeypatch.setattr(page, "GPU", tmp_path / record.NAME)
    about = {"shapes": "full", "device": "NVIDIA H100"}

    def write(xla, implementation="mosaic_gpu", failed=None, without=()):
        packages = {"jax": "0.12.0.1"}
        rows = {
            "versions": [{"name": "v", "capability": "9.0", "packages": packages}],
            "checks": [{"name": "up"} | ({"failed": failed} if failed else {})],
            "losses": [{"name": "l"}],
            "layer": [
                {"what": what, "tiles": tiles, "way": way, "us": us, "name": "l"}
                | ({"implementation": how} if how else {})
                for tiles in (16, 64)
                for what, scale in (("forward", 9.0), ("forward and backward", 1.0))
                for way, us, how in (
                    ("trix", 2.0 * scale, implementation),
                    ("trix, xla", xla * tiles / 16, "xla"),
                    (EQUAL, 1.0, None),
                )
            ],
        }
        for part, found in rows.items():
            if part not in without:
                record.append(page.GPU, {"part": part, "rows": found} | about)
        return choices.whole()

    return write


def test_training_takes_the_kernels_where_the_layer_is_faster(layers):
    assert choices.whole() == []
    row = {"arch": "sm_90a", "weights": "whole", "implementation": "mosaic_gpu"}
    where = "times as fast as XLA's path (NVIDIA H100, jax 0.12.0.1)"
    assert layers(xla=2.4) == [row | {"reason": f"1.2 to 4.8 {where}"}]
    slower = row | {"implementation": "xla", "reason": f"0.9 to 3.6 {where}"}
    assert layers(xla=1.8) == [slower]  # the last line of a part counts


@pytest.mark.parametrize(
    "what",
    [
        {"failed": "3 numbers differ"},
        {"without": "losses"},
        {"implementation": "xla"},
        {"implementation": None},
    ],
)
def test_no_kernel_is_chosen_by_half_a_measurement(layers, what):
    assert layers(xla=2.4, **what) == []


def test_choices_are_those_of_the_committed_measurements():
    assert choices.text() == choices.PATH.read_text("utf-8"), (
        "run python -m experiments.report"
    )
