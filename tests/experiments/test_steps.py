"""The timing of training steps names every FFN of the front page, and runs."""

import json

import pytest

from experiments import front_page
from experiments.speed import steps


def test_measured_steps_are_those_of_the_front_page():
    measured = json.loads(steps.PATH.read_text("utf-8"))["arms"]
    setting = front_page.SETTINGS[front_page.FRONT]
    widths = setting.compute, setting.memory, setting.params
    assert set(measured) == {front_page.TRIX, *(f"dense-{w}" for w in widths)}
    assert {name: arm["flags"] for name, arm in measured.items()} == steps.ARMS


@pytest.mark.slow
def test_steps_are_timed_in_turn(monkeypatch):
    small = "--model.d-model 16 --model.n-layers 1 --model.context 8 --train.batch-size 2 --model.num-tiles 4"
    monkeypatch.setattr(steps, "FLAGS", f"{steps.FLAGS} {small}")
    taken = steps.measure(steps.ARMS, 2)
    assert set(taken) == set(steps.ARMS)
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in taken.values())
