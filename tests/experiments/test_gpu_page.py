"""The kernels' page shows what the committed files say."""

import json

from experiments.speed.gpu import choices, page, record

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


def rows(*ways, **about):
    return [{"name": way, "way": way, **about, **row} for way, row in ways]


def test_a_measured_file_becomes_tables(tmp_path, monkeypatch):
    path = tmp_path / record.NAME
    monkeypatch.setattr(page, "GPU", path)
    assert page.layer() == page.NOTHING
    products = rows(
        ("ours", {"kernel_us": 60.0}), ("batched", {"us": 50.04}), product="up"
    )
    others = rows(
        ("jax's kernel, a", {"kernel_us": 90.0}),
        ("jax's kernel, b", {"kernel_us": 80.0}),
        ("lax.ragged_dot", {"us": 600.0, "kernel_us": None}),
        product="up",
    )
    times = rows(
        ("trix", {"us": 800.0}),
        (EQUAL, {"us": 1600.0, "times_the_first": 2.0}),
        (ACTIVE, {"us": 400.0, "times_the_first": 0.5}),
        **{"tiles": 16, "what": "forward"},
    )
    speeds = rows(
        ("trix", {"tokens_per_second": 3000, "peak_bytes": 5e9}),
        (EQUAL, {"tokens_per_second": 1500, "peak_bytes": 9e9}),
        (ACTIVE, {"tokens_per_second": 4000, "peak_bytes": 4e9}),
        tiles=64,
    )
    record.append(path, {"part": "layer", "error": "out of memory"})
    for part in (
        {"products": products},
        {"baselines": others},
        {"layer": times},
        {"step": speeds},
    ):
        ((name, found),) = part.items()
        record.append(path, {"part": name, "rows": found})
    assert page.products().splitlines()[2] == "| up | 60.0 | 50.0 | 600.0 | 80.0 |  |"
    assert page.layer().splitlines()[2] == "| forward, 16 tiles | 0.80 | 2.00 | 0.50 |"
    assert (
        page.step().splitlines()[2]
        == "| 64 tiles | 3,000 | 2.00 | 0.75 | 5.00 | 9.00 |"
    )


def test_choices_are_those_of_the_committed_measurements():
    assert choices.text() == choices.PATH.read_text("utf-8"), (
        "run python -m experiments.report"
    )
