"""The command that measures a GPU: what it keeps, what it repeats, what it says, and all
of its parts at tiny shapes on this machine.
"""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments.speed.gpu import __main__ as command
from experiments.speed.gpu import products, record
from experiments.speed.gpu.parts import PARTS, Part
from experiments.speed.gpu.shapes import FULL, REHEARSAL


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
    assert "s, FAILED\n  ArithmeticError: out of memory" in capsys.readouterr().out
    broken.clear()
    assert run(tmp_path) == 0
    assert done == ["a", "b", "c", "b"]
    assert len(record.read(tmp_path / record.NAME)) == 4
    assert run(tmp_path) == 0
    assert done == ["a", "b", "c", "b"]


def test_a_row_that_is_not_equal_fails_the_part(monkeypatch, tmp_path):
    rows = [{"name": "up", "failed": "3 numbers differ"}]
    monkeypatch.setattr(command, "PARTS", {"a": Part("", 1, lambda shapes: iter(rows))})
    assert run(tmp_path) == 1
    (line,) = record.read(tmp_path / record.NAME)
    assert record.failures(line) == ["up: 3 numbers differ"]


def test_parts_are_chosen_and_minutes_stop_before_what_would_not_fit(
    parts, tmp_path, monkeypatch, capsys
):
    done, broken = parts
    broken.clear()
    assert run(tmp_path, "--parts", "c", "a") == 0
    assert done == ["c", "a"]
    monkeypatch.setattr(command, "on_gpu", lambda: True)
    flags = ["--output", str(tmp_path / "full")]
    assert command.main([*flags, "--minutes", "0.5"]) == 3
    assert "a is left out: 30 s are left." in capsys.readouterr().out
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
    assert command.main(["--output", str(tmp_path)]) == 2
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


@pytest.fixture
def compiled_fast():
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


QUICK = ("versions", "ceilings", "router")


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(tuple(PARTS), marks=pytest.mark.slow)]
)
def test_every_part_runs_at_tiny_shapes(names, tmp_path, compiled_fast):
    """What this machine cannot run is traced."""
    assert run(tmp_path, "--parts", *names) == 0
    lines = {line["part"]: line for line in record.read(tmp_path / record.NAME)}
    assert set(lines) == set(names)
    rows = {row["name"]: row for line in lines.values() for row in line["rows"]}
    assert all(row["us"] > 0 for row in rows.values() if "us" in row)
    assert rows["router, 4 tiles: plan"]["us"] > 0
    if names is QUICK:
        return
    ways = {"trix", "dense, equal parameters", "dense, active width"}
    for part in ("layer", "step", "generation", "evaluation"):
        assert {row["way"] for row in lines[part]["rows"]} >= ways
    # Six products, three loads, two oracles.
    assert len(lines["checks"]["rows"]) == 36
    assert "traced_only" in rows["up, 4 tiles, 128x128: jax's kernel, 128x128"]
    step = rows["step, 4 tiles: trix"]
    assert step["donated_bytes"] >= step["state_bytes"]
    assert abs(rows["losses, 4 tiles: trix"]["losses"][0] - 3.47) < 0.3  # log(32)
