"""A step moves whole, over disks too."""

import errno
from pathlib import Path

import numpy as np
import pytest

from trix_jax.lm.checkpoint import checkpoint, step_files


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_step_moves_to_another_disk(tmp_path, monkeypatch, is_interrupted):
    here, there = tmp_path / "here", tmp_path / "there"
    checkpoint.save(here, 1, {"w": np.arange(3.0)}, {"val_loss": 1.0})
    names = {path.relative_to(here) for path in here.rglob("*")}
    interrupts, rename = [KeyboardInterrupt] * is_interrupted, Path.rename

    def on_two_disks(path, target):
        if path.parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        if interrupts:
            raise interrupts.pop()
        return rename(path, target)

    with monkeypatch.context() as context:
        context.setattr(Path, "rename", on_two_disks)
        if is_interrupted:
            with pytest.raises(KeyboardInterrupt):
                step_files.move(here, 1, there)
            assert checkpoint.steps(here) == [1]
            assert checkpoint.steps(there) == []
            assert not list(there.iterdir())
        step_files.move(here, 1, there)
    assert checkpoint.steps(here) == []
    assert checkpoint.verify(there / "00000001") is None
    assert {path.relative_to(there) for path in there.rglob("*")} == names


def test_a_step_that_cannot_be_copied_leaves_that_of_its_number(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, value in ((here, 1.0), (there, 2.0)):
        checkpoint.save(folder, 1, {"w": np.full(3, value)}, {})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def on_two_disks(path, target):
        if path.parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(path, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", on_two_disks)
    with monkeypatch.context() as context:
        context.setattr(step_files.shutil, "copytree", full)
        with pytest.raises(OSError, match="No space"):
            step_files.move(here, 1, there)
    for folder, value in ((here, 1.0), (there, 2.0)):
        found = checkpoint.restore_arrays(folder, 1)
        np.testing.assert_array_equal(found["w"], value)
    step_files.move(here, 1, there)
    assert checkpoint.restore_arrays(there, 1)["w"].tolist() == [1.0, 1.0, 1.0]
    assert [path.name for path in there.iterdir()] == ["00000001"]
