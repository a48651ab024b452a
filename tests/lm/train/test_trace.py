"""Traces for xprof."""

import dataclasses

import pytest

from trix_jax.cli import main
from trix_jax.lm.train.loop import train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "trace_steps", "files"), [(6, 2, 1), (3, 9, 1), (4, 0, 0)]
)
def test_a_trace_is_written_even_if_the_run_ends_before_it(
    tiny_config, one_device, tmp_path, steps, trace_steps, files
):
    config = dataclasses.replace(
        tiny_config, train=dataclasses.replace(tiny_config.train, steps=steps)
    )

    def quiet(_):
        return None

    train(config, tmp_path, devices=one_device, trace_steps=trace_steps, report=quiet)
    written = list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert len(written) == files
    assert all(path.stat().st_size > 1000 for path in written)


def test_negative_trace_steps_are_refused(capsys):
    assert main(["train", "--trace-steps", "-1"]) == 2
    assert "trace_steps must not be negative. Got -1." in capsys.readouterr().err
