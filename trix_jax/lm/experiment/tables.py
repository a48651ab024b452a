"""The tables of experiments and sweeps, as Markdown."""

import math
from collections.abc import Sequence
from statistics import mean

from trix_jax.lm.experiment.results import Result
from trix_jax.lm.experiment.stats import paired, spread, verdict
from trix_jax.lm.experiment.tuning import Tuned, sweep
from trix_jax.lm.train.evaluate import perplexity


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are text and the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    lines = [head, rule, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def runs_table(arms: Sequence[Sequence[Result]]) -> str:
    """The arms of an experiment's size, each with its seeds, lowest loss first."""
    rows = []
    for runs in sorted(arms, key=mean_loss):
        one = runs[0]
        shares = [r.min_entropy_share or 0 for r in runs]
        rows.append(
            [
                one.arm,
                str(len(runs)),
                f"{one.learning_rate:g}",
                spread([r.val_loss for r in runs]),
                f"{perplexity(mean_loss(runs)):.2f}",
                _bits([r.val_bits_per_byte for r in runs]),
                f"{mean(r.train_val_gap or 0 for r in runs):+.3f}",
                f"{one.params_total:,}",
                f"{one.ffn_active:,}",
                f"{one.ffn_bits:,}",
                "" if one.is_dense else f"{min(shares):.3f}",
                "" if one.is_dense else str(max(r.dead_tiles or 0 for r in runs)),
                f"{mean(r.seconds or 0 for r in runs):,.0f}",
                f"{mean(r.tokens_per_second or 0 for r in runs):,.0f}",
            ]
        )
    head = (
        "arm|seeds|rate|validation loss|perplexity|bits per byte|train-val gap|parameters|"
        "FFN MACs a token|FFN bits|least entropy share|dead tiles|seconds|tokens/s"
    )
    return table(head.split("|"), rows)


def difference_table(arms: Sequence[tuple[str, Tuned]], base: Tuned) -> str:
    """Paired differences to the base; a positive one is worse than it.

    Args:
        arms: each with a note on its rate.
    """
    rows = []
    for note, arm in arms:
        found = paired(arm.losses, base.losses)
        shift = "" if found is None else f"{found.mean:+.4f}"
        bound = "" if found is None or found.n < 2 else f"± {found.half:.4f}"
        pairs = str(found.n if found else 0)
        loss = spread(list(arm.losses.values()))
        word = verdict(found, below="better", above="worse", alone="one seed")
        rows.append([arm.arm, note, rate_of(arm), pairs, loss, shift, bound, word])
    head = "arm,its rate is,rate,pairs,validation loss,difference,95%,verdict"
    return table(head.split(","), rows, left=2)


def sweep_table(results: Sequence[Result], arms: Sequence[str], seed: int) -> str:
    """Losses of one seed, arm by rate."""
    rates = sorted({r for arm in arms for r in sweep(results, arm, seed)})
    rows = []
    for arm in arms:
        losses = sweep(results, arm, seed)
        cells = [
            ""
            if r not in losses
            else f"{losses[r]:.4f}"
            if math.isfinite(losses[r])
            else "diverged"
            for r in rates
        ]
        rows.append([arm, *cells])
    return table(["arm", *(f"{r:g}" for r in rates)], rows)


def rate_of(arm: Tuned) -> str:
    """Its rate, with a star where it is not bracketed, and how many seeds diverged."""
    star = "" if arm.is_bracketed else "*"
    lost = f" ({len(arm.diverged)} diverged)" if arm.diverged else ""
    return f"{arm.rate:g}{star}{lost}"


def _bits(values: Sequence[float | None]) -> str:
    """Their mean; nothing where one is not known."""
    known = [value for value in values if value is not None]
    return f"{mean(known):.4f}" if len(known) == len(values) else ""


def mean_loss(runs: Sequence[Result]) -> float:
    """Mean validation loss."""
    return mean(run.val_loss for run in runs)
