"""The demo: a small TriX and two dense models on the embedded corpus, compared, packed,
sampled and reported.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trix_jax.lm.accounting import costs
from trix_jax.lm.config import RunConfig, TrainConfig
from trix_jax.lm.data import DataConfig, prepare
from trix_jax.lm.ngram import floors
from trix_jax.lm.presets import match_width
from trix_jax.lm.report.demo import write_demo_report
from trix_jax.lm.report.run import Floors, write_run_report
from trix_jax.lm.serve.export import export
from trix_jax.lm.serve.generate import SamplingConfig, generate
from trix_jax.lm.serve.load import load_run
from trix_jax.lm.train.evaluate import Evaluation, evaluate
from trix_jax.lm.train.loop import train
from trix_jax.nn.transformer import TransformerConfig
from trix_jax.nn.transformer_config import MatchedWidth
from trix_jax.routing import RoutingConfig

PROMPT = "def "
SAMPLE_TOKENS = 400

# The recommended configuration, in a body that gains for the dense FFN too.
PRESET = RunConfig(
    arm="sparse",
    model=TransformerConfig(
        context=64,
        d_model=128,
        n_layers=2,
        n_heads=4,
        ffn="sparse",
        num_tiles=96,
        tiles_per_token=11,
        expansion=24,
        shared_width=32,
        positions="rotary",
        norm="rms",
        qk_norm=True,
        hash_per_layer=True,
        routing=RoutingConfig(source="hash"),
    ),
    data=DataConfig(
        source="stdlib", tokenizer="bpe", vocab_size=1024, val_fraction=0.05
    ),
    train=TrainConfig(steps=600, batch_size=12, optimizer="muon", eval_every=200),
)
# The best for each arm of rates a factor of two apart, with a worse one on either side,
# with the default seed and steps: 3.586, 3.666, 3.697 nats.
RATES = {"trix": 8e-3, "dense": 16e-3, "dense_w": 4e-3}


def run_demo(
    workdir: str | Path,
    *,
    steps: int = PRESET.train.steps,
    seed: int = PRESET.seed,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains, compares, packs, samples and reports; interrupted, the same call goes on.

    Args:
        workdir: gets `data/`, the runs `trix/`, `dense/` (as many parameters) and
            `dense_w/` (the greater of TriX's compute and served memory), `export/`,
            `plots/` and `REPORT.md`.
        steps: optimizer steps of each arm.
        seed: of all arms.
        report: takes one-line messages.

    Returns:
        the contents of `demo --json`.
    """
    began = time.perf_counter()
    workdir = Path(workdir)
    preset = dataclasses.replace(PRESET, seed=seed)
    report("preparing the embedded corpus, the standard library's own source")
    store = prepare(preset.data, workdir / "data", report)
    counted = {order: float(loss) for order, loss in floors(store).items()}
    report("n-gram floors: " + ", ".join(f"{n}: {v:.3f}" for n, v in counted.items()))

    runs = {
        "trix": preset,
        "dense": _dense(preset, "match-params"),
        "dense_w": _dense(preset, "match-active", "match-bits"),
    }
    for arm, config in runs.items():
        config = _on(config, workdir / "data", steps, RATES[arm])
        report(f"training {arm}: {steps} steps")
        train(config, workdir / arm, report=report)
    for arm in runs:
        twin = workdir / "dense" if arm == "trix" else None
        write_run_report(workdir / arm, Floors(counted, len(store.train)), twin)
    arms = {arm: _result(workdir / arm, store) for arm in runs}

    report("packing")
    result = {
        "workdir": str(workdir),
        "seconds": 0.0,  # below, once all is done
        "arms": {arm: values for arm, (values, _) in arms.items()},
        "ngram": {str(order): loss for order, loss in counted.items()},
        "routing": _routing(arms["trix"][1]),
        **_packed(workdir, store, seed),
        "config": _shape(preset, steps, store),
    }
    result["seconds"] = time.perf_counter() - began
    write_demo_report(workdir, result)
    return result


def _packed(workdir: Path, store, seed: int) -> dict[str, Any]:
    """Exports TriX, and evaluates and samples what was exported."""
    model, variables, tokenizer = load_run(workdir / "trix")
    sizes = export(model, variables, tokenizer, workdir / "export")
    model, variables, tokenizer = load_run(workdir / "export")
    prompt = tokenizer.encode(PROMPT)
    ids = generate(model, variables, prompt, SAMPLE_TOKENS, SamplingConfig(seed=seed))
    return {
        "bytes": sizes,
        "packed": {"val_loss": evaluate(model, variables, store).val_loss},
        "prompt": PROMPT,
        "sample": tokenizer.decode([*map(int, prompt), *ids]),
    }


def _dense(preset: RunConfig, *matches: MatchedWidth) -> RunConfig:
    """The arm with a dense FFN, the widest that one of `matches` asks for."""
    dense = dataclasses.replace(preset.model, ffn="dense", shared_width=0)
    models = [
        match_width(dataclasses.replace(dense, ffn_width=match), preset.model)
        for match in matches
    ]
    model = max(models, key=lambda model: model.dense_width)
    return dataclasses.replace(preset, arm="dense", model=model)


def _on(config: RunConfig, data: Path, steps: int, rate: float) -> RunConfig:
    every = min(config.train.eval_every, max(1, steps // 2))
    train = {"steps": steps, "eval_every": every, "learning_rate": rate}
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=str(data)),
        train=dataclasses.replace(config.train, **train),
    )


def _result(directory: Path, store) -> tuple[dict[str, Any], Evaluation]:
    """Restores an arm, evaluates it, and gives what `demo --json` says of it."""
    model, variables, _ = load_run(directory)
    evaluation = evaluate(model, variables, store)
    counted = costs(model.config)
    values = {
        "val_loss": evaluation.val_loss,
        "val_ppl": evaluation.val_ppl,
        "val_bits_per_byte": evaluation.val_bits_per_byte,
        "params_total": counted.total,
        "ffn_active": counted.ffn_active,
    }
    return values, evaluation


def _routing(evaluation: Evaluation) -> list[dict[str, float]]:
    names = ("entropy", "max_load", "dead_tiles")
    columns = (getattr(evaluation, name) for name in names)
    return [
        dict(zip(names, layer, strict=True)) for layer in zip(*columns, strict=True)
    ]


def _shape(preset: RunConfig, steps: int, store) -> dict[str, Any]:
    model, batch = preset.model, preset.train.batch_size
    return {
        "steps": steps,
        "tokens": steps * batch * model.context,
        "d_model": model.d_model,
        "n_layers": model.n_layers,
        "num_tiles": model.num_tiles,
        "tiles_per_token": model.tiles_per_token,
        "context": model.context,
        "batch_size": batch,
        "corpus": store.manifest["source"],
        "val_tokens": store.val_tokens,
    }
