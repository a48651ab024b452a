"""What a run came to: one record, read and written here alone.

A results file is a JSON list of records. A run that is in there is done, whatever its
directory holds. Workers side by side may add to one file. Files of earlier versions,
which lack some keys, read too.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trix_jax.files import read_json, write_whole
from trix_jax.lm.accounting import costs
from trix_jax.lm.config import SAMPLER_BEFORE, load
from trix_jax.lm.experiment.directory import has_ended, held, is_diverged
from trix_jax.lm.experiment.spec import Spec, name_of, public_command
from trix_jax.lm.report.record import read_run
from trix_jax.lm.train.evaluate import perplexity

LAST_SHARE = 0.05  # of the steps, whose training loss counts as the last
LOCK = "results.lock"  # in a folder of runs
# Keys that only some records have; the others are written even where they are null.
OPTIONAL = ("size", "width", "num_tiles", "tile_width", "val_tokens")


class Result(NamedTuple):
    """A run that came to its end.

    Attributes:
        setting: the experiment, or the setting of a sweep.
        width: of the dense FFN; None for tiles.
        val_loss: of the last evaluation, in nats a token; infinite for a run that
            diverged, null in a file.
        train_val_gap: validation loss less the training loss of the last steps, dropout
            included.
        params_total, ffn_active, ffn_bits: as `trix_jax.lm.accounting` counts them.
        active_width: of the dense FFN with as many multiply-accumulates.
        min_entropy_share, dead_tiles: the worst of all evaluations and layers.
        routing: a dict a layer, at the last evaluation.
        evaluations: a dict each.
        sampler: how training windows were drawn. Losses of runs with different samplers
            are not compared.
        val_tokens: that the last evaluation predicts, the first of the validation
            split, where `eval_tokens` was given; None: all of it.
    """

    setting: str
    size: str | None
    arm: str
    width: int | None
    num_tiles: int | None
    tile_width: int | None
    tiles_per_token: int | None
    seed: int
    learning_rate: float
    steps: int
    tokens: int | None
    val_loss: float
    val_ppl: float | None
    val_bits_per_byte: float | None
    best_val_loss: float | None
    best_val_ppl: float | None
    train_val_gap: float | None
    params_total: int
    ffn_active: int
    ffn_bits: int
    active_width: float | None
    min_entropy_share: float | None
    dead_tiles: int | None
    routing: list[dict[str, Any]] | None
    seconds: float | None
    tokens_per_second: int | None
    evaluations: list[dict[str, Any]] | None
    command: str
    git_commit: str | None
    sampler: str = SAMPLER_BEFORE
    val_tokens: int | None = None

    @property
    def name(self) -> str:
        """As its `Spec` has it."""
        rate = self.learning_rate
        return name_of(self.setting, self.size, self.arm, rate, self.seed)

    @property
    def is_dense(self) -> bool:
        return self.width is not None

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.val_loss)


def read(path: Path) -> list[Result]:
    """The records of a results file; none where there is no file yet."""
    return [from_tree(tree) for tree in read_json(path)] if path.exists() else []


def write(path: Path, results: Iterable[Result]) -> None:
    """Writes a results file, whole or not at all."""
    trees = [to_tree(result) for result in results]
    write_whole(path, json.dumps(trees, indent=1) + "\n")


def add(path: Path, result: Result, folder: Path) -> None:
    """Adds a record, or replaces that of the same run; workers that share a folder of
    runs wait for each other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(folder / LOCK):
        own = result.name, result.sampler
        kept = [one for one in read(path) if (one.name, one.sampler) != own]
        order = ("arm", "learning_rate", "seed")
        ordered = sorted(
            [*kept, result],
            key=lambda one: (one.size or "", *(getattr(one, key) for key in order)),
        )
        write(path, ordered)


def collect(specs: Sequence[Spec], folder: Path, path: Path) -> list[Result]:
    """Writes the results of an experiment, from the directories of its runs in
    `folder`, and returns those asked for. The record of a run whose directory is gone
    stays, and that of a run that is not asked for, behind the others.

    Raises:
        ValueError: the directory of a finished run is damaged.
    """
    asked = {spec.name for spec in specs}
    with held(folder / LOCK):
        known, found = read(path), []
        for spec in specs:
            own = [one for one in known if one.name == spec.name]
            if has_ended(spec, folder):
                result = result_of(spec, folder)
                others = [one for one in own if one.sampler != result.sampler]
                found += [*others, result]
            elif not (config := folder / spec.name / "config.yaml").exists():
                found += own
            elif own:  # what is made again goes, and that of another sampler stays
                sampler = load(config).train.sampler or SAMPLER_BEFORE
                found += [one for one in own if one.sampler != sampler]
        write(path, [*found, *(one for one in known if one.name not in asked)])
    return found


def by_sampler(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The results of each sampler, in the order they come: what may stand in one table."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.sampler, []).append(result)
    return found


def twin(
    arm: Result, others: Iterable[Result], cost: str, within: float
) -> Result | None:
    """The dense run of the same size and sampler, evaluated on the same tokens, whose
    FFN's cost is nearest, if it is near enough.

    Args:
        cost: the name of a field; "params_total" is compared without what both models
            have beside their FFNs.
        within: the share by which it may be off.
    """
    same = arm.size, arm.sampler, arm.val_tokens
    alike = [o for o in others if (o.size, o.sampler, o.val_tokens) == same]
    dense = [one for one in alike if one.is_dense]

    def distance(one: Result) -> float:
        beside = 0
        if cost == "params_total" and one.ffn_active is not None:
            # A dense FFN computes with every parameter once.
            beside = one.params_total - one.ffn_active
        return abs((getattr(one, cost) - beside) / (getattr(arm, cost) - beside) - 1)

    nearest = min(dense, key=distance, default=None)
    return nearest if nearest and distance(nearest) <= within else None


def twin_widths(arm: Result, dense: Result) -> dict[str, float]:
    """The dense widths with an arm's parameters, multiply-accumulates, and bits, beside
    a dense run of the same model.
    """
    assert dense.width
    assert arm.active_width is not None
    per_unit = dense.ffn_active / dense.width  # no biases: also parameters
    rest = dense.params_total - dense.ffn_active
    return {
        "parameters": (arm.params_total - rest) / per_unit,
        "compute": arm.active_width,
        "bits": arm.ffn_bits / (dense.ffn_bits / dense.width),
    }


def result_of(spec: Spec, folder: Path) -> Result:
    """The record of a run, from its directory; without a summary it diverged.

    Raises:
        ValueError: a file of the directory is damaged.
    """
    directory = folder / spec.name
    config = load(directory / "config.yaml")
    model = config.model
    routed, dense = model.ffn != "dense", model.ffn == "dense"
    known = {
        "setting": spec.setting,
        "size": spec.size or None,
        "arm": spec.arm,
        "width": model.dense_width if dense else None,
        "num_tiles": model.num_tiles if routed else None,
        "tile_width": model.tile_width
        if model.ffn not in ("dense", "lookup")
        else None,
        "tiles_per_token": model.tiles_per_token if routed else None,
        "seed": spec.seed,
        "learning_rate": config.train.learning_rate,
        "steps": config.train.steps,
        "sampler": config.train.sampler,
        "command": public_command(spec),
    }
    if is_diverged(directory):
        # What a patch makes of the model is known in its own process alone.
        params = {} if spec.patch else costs(model)._asdict()
        return from_tree(known | _params(params, model) | {"val_loss": None})
    return from_tree(known | _outcome(directory))


def from_tree(tree: dict[str, Any]) -> Result:
    """A record as JSON has it; keys that it lacks are None, others are left out."""
    known: dict[str, Any] = {field: tree.get(field) for field in Result._fields}
    if known["val_loss"] is None:
        known["val_loss"] = math.inf
    known["sampler"] = known["sampler"] or SAMPLER_BEFORE
    return Result(**known)


def to_tree(result: Result) -> dict[str, Any]:
    """The inverse of `from_tree`."""
    tree = result._asdict()
    tree["val_loss"] = result.val_loss if result.is_finite else None
    absent = {key for key in OPTIONAL if tree[key] is None}
    if not result.is_dense:
        absent -= {"num_tiles", "tile_width"}
    return {key: value for key, value in tree.items() if key not in absent}


def _outcome(directory: Path) -> dict[str, Any]:
    """What a finished run says; the names of its summary become those of a record."""
    record = read_run(directory)
    summary, steps = record.summary, record.steps
    last = steps[-max(1, int(LAST_SHARE * len(steps))) :]
    val_loss = summary["final_val_loss"]
    is_part = record.config.train.eval_tokens > 0
    names = ("step", "tokens", "val_loss", "routing_stability")
    return {
        "tokens": summary["tokens"],
        "val_loss": val_loss,
        "val_ppl": summary["final_val_ppl"],
        "val_bits_per_byte": summary["final_val_bits_per_byte"],
        "best_val_loss": summary["best_val_loss"],
        "best_val_ppl": perplexity(summary["best_val_loss"]),
        "train_val_gap": val_loss - statistics.mean(line["loss"] for line in last),
        **_params(summary["params"], record.config.model),
        "min_entropy_share": summary.get("min_entropy_share"),
        "dead_tiles": summary.get("max_dead_tiles"),
        "routing": summary["routing"],
        "seconds": round(summary["seconds"], 1),
        "tokens_per_second": round(record.speed),
        "evaluations": [{name: line[name] for name in names} for line in record.evals],
        "git_commit": summary.get("git_commit"),
        "val_tokens": record.evals[-1]["val_tokens"] if is_part else None,
    }


def _params(params: dict[str, Any], model: Any) -> dict[str, Any]:
    active = params.get("ffn_active")
    layers = 2 * model.d_model * model.n_layers
    return {
        "params_total": params.get("total"),
        "ffn_active": active,
        "ffn_bits": params.get("ffn_bits"),
        "active_width": None if active is None else active / layers,
    }
