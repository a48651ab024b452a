"""What an experiment needs on GPUs that are not here: memory by the ahead-of-time
compile, time and money by a model.

    step >= max(6 * tokens * MACs / peak, bytes / bandwidth)

MACs a token: attention's projections, its scores over the whole context, the FFNs as
counted in `accounting`, the head. Bytes a token: `18 D + 4 W + 5 a s` of activations a
layer, 16-bit ones, with a heads and s tokens of context (Korthikanti et al., 2022,
https://arxiv.org/abs/2205.05198, whose `34 D` has a dense FFN of W = 4 D), and the logits
in float32, each written and read forward and backward; and 28 bytes a parameter and
update. W of tiles is the dense width of as many MACs, and each tile of a token takes a
copy of its input and gives an output, `4 D` bytes. Nothing is autotuned, and launches,
compilation and evaluations are not counted, so that this is the least a step can take:
the budget takes `SLACK` times it, and the first hundred steps tell.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from trix_jax.files import cache_folder, json_sha256, read_json, write_json
from trix_jax.lm import aot as train_steps
from trix_jax.lm.accounting import costs
from trix_jax.lm.config import RunConfig, resolve
from trix_jax.lm.data import BPE_SIZE, is_store, load_tokenizer, own_tokenizer
from trix_jax.lm.data.config import is_of_tokens
from trix_jax.lm.data.prepare_tokens import vocabulary as token_vocabulary
from trix_jax.lm.data.store import TOKENIZER
from trix_jax.nn.transformer import TransformerConfig

SLACK = 3.0
ORIGINAL_HOURS = 6.0  # of training, in the 7 of the original's plan
MANY = 8
TARGETS = ("h100", "thor")
MIB = 2**20


def estimate(
    models: Mapping[tuple[str, str], RunConfig],
    runs: Mapping[tuple[str, str], int],
    usd_per_hour: float,
    command: str,
    report: Callable[[str], None] = print,
) -> tuple[str, list[dict[str, Any]]]:
    """The budget as Markdown and as rows, one a size and arm.

    Args:
        models: size and arm to a config as parsed.
        runs: of each, its seeds.
        usd_per_hour: of an H100.
        command: that makes the budget.
        report: takes a line for each compilation.
    """
    python = train_steps.compiler()
    rows = []
    configs = {key: filled(config) for key, config in models.items()}
    peaks: dict[tuple, int | None] = {}
    for devices in (1, MANY):
        for key, config in configs.items():
            if python:
                report(
                    f"{' '.join(key)}: compiling for {devices} H100, minutes the first time"
                )
            peaks[key, devices] = peak_bytes(python, config, devices, report)
    for (size, arm), config in configs.items():
        row: dict[str, Any] = {"size": size, "arm": arm, "runs": runs[size, arm]}
        row |= counted(config)
        row["peak_bytes"] = peaks[(size, arm), 1]
        row["peak_bytes_of_8"] = peaks[(size, arm), MANY]
        row["usd"] = row["runs"] * row["h100_hours"] * SLACK * usd_per_hour
        rows.append(row)
    return _text(rows, usd_per_hour, command), rows


def step_seconds(config: RunConfig, target: str) -> float:
    """The least that an optimizer step can take on one GPU."""
    gpu = train_steps.GPUS[target]
    tokens = config.train.batch_size * config.model.context
    macs, num_bytes = macs_per_token(config.model), _bytes_per_token(config.model)
    peak = gpu.cores * gpu.macs * gpu.clock_ghz * 1e9
    state = 28 * costs(config.model).total
    tensor = 3 * tokens * macs / peak
    return max(tensor, (tokens * num_bytes + state) / gpu.bandwidth)


def macs_per_token(c: TransformerConfig) -> int:
    """Multiply-accumulates of a forward pass, a token."""
    assert c.vocab_size is not None
    attention = c.n_layers * (4 * c.d_model**2 + 2 * c.context * c.d_model)
    return attention + costs(c).ffn_active + c.d_model * c.vocab_size


def _bytes_per_token(c: TransformerConfig) -> float:
    """Bytes that a step reads and writes, a token: Korthikanti's are bytes already."""
    assert c.vocab_size is not None
    width = costs(c).ffn_active_training / (2 * c.d_model * c.n_layers)
    copies = 0 if c.ffn == "dense" else c.tiles_per_token
    ffn = 4 * (width + copies * c.d_model)
    layers = c.n_layers * (18 * c.d_model + ffn + 5 * c.n_heads * c.context)
    return 4 * (layers + 4 * c.vocab_size)


def filled(config: RunConfig) -> RunConfig:
    """The config with the vocabulary that its data will have."""
    return resolve(config, _vocabulary(config), end_token=0)


def counted(config: RunConfig) -> dict[str, Any]:
    """Parameters, steps and tokens, and the least time on each target."""
    steps = config.train.steps
    tokens = steps * config.train.batch_size * config.model.context
    row = {"params": costs(config.model).total, "steps": steps, "tokens": tokens}
    for name in TARGETS:
        seconds = step_seconds(config, name)
        row |= {
            f"{name}_step_ms": 1e3 * seconds,
            f"{name}_hours": steps * seconds / 3600,
        }
    return row


def peak_bytes(
    python: str | None,
    config: RunConfig,
    devices: int,
    report: Callable[[str], None],
) -> int | None:
    """Peak bytes a GPU of a resolved config; compiled once for the same step and code,
    then kept.

    Args:
        python: that compiles (`trix_jax.lm.aot.compiler`); None only looks at what is
            kept, and None is what it then may return.
    """
    train = config.train
    if train.batch_size % (train.accumulate * devices):
        return None
    case = [dataclasses.asdict(config.model), train.batch_size, train.accumulate]
    case += [] if train.optimizer == "adamw" else [train.optimizer]
    key = [case, devices, jax.__version__, _code()]
    name = f"{json_sha256(key)}.json"
    if (kept := _kept(name)) is not None:
        return kept["peak_bytes"]
    if python is None:
        return None
    done = train_steps.compile_case(
        python,
        "h100",
        config.model,
        train.batch_size,
        train.accumulate,
        devices,
        train.optimizer,
    )
    try:
        place = cache_folder() / "aot" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, done)
    except OSError as error:
        report(f"the compilation is not kept for the next time: {error}")
    return done["peak_bytes"]


def _kept(name: str) -> dict[str, Any] | None:
    """What an earlier compilation found, if that can be read."""
    try:
        return read_json(cache_folder() / "aot" / name)
    except (OSError, ValueError):
        return None


@functools.cache
def _code() -> str:
    """sha256 of what a train step is made of."""
    digest = hashlib.sha256()
    for file in train_steps.sources():
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _vocabulary(config: RunConfig) -> int:
    data = config.data
    if data.path and is_store(data.path):
        return load_tokenizer(Path(data.path) / TOKENIZER).vocab_size
    if config.model.vocab_size:
        return config.model.vocab_size
    if data.path and is_of_tokens(data):
        return token_vocabulary(data)
    if data.tokenizer in (known := {"byte": 257, "char": 100}):
        return known[data.tokenizer]
    if data.tokenizer == "bpe":
        return data.vocab_size or BPE_SIZE
    return own_tokenizer(data.tokenizer, data.end_of_text).vocab_size


def _table(rows: list[dict[str, Any]]) -> str:
    head = (
        "size|arm|parameters|steps|tokens|peak MiB on 1|a GPU of 8|step ms|a run on 1|"
        "on 8|on Thor|runs|USD, all runs"
    ).split("|")
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    for row in rows:
        peaks = (row["peak_bytes"], row["peak_bytes_of_8"])
        hours = SLACK * row["h100_hours"]
        cells = [
            row["size"],
            row["arm"],
            f"{row['params']:,}",
            f"{row['steps']:,}",
            f"{row['tokens'] / 1e6:,.0f}M",
            *("-" if p is None else f"{p / MIB:,.0f}" for p in peaks),
            f"{SLACK * row['h100_step_ms']:.1f}",
            _duration(hours),
            _duration(hours / MANY),
            _duration(SLACK * row["thor_hours"]),
            f"{row['runs']:,}",
            f"{row['usd']:,.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _text(rows: list[dict[str, Any]], usd_per_hour: float, command: str) -> str:
    thor = SLACK * sum(row["thor_hours"] for row in rows)
    h100 = _all_hours(rows)
    memory = "Peak memory is from the ahead-of-time compile for sm_90a."
    if any(row["peak_bytes"] is None or row["peak_bytes_of_8"] is None for row in rows):
        memory += " A dash was not compiled: the aot group is needed (TRIX_AOT_PYTHON)."
    return "\n".join(
        [
            _table(rows),
            "",
            f"{memory} Everything with a unit of time or money is **modelled**: {SLACK:g} times the "
            "least that arithmetic and memory traffic allow, an assumption (small runs that shared an H100 took nine). Compilation and evaluations are not "
            f"counted, and small steps take longer. USD at {usd_per_hour:g} an H100-hour.",
            "",
            f"All runs: {_duration(h100)} on one H100, {_duration(h100 / MANY)} on "
            f"eight. One seed of all of it, side by side on the original's one Thor: {_duration(thor)}, "
            f"{'inside' if thor <= ORIGINAL_HOURS else '**over**'} its {ORIGINAL_HOURS:g} hours.",
            "",
            _first(rows, usd_per_hour),
            "",
            f"Made by `{command}`.",
        ]
    )


def _all_hours(rows: list[dict[str, Any]]) -> float:
    """Of all runs, one after the other on one H100."""
    return SLACK * sum(row["runs"] * row["h100_hours"] for row in rows)


def _first(rows: list[dict[str, Any]], usd_per_hour: float) -> str:
    """What to run first, and what it would decide."""
    least = min(rows, key=lambda row: row["params"])["size"]
    mine = [row for row in rows if row["size"] == least]
    hours = _all_hours(mine)
    text = (
        f"Run first: all arms of `{least}`, {_duration(hours)} on one H100, "
        f"{hours * usd_per_hour:.2f} USD. Its first hundred steps tell what this model of time "
        "is worth, and its report says whether TriX is below, at or above its dense twins there"
    )
    more = (
        ""
        if all(row["runs"] > 1 for row in mine)
        else "; with one seed no difference has an interval, so add seeds first"
    )
    return (
        f"{text}{more}. A larger size is worth its cost if that is not settled by it."
    )


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"
