"""The command that measures a GPU: what it keeps, what it repeats, what it says, and all
of its parts at tiny shapes on this machine.
"""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.speed.gpu import __main__ as command
from experiments.speed.gpu import (
    language_model,
    page,
    products,
    record,
)
from experiments.speed.gpu.parts import PARTS, Part
from experiments.speed.gpu.shapes import FULL, REHEARSAL

OTHER = ["gradient of the hidden layer", "gradient of up", "gradient of down"]


@pytest.fixture
def parts(monkeypatch):
    """Three parts that need no device; the second fails until it is told not to."""
    done, broken = [], {"b"}

    def part(name):
        def rows(shapes):
            done.append(name)
            yield {"name": name, "us": 2.0}
            if name in broken:
                raise ArithmeticError("out of memory")

        return Part(f"about {name}", 60, rows)

    monkeypatch.setattr(command, "PARTS", {name: part(name) for name in "abc"})
    return done, broken


def run(folder, *flags):
    return command.main(["--rehearse", "--output", str(folder), *flags])


def test_a_failed_part_is_kept_with_its_error_and_alone_repeated(
    parts, tmp_path, capsys
):
    done, broken = parts
    assert run(tmp_path) == 1
    lines = record.read(tmp_path / record.NAME)
    assert [line["part"] for line in lines] == ["a", "b", "c"]
    assert lines[1]["error"] == "ArithmeticError: out of memory"
    assert lines[0]["rows"] == [{"name": "a", "us": 2.0}]
    assert lines[1]["rows_before_error"] == [{"name": "b", "us": 2.0}]
    assert "rows" not in lines[1]
    said = "s, FAILED\n  ArithmeticError: out of memory\n  b: 2.0 us\n"
    assert said in capsys.readouterr().out
    broken.clear()
    assert run(tmp_path) == 0
    assert done == ["a", "b", "c", "b"]
    assert len(record.read(tmp_path / record.NAME)) == 4
    assert run(tmp_path) == 0
    assert done == ["a", "b", "c", "b"]


def test_a_row_that_is_not_equal_fails_the_part_until_it_is(monkeypatch, tmp_path):
    unequal = {"name": "up", "failed": "3 numbers differ"}
    rows = [unequal], [unequal], [{"name": "up"}]
    turns = iter(rows)
    monkeypatch.setattr(
        command, "PARTS", {"a": Part("", 1, lambda shapes: iter(next(turns)))}
    )
    assert [run(tmp_path) for _ in range(4)] == [1, 1, 0, 0]
    lines = record.read(tmp_path / record.NAME)
    assert [line["rows"] for line in lines] == list(rows)
    assert record.failures(lines[0]) == ["up: 3 numbers differ"]
    assert record.measured(lines) == {"a"}
    assert record.measured(lines[::-1]) == set()


def test_an_error_is_written_without_the_machines_paths(monkeypatch, tmp_path):
    def rows(shapes):
        yield {"name": "up", "failed": "3 numbers differ"}
        try:
            json.loads("{")
        except json.JSONDecodeError as error:
            (tmp_path / "no folder" / "tuned.json").open().close()
            raise AssertionError from error

    monkeypatch.setattr(command, "PARTS", {"a": Part("", 1, rows)})
    assert run(tmp_path) == 1
    text = (tmp_path / record.NAME).read_text()
    for folder in (command.__file__, json.__file__, str(tmp_path), sys.prefix):
        assert folder.removesuffix("__init__.py") not in text
    (line,) = record.read(tmp_path / record.NAME)
    error = "FileNotFoundError: [Errno 2] No such file or directory: 'tuned.json'"
    assert record.failures(line) == [error, "up: 3 numbers differ"]
    for file in (
        "experiments/speed/gpu/__main__.py",
        "tests/experiments/test_gpu.py",
        "decoder.py",
    ):
        assert f'File "{file}", line ' in line["traceback"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{record.ROOT}/kernels/aot.py:3:5: no", "kernels/aot.py:3:5: no"),
        ("in /opt/cuda/lib/libcupti.so, twice", "in libcupti.so, twice"),
        ("see https://jax.dev/errors.html", "see https://jax.dev/errors.html"),
        ("3 GB / 2 of and/or in jit(f)/while/body/add", None),
    ],
)
def test_paths_alone_are_shortened(text, expected):
    assert record.portable(text) == (expected or text)


def test_parts_are_chosen_and_minutes_stop_before_what_would_not_fit(
    parts, tmp_path, monkeypatch, capsys
):
    done, broken = parts
    broken.clear()
    assert run(tmp_path, "--parts", "c", "a") == 0
    assert done == ["c", "a"]
    monkeypatch.setattr(command, "on_gpu", lambda: True)
    flags = ["--here", "--output", str(tmp_path / "full")]
    assert command.main([*flags, "--minutes", "0.5"]) == 3
    said = capsys.readouterr().out.splitlines()[-3:]
    assert said == [f"{name} is left out: 30 s are left." for name in "abc"]
    assert command.main([*flags, "--minutes", "1.5", "--parts", "b"]) == 0
    assert done == ["c", "a", "b"]


@pytest.mark.parametrize(
    "flags",
    [(), ("--output", "x", "--minutes", "0"), ("--output", "x", "--parts", "z")],
)
def test_arguments_that_make_no_sense_are_refused(parts, flags):
    with pytest.raises(SystemExit, match="2"):
        command.main(list(flags))


def test_list_names_the_parts_and_measures_nothing(parts, capsys):
    assert command.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "a",
        "b",
        "c",
    ]
    assert parts[0] == []


def test_without_a_gpu_the_full_shapes_are_refused(parts, tmp_path, capsys):
    assert command.main(["--here", "--output", str(tmp_path)]) == 2
    assert "--rehearse" in capsys.readouterr().err


def test_a_torn_line_is_cut_off_and_its_part_measured_again(parts, tmp_path):
    done, broken = parts
    broken.clear()
    run(tmp_path, "--parts", "a")
    path = tmp_path / record.NAME
    with path.open("a") as file:
        file.write('{"part": "b", "rows": [{"na')
    assert run(tmp_path) == 0
    assert [json.loads(line)["part"] for line in path.read_text().splitlines()] == [
        "a",
        "b",
        "c",
    ]
    assert done == ["a", "b", "c"]


def test_parts_that_were_not_tried_come_before_those_that_failed(parts, tmp_path):
    done, broken = parts
    assert run(tmp_path, "--parts", "b") == 1
    broken.clear()
    assert run(tmp_path) == 0
    assert done == ["b", "a", "c", "b"]


def test_another_devices_file_and_one_that_is_none_are_refused(parts, tmp_path, capsys):
    path = tmp_path / record.NAME
    record.append(path, {"part": "a", "shapes": "rehearsal", "device": "NVIDIA H100"})
    assert run(tmp_path) == 2
    assert "is of 'NVIDIA H100', this is 'cpu'" in capsys.readouterr().err
    path.write_text("{}\n")
    assert run(tmp_path) == 2
    assert "line 1, must name its part" in capsys.readouterr().err


def test_the_parts_are_allowed_seven_minutes_together():
    assert sum(part.seconds for part in PARTS.values()) <= 7 * 60


def test_loads_have_the_rows_that_they_should():
    assert products.counts("balanced", 12, 4).tolist() == [3, 3, 3, 3]
    assert products.counts("skewed", 11, 3).tolist() == [6, 3, 2]
    # Every other tile has none; the second as much as all of the others.
    assert products.counts("empty", 12, 8).tolist() == [0, 6, 0, 2, 0, 2, 0, 2]
    groups = products.groups_of("empty", 12, 8, 4)
    assert groups.tile[:5].tolist() == [1, 1, 3, 5, 7]
    assert groups.filled.tolist() == [4, 2, 2, 2, 2] + [0] * (groups.filled.size - 5)


def test_six_products_are_those_of_the_committed_table_at_the_shapes():
    sizes = {(p.product, p.inputs, p.outputs) for p in products.products(FULL, 64)}
    kinds = ("forward", "transposed", "outer")
    assert sizes == {(kind, *io) for kind in kinds for io in ((1024, 256), (256, 1024))}


@pytest.mark.slow
def test_a_wrong_number_in_a_counted_row_is_found_and_one_in_another_is_not(
    monkeypatch,
):
    case = products.products(REHEARSAL, 4)[0]._replace(tokens=12)
    expect = products.call_of(case)

    def with_other(row):
        def call_of(case, implementation=None):
            return lambda *args: expect(*args).at[0, row, 5].add(1)

        return call_of

    told = {}
    for row in (3, 127):  # the first tile has fewer rows than a block
        monkeypatch.setattr(products, "call_of", with_other(row))
        (told[row], *_) = products.check(case, REHEARSAL, "xla", expect)
    assert told[3]["failed"] == "[1, 1] numbers differ"
    assert "failed" not in told[127]
    assert jnp.bfloat16 == expect(*products.ours_of(case, REHEARSAL).args).dtype


@pytest.mark.slow
@pytest.mark.parametrize(
    "use", ["up", *(pytest.param(use, marks=pytest.mark.slow) for use in OTHER)]
)
def test_products_of_numbered_rows_are_compared_with_those_of_their_blocks(
    use, monkeypatch
):
    every = products.products(REHEARSAL, 4)
    (case,) = (case._replace(tokens=12) for case in every if case.use == use)
    assert case.numbered
    plain, more = products.call_of(case, "xla"), [0]

    def call_by_number(case):
        def call(tokens, other, tile, filled, rows, *beside):
            blocks = jnp.where(rows[..., None] < 0, 0, tokens[rows])
            is_right = use == "gradient of down"
            pair = (other, blocks) if is_right else (blocks, other)
            y = products.alongside(case, plain(*pair, tile, filled), *beside)
            return y.at[0, 0, 5].add(more[0])

        return call

    monkeypatch.setattr(products, "has_kernels", lambda: True)
    monkeypatch.setattr(products, "call_by_number", call_by_number)
    assert not any("failed" in r for r in products.check_numbered(case, REHEARSAL))
    more[0] = 8
    (row, *_) = products.check_numbered(case, REHEARSAL)
    assert row["failed"] == "[1, 1] numbers differ"


WAYS = ("trix", "trix, xla")
NAN, INF = float("nan"), float("inf")
STEP = language_model.BFLOAT16


@pytest.mark.parametrize(
    ("ours", "xla", "failed"),
    [
        ([4.0, 2.0], [4.0, 2.0], {}),
        ([4.0, 2 + 2 * STEP], [4.0, 2.0], {}),
        ([4.0, 2 + 3 * STEP, 2.0], [4.0, 2.0, 2.0], {"trix": "losses 0.0059 apart"}),
        ([4.0, NAN], [4.0, 2.0], {"trix": "losses are not finite"}),
        ([NAN, 2.0], [4.0, 2.0], {"trix": "losses are not finite"}),
        ([INF, 2.0], [4.0, 2.0], {"trix": "losses are not finite"}),
        *(
            (ours, [4.0, bad], dict.fromkeys(WAYS, "trix, xla: losses are not finite"))
            for bad in (NAN, INF)
            for ours in ([4.0, 2.0], [4.0, bad])
        ),
    ],
)
@pytest.mark.parametrize("norm", [1.0, 1.01, 0.97])
def test_losses_that_are_apart_or_not_finite_fail(ours, xla, failed, norm, monkeypatch):
    class Stepper:
        def __init__(self, config, sequences):
            self.losses = iter(xla if config.implementation == "xla" else ours)
            self.norm = 1.0 if config.implementation == "xla" else norm

        def step_loss(self):
            return next(self.losses)

    monkeypatch.setattr(language_model, "Stepper", Stepper)
    shapes = REHEARSAL._replace(trains_for=len(ours))
    found = {row["way"]: row for row in language_model.losses(shapes)}
    assert tuple(found) == WAYS
    told = {way: row["failed"] for way, row in found.items() if "failed" in row}
    if norm == 0.97:  # what the losses say comes first
        failed = {"trix": "norms 0.03 apart"} | failed
    assert told == failed
    if not failed:
        assert found["trix"]["apart"] == (ours[1] - xla[1]) / xla[1]


@pytest.fixture(scope="module")
def compiled_fast():
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


def test_quick_parts_run_at_tiny_shapes(tmp_path, compiled_fast):
    names = "versions", "ceilings", "router"
    assert run(tmp_path, "--parts", *names) == 0
    lines = record.read(tmp_path / record.NAME)
    assert [line["part"] for line in lines] == list(names)
    rows = {row["name"]: row for line in lines for row in line["rows"]}
    assert all(row["us"] > 0 for row in rows.values() if "us" in row)
    assert rows["router, 4 tiles: plan"]["us"] > 0


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory, compiled_fast):
    """The file of a rehearsal. What this machine cannot run is traced."""
    folder = tmp_path_factory.mktemp("rehearsed")
    assert run(folder) == 0
    return folder / record.NAME


@pytest.mark.slow
def test_every_part_runs_at_tiny_shapes(rehearsed):
    lines = {line["part"]: line for line in record.read(rehearsed)}
    assert set(lines) == set(PARTS)
    rows = {row["name"]: row for line in lines.values() for row in line["rows"]}
    assert all(row["us"] > 0 for row in rows.values() if "us" in row)
    ways = {"trix", page.EQUAL, page.ACTIVE}
    for part in ("layer", "step", "generation", "evaluation"):
        assert {row["way"] for row in lines[part]["rows"]} >= ways
    # Six products, three loads, two oracles.
    # And four by number, three loads.
    assert len(lines["checks"]["rows"]) == 36 + 12
    assert "traced_only" in rows["up, 4 tiles, 128x128: jax's kernel, 128x128"]
    step = rows["step, 4 tiles: trix"]
    assert step["donated_bytes"] >= step["state_bytes"]
    assert abs(rows["losses, 4 tiles: trix"]["losses"][0] - 3.47) < 0.3  # log(32)


def measured_tables():
    """The cells of the page's tables, but for the one of another file."""
    return {
        name: [
            [cell.strip(" *") for cell in line.split("|")[1:-1]]
            for line in part().splitlines()[2:]
        ]
        for name, part in page.PARTS.items()
        if name != "packed"
    }


@pytest.mark.slow
def test_a_rehearsals_file_fills_every_table_of_the_page(rehearsed, monkeypatch):
    monkeypatch.setattr(page, "GPU", rehearsed)
    tables = measured_tables()
    assert {name: len(rows) for name, rows in tables.items()} == {
        "products": 6,
        "layer": 2,
        "step": 1,
        "generation": 2,
    }
    rows = {
        (line["part"], row["name"]): row
        for line in record.read(rehearsed)
        for row in line["rows"]
    }
    for cells in tables["products"]:
        ours = rows["products", f"{cells[0]}: ours"]["us"]
        ragged = rows["baselines", f"{cells[0]}: lax.ragged_dot"]["us"]
        assert (cells[1], cells[3]) == (f"{ours:.1f}", f"{ragged:.1f}")
        assert cells[4] == ""  # traced alone
    for what, milliseconds, *_ in tables["layer"]:
        assert milliseconds == f"{rows['layer', f'{what}: trix']['us'] / 1e3:.2f}"
    for part, memory in (("step", "peak_bytes"), ("generation", "served_bytes")):
        for cells in tables[part]:
            trix, equal, active = (
                rows[part, f"{part}, {cells[0]}: {way}"]
                for way in ("trix", page.EQUAL, page.ACTIVE)
            )
            speed = trix["tokens_per_second"]
            assert cells[1] == f"{speed:,}"
            assert cells[2] == f"{speed / equal['tokens_per_second']:.2f}"
            assert cells[3] == f"{speed / active['tokens_per_second']:.2f}"
            assert cells[4] == f"{trix[memory] / 1e9:.2f}"
