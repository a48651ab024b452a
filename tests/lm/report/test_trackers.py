"""Metrics on their way to a tracker."""

import json
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trix_jax.cli import main
from trix_jax.lm.report.trackers import lines, scalars, send, track
from trix_jax.lm.train import metrics


class Notes:
    def __init__(self):
        self.logged = []

    def log(self, step, values):
        self.logged.append((step, values))

    def close(self):
        pass


def test_every_number_of_a_line_has_a_name():
    line = {
        "event": "eval",
        "step": 5,
        "val_loss": 2.0,
        "tile_usage": [[0.25, 0.75]],
        "note": None,
    }
    assert scalars(line) == {
        "eval/val_loss": 2.0,
        "eval/tile_usage/0/0": 0.25,
        "eval/tile_usage/0/1": 0.75,
    }


def test_all_lines_of_a_run_are_sent_in_order(run_dir):
    notes = Notes()
    whole = list(metrics.read(run_dir / "metrics.jsonl"))
    assert send(lines(run_dir, False, 0.0), notes) == len(whole) == 12
    assert [step for step, _ in notes.logged] == [line["step"] for line in whole]
    assert notes.logged[0][1]["step/loss"] == whole[0]["loss"]


def test_following_sends_what_comes_once_and_ends_with_the_run(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def line(step):
        return json.dumps({"event": "step", "step": step, "loss": 1.0 / step}) + "\n"

    class Slow(Notes):
        def log(self, step, values):
            super().log(step, values)
            if step == 2:  # resumed from step 1, and then done
                path.write_text(line(1) + line(2) + line(3))
                (tmp_path / "summary.json").write_text("{}")

    path.write_text(line(1) + line(2))
    notes = Slow()
    worker = threading.Thread(target=send, args=(lines(tmp_path, True, 0.01), notes))
    worker.start()
    worker.join(10)
    assert not worker.is_alive()
    assert [step for step, _ in notes.logged] == [1, 2, 3]


def test_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a run directory"):
        track(tmp_path, "tensorboard")


def read_events(folder: Path):
    """TensorBoard's records: length, its checksum, an event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.glob("events.*")
    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        event = Event.FromString(data[at + 12 : at + 12 + length])
        yield from ((event.step, v.tag, v.simple_value) for v in event.summary.value)
        at += 16 + length


def copy_of(run_dir, tmp_path):
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    return tmp_path


def test_tensorboard_has_the_losses(run_dir, tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    workdir = copy_of(run_dir, tmp_path)
    assert main(["track", "--workdir", str(workdir), "--to", "tensorboard"]) == 0
    found = {
        (step, tag): value for step, tag, value in read_events(workdir / "tensorboard")
    }
    for line in metrics.read(run_dir / "metrics.jsonl"):
        name = "loss" if line["event"] == "step" else "val_loss"
        value = found[line["step"], f"{line['event']}/{name}"]
        assert value == pytest.approx(line[name], rel=1e-6)


@pytest.mark.slow
def test_wandb_takes_a_run_offline(run_dir, tmp_path, user_env):
    pytest.importorskip("wandb")
    workdir = copy_of(run_dir, tmp_path)
    code = f"from trix_jax.lm.report.trackers import track; track({str(workdir)!r}, 'wandb')"
    env = {**user_env, "WANDB_MODE": "offline"}
    subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, check=True)
    (record,) = (workdir / "wandb").glob("offline-run-*/run-*.wandb")
    assert record.read_bytes().count(b"eval/val_loss") >= 2
