"""The report's section on what routing does, from `results/doing.json`."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.quality.intervals import paired
from experiments.quality.tables import table

Entry = dict[str, Any]


def section(folder: Path) -> list[str]:
    """Nothing where nothing was measured."""
    path = folder / "doing.json"
    if not path.exists():
        return []
    entries = json.loads(path.read_text(encoding="utf-8"))
    routed = [entry for entry in entries if entry["layers"]]
    return [
        "## What routing does\n",
        "Measured by `python -m experiments.quality.measure` on the validation split; in brackets "
        "what chance gives with the tiles shuffled. A token's tile is the best of those it chose. "
        "Means over layers.\n",
        specialization(routed),
        "Information: what the tile tells about the previous token once the token itself is known, "
        "as a share of all that is left to know about the tile, chance subtracted. Purity: share of "
        "tokens that are of their tile's commonest class. Use distance: total variation between the "
        "tiles of the hardest and the easiest quarter of tokens.\n",
        "### Loss by difficulty\n",
        difficulty(entries),
        "Quarters of the validation tokens by the loss of a dense run, easiest first.\n",
        "### Train-validation gap\n",
        gaps(entries),
    ]


def specialization(entries: list[Entry]) -> str:
    """Rows: arm and seed; columns: the three measures and the entropy by difficulty."""
    rows = []
    for entry in entries:
        layers = entry["layers"]
        left = np.mean([layer["entropy_given_token"] for layer in layers])
        value, chance, _ = mean_triple(layers, "information")
        share = (value - chance) / left if left > 0 else 0.0
        spread = np.mean([layer["entropy_by_difficulty"] for layer in layers], axis=0)
        rows.append(
            [
                entry["arm"],
                str(entry["seed"]),
                f"{left:.3f}",
                f"{value:.3f} ({chance:.3f})",
                f"{share:.1%}",
                with_chance(layers, "purity"),
                with_chance(layers, "use_distance"),
                " ".join(f"{v:.2f}" for v in spread),
            ]
        )
    head = "arm,seed,H(tile given token) nats,I(tile; previous given token) nats"
    head += ",of what is left,purity,use distance,entropy by difficulty"
    return table(head.split(","), rows)


def difficulty(entries: list[Entry]) -> str:
    """Loss of every run in the four quarters."""
    rows = []
    if entries:
        cells = [f"{v:.3f}" for v in entries[0]["reference_by_difficulty"]]
        rows.append(["the reference", "", *cells])
    for entry in entries:
        cells = [f"{v:.3f}" for v in entry["loss_by_difficulty"]]
        rows.append([entry["arm"], str(entry["seed"]), *cells])
    return table(["arm", "seed", "easiest", "second", "third", "hardest"], rows)


def gaps(entries: list[Entry]) -> str:
    """Validation less training loss, and ternary less float weights paired by seed."""
    by_arm: dict[str, dict[int, float]] = defaultdict(dict)
    for entry in entries:
        by_arm[entry["arm"]][entry["seed"]] = entry["gap"]
    rows = [
        [arm, str(len(gap)), f"{np.mean(list(gap.values())):.4f}"]
        for arm, gap in by_arm.items()
    ]
    text = table(["arm", "seeds", "validation - training loss"], rows)
    for arm in by_arm:
        if f"{arm}-float" in by_arm:
            found = paired(by_arm[arm], by_arm[f"{arm}-float"])
            if found:
                bound = f" ± {found.half:.4f}" if found.n > 1 else ""
                text += f"\nGap of {arm}, ternary less float weights: {found.mean:+.4f}{bound} ({found.n} seeds).\n"
    return text


def with_chance(layers: list[dict], name: str) -> str:
    value, chance, _ = mean_triple(layers, name)
    return f"{value:.3f} ({chance:.3f})"


def mean_triple(layers: list[dict], name: str) -> tuple[float, float, float]:
    value, chance, spread = np.mean([layer[name] for layer in layers], axis=0)
    return float(value), float(chance), float(spread)
