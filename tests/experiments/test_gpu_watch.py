"""What the command that measures a GPU keeps when a part ends its process, or hangs."""

import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.speed.gpu import __main__ as command
from experiments.speed.gpu import record, timing, watch
from experiments.speed.gpu.parts import Part
from experiments.speed.gpu.shapes import REHEARSAL
from tests.experiments.test_gpu import run


def test_a_part_is_in_the_file_while_it_is_measured(monkeypatch, tmp_path):
    path, seen = tmp_path / record.NAME, []

    def rows(shapes):
        for number in range(2):
            seen.append(record.read(path)[-1])
            yield {"name": number}

    monkeypatch.setattr(command, "PARTS", {"a": Part("", 1, rows)})
    assert run(tmp_path) == 0
    assert [line["rows_before_error"] for line in seen] == [[], [{"name": 0}]]
    assert all(line["unfinished"] for line in seen)
    assert record.measured(seen) == set()
    (line,) = record.read(path)
    assert line["rows"] == [{"name": 0}, {"name": 1}]
    assert "unfinished" not in line


MEASURES = """
import os, sys, time
from pathlib import Path
from experiments.speed.gpu import record
for name in sys.argv[2:]:
    line = {"part": name}
    open_ = {"unfinished": True, "started": time.time(), "error": "it did not end"}
    record.append(Path(sys.argv[1]), line | open_ | {"rows_before_error": [1]})
    if name == "b":
        os.abort()
    if name == "c":
        time.sleep(600)
    record.append(Path(sys.argv[1]), line | {"rows": []})
"""


@pytest.mark.slow
def test_a_part_that_ends_its_process_or_never_ends_fails_alone(
    monkeypatch, tmp_path, capsys
):
    path, asked = tmp_path / record.NAME, []
    monkeypatch.setattr(watch, "PARTS", dict.fromkeys("abcd", Part("", 1, iter)))
    stale = {"part": "d", "unfinished": True, "started": 0.0, "error": "it did not end"}
    record.append(path, stale)

    def measure(parts, minutes):
        asked.append("".join(parts))
        return [sys.executable, "-c", MEASURES, str(path), *parts]

    assert watch.watched("abcd", path, 9, measure) == 1
    assert asked == ["abcd", "cd", "d"]
    lines = record.read(path)[1:]
    assert [line["part"] for line in lines] == ["a", "b", "c", "d"]
    assert record.measured(lines) == {"a", "d"}
    assert lines[1]["error"] == "the process ended with -6"
    assert lines[2]["error"] == "the process was ended after 3 s"
    assert record.rows(lines[2]) == [1]
    assert "c: FAILED, the process was ended" in capsys.readouterr().out
    assert not any("unfinished" in line for line in record.read(path))


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (2, 2), (3, 3), (7, 1)])
def test_what_a_process_says_by_its_exit_code_is_said(code, expected, tmp_path):
    def measure(parts, minutes):
        return [sys.executable, "-c", f"raise SystemExit({code})"]

    assert watch.watched("a", tmp_path / record.NAME, 9, measure) == expected


@pytest.mark.slow
def test_the_command_starts_itself_and_says_that_there_is_no_gpu(tmp_path, capfd):
    assert command.main(["--output", str(tmp_path), "--minutes", "1"]) == 2
    assert "There is no GPU here. --rehearse" in capfd.readouterr().err


def test_a_rival_that_cannot_run_has_its_error_in_its_row():
    def broken(x):
        raise NotImplementedError("not on this device")

    x = jnp.ones(2)
    works = timing.Case(jax.jit(lambda x: x + 1), (x,))
    fails = timing.Case(broken, (x,))
    rows = timing.timed({"ours": works, "theirs": fails, "third": works}, REHEARSAL)
    assert rows["theirs"] == {"failed": "NotImplementedError: not on this device"}
    assert rows["third"]["times_the_first"] > 0
    with pytest.raises(NotImplementedError):
        timing.timed({"ours": fails, "theirs": works}, REHEARSAL)
