"""The page to read says what its results give, with signs and seeds."""

import json
import re
from pathlib import Path

import pytest

from experiments.quality import claim_page, page, run, worth
from experiments.quality.claim import claim
from tests.experiments.test_worth import run_of, with_sweeps
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
    path = folder / "results" / "wikipedia-64.json"
    results.write(path, with_sweeps(setting, runs))
    return page.text(folder)


def test_no_results_make_a_page_that_says_so(tmp_path):
    assert "The claim has no runs yet." in page.text(tmp_path)


def test_the_first_sentence_has_the_sign_the_seeds_and_whether_it_is_decided(tmp_path):
    names = ("tiles-64-hash", "tiles-64-held")
    one = page_of(tmp_path, dict(zip(names, [(0.0,), (0.0172,)], strict=True)))
    said = "tiles by signatures that are held end 0.0172 nats behind the same by a hash of the token"
    assert f"At width 64, {said}; one seed, undecided." in one.splitlines()[2]
    # The first seed chose the rates: it concludes nothing where others have run.
    gaps = [(0.0, 0.0, 0.0, 0.0), (9.0, -0.01, -0.02, -0.03)]
    three = page_of(tmp_path, dict(zip(names, gaps, strict=True)))
    assert (
        "end 0.0200 nats ahead of the same by a hash of the token; ± 0.0248, 3 seeds, undecided"
        in three
    )
    assert "| -0.0200 | ± 0.0248 | 3 | undecided |" in three  # less the hash
    assert "| +0.0200 | ± 0.0248 | 3 | undecided |" in three  # the hash, less held
    gaps = [(0.0, 0.0, 0.0, 0.0), (9.0, -0.02, -0.02, -0.021)]
    assert "3 seeds, decided." in page_of(tmp_path, dict(zip(names, gaps, strict=True)))


def test_the_first_sentence_says_what_signatures_do_and_what_is_hashed(tmp_path):
    arms = {"tiles-64-moving": (0.0,), "tiles-64-hash-pairs": (0.1,)}
    assert (
        "tiles by signatures that move end 0.1000 nats ahead of the same by a hash of "
        "the token and the one before; one seed" in page_of(tmp_path, arms)
    )


@pytest.mark.slow
def test_the_page_says_first_what_tiles_are_worth(tmp_path):
    """W of 64 tiles at D = 64, held: 162."""
    names = ("dense-128", "dense-256", "dense-512", "tiles-64-held")
    losses = (0.2, 0.1, 0.0)
    tiles = (
        "**At width 64 of the model, 4 of 64 ternary tiles by signatures that are held"
    )
    for loss, said in (
        (
            0.1,
            "are worth a dense FFN of width 256.** That is 1.59 times the width that they take, "
            "162; one seed, undecided. Rates not bracketed: `tiles-64-held`, `dense-256`.",
        ),
        (0.3, "are worth less than the dense FFN 128 wide, the narrowest that has"),
        (
            -0.1,
            "are worth more than the dense FFN 512 wide, the widest with as many seeds (95 %).",
        ),
    ):
        gaps = dict(zip(names, [(x,) for x in (*losses, loss)], strict=True))
        lines = page_of(tmp_path, gaps).splitlines()
        assert lines[2].startswith(f"{tiles} {said}")
        assert lines[4].startswith(
            "W, the width that an FFN takes, is"
        )  # before its use
        assert "W" not in lines[2].replace("At width", "")


@pytest.mark.slow
def test_a_mean_beyond_the_curve_has_a_lower_bound_on_it(tmp_path):
    gaps = {"dense-128": (0.2,) * 4, "dense-256": (0.1,) * 4}
    gaps["dense-512"] = (0.0, 0.02, 0.0, -0.02)
    gaps["tiles-64-held"] = (-0.005, 0.015, -0.005, -0.025)
    page = page_of(tmp_path, gaps)
    first, bound = re.search(
        r"a dense FFN of width (\d+) or more \(95 %\)\.\*\* That is (\S+) times", page
    ).groups()
    assert 256 < int(first) < 512
    assert float(bound) == pytest.approx(int(first) / 162, abs=0.02)
    assert "Their mean is ahead of the dense FFN 512 wide, the widest with as" in page


@pytest.mark.slow
def test_the_seed_that_chooses_takes_the_arm_and_the_others_say_its_worth(tmp_path):
    arms = ("tiles-64-held", "tiles-64-hash")  # of W 162 and 129
    gaps = {"dense-128": (0.2,), "dense-256": (0.1,), "dense-512": (0.0,)}
    gaps |= {arms[0]: (0.05, 0.15, 0.15), arms[1]: (0.1, 0.05, 0.05)}
    first = page_of(tmp_path, gaps).splitlines()[2]
    held = "4 of 64 ternary tiles by signatures that are held are worth"
    assert f"{held} a dense FFN of width 181.** That is 1.12 times" in first
    assert "one seed, undecided" in first  # the dense FFNs have one
    gaps |= {f"dense-{w}": (x, x, x) for w, x in ((128, 0.2), (256, 0.1), (512, 0.0))}
    assert "they take, 162; 2 seeds. Rates" in page_of(tmp_path, gaps).splitlines()[2]
    # Worth less than the curve has: it is named, since other tiles are on the curve.
    gaps |= {arms[0]: (0.05, 0.3, 0.3), "tiles-32-held": (0.15, 0.15, 0.15)}
    first = page_of(tmp_path, gaps).splitlines()[2]
    said = "less than the dense FFN 128 wide, the narrowest that has run.** They take a width of 162; 2"
    assert f"{held} {said}" in first
    # What the first seed alone has run is read off that seed's curve.
    gaps |= {f"dense-{w}": (x, 1.0, 1.0) for w, x in ((128, 0.2), (256, 0.1), (512, 0))}
    gaps[arms[0]] = (0.05,)
    first = page_of(tmp_path, gaps).splitlines()[2]
    assert "a dense FFN of width 362.** That is 2.24 times" in first
    assert "162; one seed, undecided." in first


def test_a_row_shows_the_loss_of_the_seeds_that_its_difference_has(tmp_path):
    base, shared = "tiles-64-hash-eighth", "tiles-64-hash-eighth-shared"
    made = page_of(tmp_path, {base: (0.0,), shared: (0.05, 0.4)})
    assert f"| {shared} | wikipedia-64 | 0.002* | 4.6500 | +0.0500 |  | 1 |" in made
    made = page_of(tmp_path, {base: (0.0, 0.1), shared: (0.05, 0.4)})
    assert f"| {shared} | wikipedia-64 | 0.002* | 5.0000 | +0.3000 |  | 1 |" in made


def test_losses_that_are_gone_are_a_line_beside_the_arm_without_and_no_candidate(
    tmp_path,
):
    arms = claim(64).groups["before"]
    shared, gelu = "tiles-64-hash-eighth-shared", "tiles-64-hash-eighth-shared-gelu"
    assert [arm.name for arm in arms] == [f"{shared}-losses", f"{gelu}-losses"]
    assert all(step.group != "before" for step in claim(64).order)
    gaps = {shared: (0.0, 0.0, 0.0), gelu: (0.1,), f"{gelu}-losses": (0.11,)}
    gaps |= {f"{shared}-losses": (0.0, -0.1, -0.1)}
    gaps |= {f"dense-{w}": (x, x, x) for w, x in ((128, 0.1), (256, -0.2))}
    made = page_of(tmp_path, gaps)
    _, _, lost = made.partition("## What was tried and lost")
    assert "with auxiliary losses that hashes had until commit 921d8bd" in lost
    said = "-0.1000 | ± 0.0000, 2 seeds |"
    where = "wikipedia-64, epochs"
    assert f"| {shared}-losses | {where} | {shared} | 0.002* | {said}" in lost
    assert f"| {gelu}-losses | {where} | {gelu} | 0.002* | +0.0100 | one seed |" in lost
    assert "-losses" not in made[: -len(lost)]
    runs = results.read(tmp_path / "results" / "wikipedia-64.json")
    assert claim_page.chosen(64, runs) == shared
    assert "losses" not in (tmp_path / "results" / "claim.json").read_text()
    # Signatures are not compared with them either.
    runs += [run_of(claim(64), claim(64).arm("tiles-64-held"), 4.0, 42)]
    assert worth.signatures_and_hash(runs) is None


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
    assert "| tiles-64-held | 0.002* | +0.0503 | ± 0.0014, 3 seeds |" in lost


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
