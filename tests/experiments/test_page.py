"""The page to read says what its results give, with signs and seeds."""

import json
from pathlib import Path

import pytest

from experiments.quality import page, run
from experiments.quality.claim import claim
from tests.experiments.test_worth import run_of
from trix_jax.lm.experiment import results

SEEDS = (42, 43, 44, 45)


def page_of(folder: Path, gaps: dict[str, tuple[float, ...]]) -> str:
    """The page of runs at 64 wide, each arm's losses 4.6 and a gap a seed."""
    setting = claim(64)
    runs = [
        run_of(setting, setting.arm(name), 4.6 + gap, seed)
        for name, values in gaps.items()
        for seed, gap in zip(SEEDS, values, strict=False)
    ]
    (folder / "results").mkdir(exist_ok=True)
    results.write(folder / "results" / "wikipedia-64.json", runs)
    return page.text(folder)


def test_no_results_make_a_page_that_says_so(tmp_path):
    assert "The claim has no runs yet." in page.text(tmp_path)


def test_the_first_sentence_has_the_sign_the_seeds_and_whether_it_is_decided(tmp_path):
    names = ("tiles-64-hash", "tiles-64-held")
    one = page_of(tmp_path, dict(zip(names, [(0.0,), (0.0172,)], strict=True)))
    assert "ends 0.0172 nats behind a hash of the token; one seed, undecided.**" in one
    # The first seed chose the rates: it concludes nothing where others have run.
    gaps = [(0.0, 0.0, 0.0, 0.0), (9.0, -0.01, -0.02, -0.03)]
    three = page_of(tmp_path, dict(zip(names, gaps, strict=True)))
    assert (
        "ends 0.0200 nats ahead of a hash of the token; ± 0.0248, 3 seeds, undecided"
        in three
    )
    assert "| -0.0200 | ± 0.0248 | 3 | undecided |" in three  # less the hash
    assert "| +0.0200 | ± 0.0248 | 3 | undecided |" in three  # the hash, less held
    gaps = [(0.0, 0.0, 0.0, 0.0), (9.0, -0.02, -0.02, -0.021)]
    assert "3 seeds, decided.**" in page_of(
        tmp_path, dict(zip(names, gaps, strict=True))
    )


def test_the_first_sentence_says_what_signatures_do_and_what_is_hashed(tmp_path):
    arms = {"tiles-64-moving": (0.0,), "tiles-64-hash-pairs": (0.1,)}
    assert (
        "`tiles-64-moving`, whose signatures move, ends 0.1000 nats ahead of a hash of "
        "the token and the one before; one seed" in page_of(tmp_path, arms)
    )


@pytest.mark.slow
def test_the_page_says_first_what_tiles_are_worth(tmp_path):
    """W of 64 tiles at D = 64, held: 162."""
    names = ("dense-128", "dense-256", "dense-512", "tiles-64-held")
    losses = (0.2, 0.1, 0.0)
    for loss, said in (
        (
            0.1,
            "of W 162, is worth a dense FFN 256 wide, 1.59 times its W; one seed, undecided, "
            "rates not bracketed of `tiles-64-held` and `dense-256`.",
        ),
        (
            0.3,
            "no tiles, of W 162 to 162, are worth the dense FFN 128 wide, the narrow",
        ),
        (-0.1, "is worth more than the dense FFN 512 wide, the widest that has run;"),
    ):
        gaps = dict(zip(names, [(x,) for x in (*losses, loss)], strict=True))
        first = page_of(tmp_path, gaps).splitlines()[2]
        assert first.startswith("**wikipedia-64: ")
        assert said in first


@pytest.mark.slow
def test_the_seed_that_chooses_takes_the_arm_and_the_others_say_its_worth(tmp_path):
    arms = ("tiles-64-held", "tiles-64-hash")  # of W 162 and 129
    gaps = {"dense-128": (0.2,), "dense-256": (0.1,), "dense-512": (0.0,)}
    gaps |= {arms[0]: (0.05, 0.15, 0.15), arms[1]: (0.1, 0.05, 0.05)}
    first = page_of(tmp_path, gaps).splitlines()[2]
    assert "`tiles-64-held`, of W 162, is worth a dense FFN 181 wide, 1.12" in first
    assert "one seed, undecided" in first  # the dense FFNs have one
    gaps |= {f"dense-{w}": (x, x, x) for w, x in ((128, 0.2), (256, 0.1), (512, 0.0))}
    assert "times its W; 2 seeds, rates not" in page_of(tmp_path, gaps).splitlines()[2]
    # Worth less than the curve has: it is named, since other tiles are on the curve.
    gaps |= {arms[0]: (0.05, 0.3, 0.3), "tiles-32-held": (0.15, 0.15, 0.15)}
    first = page_of(tmp_path, gaps).splitlines()[2]
    said = "is worth less than the dense FFN 128 wide, the narrowest that has run; 2"
    assert f"`tiles-64-held`, of W 162, {said}" in first
    # What the first seed alone has run is read off that seed's curve.
    gaps |= {f"dense-{w}": (x, 1.0, 1.0) for w, x in ((128, 0.2), (256, 0.1), (512, 0))}
    gaps[arms[0]] = (0.05,)
    first = page_of(tmp_path, gaps).splitlines()[2]
    assert "a dense FFN 362 wide, 2.24 times its W; one seed" in first


def test_what_lost_is_what_lies_above_or_lost_by_much_with_one_seed(tmp_path):
    made = page_of(
        tmp_path,
        {
            "tiles-64-held": (0.0, 0.0, 0.0, 0.0),
            "tiles-64-moving": (-1.0, 0.05, 0.05, 0.051),
            "tiles-64-random": (0.01, 0.01, 0.03, -0.02),
            "tiles-64-held-late": (0.03,),
            "tiles-64-held-sign": (0.01,),
        },
    )
    _, _, lost = made.partition("## What was tried and lost")
    listed = [line.split(" | ")[0] for line in lost.splitlines() if "tiles-64" in line]
    assert listed == ["| tiles-64-moving", "| tiles-64-held-late"]
    assert "1 further comparisons are undecided" in lost


def test_the_committed_page_is_short():
    text = (run.RESULTS.parent / "REPORT.md").read_text("utf-8")
    before_questions = text.partition("\n## Is reading")[0]
    rows = [line for line in before_questions.splitlines() if line.startswith("| ")]
    assert len(rows) <= 2 + 8
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert len(" ".join(prose).split()) < 800
    claimed = run.RESULTS / "claim.json"
    assert not claimed.exists() or set(json.loads(claimed.read_text())) == {
        "settings",
        "signature_minus_hash",
    }
