"""A disk that is full, or that cannot be written to, at each place where a run writes."""

import contextlib
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from trix_jax.cli import main
from trix_jax.cli import train as verb  # noqa: F401  as nobody, it could not be read
from trix_jax.lm.checkpoint import checkpoint, step_files
from trix_jax.lm.data import DataConfig, prepare
from trix_jax.lm.train.loop import train

NOBODY = 65534


def quiet(_):
    pass


@contextlib.contextmanager
def files_up_to(size):
    """Inside, a file that would grow above `size` bytes meets what a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def sealed():
    """A folder that cannot be written to: root may write anywhere, so it steps back for
    a while.
    """
    folder = Path(tempfile.mkdtemp())
    (folder / "text").write_text("to be or not to be " * 20)
    is_root = os.geteuid() == 0
    folder.chmod(0o555)
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def half_of(run_dir, target):
    """A run that is to go on from step 5."""
    shutil.copytree(run_dir, target)
    shutil.rmtree(target / "checkpoints" / "00000010")
    (target / "summary.json").unlink()
    return target


def assert_goes_on(config, run, run_dir, devices):
    train(config, run, devices=devices, report=quiet)
    trees = [checkpoint.restore_arrays(r / "checkpoints", 10) for r in (run, run_dir)]
    for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(x, y)


# TensorStore's other arrays still report to Orbax's event loop when it is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_disk_full_in_a_save_stops_with_a_sentence_and_loses_no_step(
    tiny_config, one_device, run_dir, tmp_path
):
    run = half_of(run_dir, tmp_path / "run")
    # Arrays are in one file or in several, as the threads have it; `_METADATA`, one file
    # of 12,800 bytes, and each run's log of 4,000 leave no other case.
    with files_up_to(10_000), pytest.raises(OSError, match="File too large") as caught:
        train(tiny_config, run, devices=one_device, report=quiet)
    assert "Step 10 could not be saved" in str(caught.value)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["00000005"]
    assert_goes_on(tiny_config, run, run_dir, one_device)


def test_disk_full_in_the_log_stops_with_its_name_and_loses_no_step(
    tiny_config, one_device, run_dir, tmp_path
):
    run = half_of(run_dir, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    size = len("".join(lines[:8]))  # steps 1 to 5, the evaluation, 6, 7
    with (
        files_up_to(size),
        pytest.raises(OSError, match=r"metrics\.jsonl could not be"),
    ):
        train(tiny_config, run, devices=one_device, report=quiet)
    assert checkpoint.steps(run / "checkpoints") == [5]
    assert_goes_on(tiny_config, run, run_dir, one_device)


@pytest.mark.parametrize("size", [100, 3000])
def test_disk_full_in_preparation_names_the_file_and_leaves_nothing(
    corpus, tmp_path, size
):
    folder = tmp_path / "folder"
    folder.mkdir()
    config = DataConfig(source="text", path=str(corpus), tokenizer="byte")
    with files_up_to(size), pytest.raises(OSError, match="could not be written: File"):
        prepare(config, folder / "data", quiet)
    assert list(folder.iterdir()) == []
    assert len(prepare(config, folder / "data", quiet).train) > 0


def test_folder_that_is_read_only_is_named(sealed):
    config = DataConfig(source="text", path=str(sealed / "text"), tokenizer="byte")
    with pytest.raises(OSError, match="data could not be written: Permission denied"):
        prepare(config, sealed / "data", quiet)
    with pytest.raises(OSError, match=r"Step 1 could not .* denied: '.*checkpoints'"):
        checkpoint.save(sealed / "checkpoints", 1, {"w": np.zeros(3)}, {})
    assert [path.name for path in sealed.iterdir()] == ["text"]


def test_train_verb_in_a_read_only_folder_exits_one_with_its_name(sealed, capsys):
    place, text = sealed / "run", sealed / "text"
    flags = ["--data.path", str(text), "--data.tokenizer", "byte"]
    assert main(["train", "--workdir", str(place), *flags]) == 1
    said = capsys.readouterr().err
    assert f"{place}" in said
    assert "Permission denied" in said
    assert "Traceback" not in said


def test_a_folder_that_is_still_written_to_is_cleared(tmp_path, monkeypatch):
    folder = tmp_path / ".tmp-1"
    folder.mkdir()
    remove = shutil.rmtree
    late = iter(["d/array", None])

    def remove_and_write(path, **kwargs):
        remove(path, **kwargs)
        if name := next(late):  # a thread of TensorStore's
            (path / name).parent.mkdir(parents=True)
            (path / name).touch()

    monkeypatch.setattr(step_files.shutil, "rmtree", remove_and_write)
    step_files.clear(folder)
    assert not folder.exists()
    assert next(late, "done") == "done"
