"""Made-up results and run directories, and a preset that trains in seconds."""

import json
import math

import pytest
import yaml

from trix_jax.lm.accounting import costs
from trix_jax.lm.config import RunConfig, TrainConfig, to_tree
from trix_jax.lm.experiment.spec import Spec
from trix_jax.nn.transformer import TransformerConfig

SMALL = {
    "vocab_size": 64, "context": 16, "d_model": 16, "n_layers": 1, "n_heads": 2,
    "num_tiles": 4, "tiles_per_cluster": 2,
}  # fmt: skip
MODELS = {
    "lookup": TransformerConfig(**SMALL, ffn="lookup"),
    "dense": TransformerConfig(**SMALL, ffn="dense", ffn_width=102),  # lookup's params
    "dense-4d": TransformerConfig(**SMALL, ffn="dense"),
    "sparse": TransformerConfig(**SMALL, ffn="sparse"),
    "hash": TransformerConfig(**SMALL, ffn="sparse"),
}
PRESET = """
data: {source: text, tokenizer: byte}
model: {ffn: lookup, context: 16, d_model: 16, n_layers: 1, n_heads: 2, num_tiles: 4, tiles_per_cluster: 2}
train: {steps: 6, batch_size: 2, eval_every: 3, warmup_steps: 1}
arms:
  lookup: {model.ffn: lookup}
  dense: {model.ffn: dense, model.ffn_width: match-params}
"""


@pytest.fixture
def models():
    return MODELS


@pytest.fixture
def small(tmp_path, corpus):
    """An experiment's file: one size, two arms, two seeds."""
    (tmp_path / "preset.yaml").write_text(PRESET)
    tree = {
        "name": "small",
        "label": "A test.",
        "sizes": {"s": "preset.yaml"},
        "arms": ["lookup", "dense"],
        "seeds": [1, 2],
        "set": {"data.path": str(corpus)},
        "arm_set": {"dense": {"train.learning_rate": 2e-3}},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def write_run():
    """Writes a finished run's directory, of 20 steps; returns its spec."""
    return _write_run


def _write_run(folder, size, arm, seed, val_loss, train_loss=None, size_scale=1.0):
    flags = ("preset.yaml", "--arm", arm)
    spec = Spec("e", size, arm, seed, 20, flags, f"data/{size}")
    directory, model = folder / spec.name, MODELS[arm]
    directory.mkdir(parents=True)
    routed = model.ffn != "dense"
    steps = [
        {
            "event": "step", "step": i, "tokens": 32 * i, "loss": train_loss or val_loss,
            "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 1000.0,
            "memory_bytes": 2**28, "routing_entropy": [1.38] if routed else [],
            "aux_balance": 1.0, "aux_diversity": 0.1,
        }
        for i in range(1, 21)
    ]  # fmt: skip
    evals = [
        {
            "event": "eval", "step": n, "tokens": 32 * n, "val_loss": value,
            "tile_usage": [[0.25] * 4] if routed else [],
            "routing_stability": [0.9] if routed and n == 20 else [],
        }
        for n, value in ((10, val_loss + 0.5), (20, val_loss))
    ]  # fmt: skip
    lines = "".join(json.dumps(line) + "\n" for line in steps + evals)
    (directory / "metrics.jsonl").write_text(lines)
    params = costs(model)._asdict()
    summary = {
        "best_val_loss": val_loss,
        "final_val_loss": val_loss,
        "final_val_ppl": math.exp(min(val_loss, 700)),
        "final_val_bits_per_byte": val_loss / math.log(2) / 4,
        "seconds": 10.0,
        "tokens": 640,
        "steps": 20,
        "params": params | {"total": int(params["total"] * size_scale)},
        "routing": [{"entropy": 1.38, "max_load": 1.0, "dead_tiles": 0}] * routed,
        "min_entropy_share": 0.99 if routed else None,
        "max_dead_tiles": 3 if routed else None,
        "git_commit": "abc",
    }
    (directory / "summary.json").write_text(json.dumps(summary))
    env = {
        "python": "3.13", "system": "Linux", "cpu_count": 2, "devices": ["cpu"],
        "packages": {"jax": "0.12"}, "git_commit": None,
    }  # fmt: skip
    (directory / "env.json").write_text(json.dumps(env))
    config = RunConfig(seed=seed, arm=arm, model=model, train=TrainConfig(steps=20))
    (directory / "config.yaml").write_text(json.dumps(to_tree(config)))
    (directory / "REPORT.md").write_text("")
    return spec
