"""The tables of the front page and of the results page are those of the committed
results.
"""

import dataclasses

import pytest

from experiments import front_page
from experiments.quality.claim import claim
from experiments.quality.worth import model_of
from trix_jax.cli.train import Args
from trix_jax.lm.experiment import results
from trix_jax.lm.presets import parse_preset

ENGLISH = front_page.ROOT / "configs" / "english.yaml"


def preset(arm=None):
    argv = [str(ENGLISH), *(["--arm", arm] if arm else [])]
    return parse_preset(Args, argv, "train").config.model


def test_tables_are_those_of_the_committed_results():
    for path in front_page.PAGES:
        page = path.read_text("utf-8")
        assert "<!-- front page: comparison -->" in page
        assert front_page.filled(page) == page, "run python -m experiments.front_page"


@pytest.mark.parametrize(
    ("page", "setting", "arm"),
    [
        (0, "wikipedia-128", "tiles-64-hash-eighth-shared-layers"),
        (1, "english-256-muon", front_page.TRIX),
    ],
)
def test_changed_result_changes_the_page(page, setting, arm, tmp_path, monkeypatch):
    runs = results.read(front_page.RESULTS / f"{setting}.json")
    losses = {str(run.val_loss) for run in runs if run.arm == arm and run.seed == 43}
    for path in front_page.RESULTS.glob("*.json"):
        text = path.read_text("utf-8")
        for loss in losses:
            text = text.replace(loss, str(float(loss) + 0.3))
        (tmp_path / path.name).write_text(text)
    monkeypatch.setattr(front_page, "RESULTS", tmp_path)
    text = front_page.PAGES[page].read_text("utf-8")
    assert front_page.filled(text) != text


def test_the_recommended_configuration_is_that_of_the_claim_with_dense_twins():
    model = preset()
    arm, _ = claim(128).groups["more"]
    assert model_of(claim(128), arm, 4096) == dataclasses.replace(
        model, vocab_size=4096
    )
    read = preset("signatures")
    assert (read.routing.source, read.routing.hold_after) == ("weights", 0.1)
    twins = [preset(name) for name in ("dense", "dense-cost")]
    assert [twin.ffn_width for twin in twins] == [3104, 417]
    assert {(twin.ffn, twin.shared_width) for twin in twins} == {("dense", 0)}
