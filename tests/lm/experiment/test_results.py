"""What a report says of an experiment: intervals, twins, answers, figures, plans."""

import json
import math

import pytest

from trix_jax.lm.accounting import costs
from trix_jax.lm.config import RunConfig, TrainConfig, to_tree
from trix_jax.lm.data import DataConfig
from trix_jax.lm.experiment import budget as planning
from trix_jax.lm.experiment.budget import plan
from trix_jax.lm.experiment.report import _hypotheses, write_experiment_report
from trix_jax.lm.experiment.results import (
    Finished,
    compare,
    groups,
    interval,
    public_command,
    twin,
)
from trix_jax.lm.experiment.runner import Run
from trix_jax.lm.report.record import RunRecord
from trix_jax.nn.transformer import TransformerConfig

MODEL = TransformerConfig(
    vocab_size=64,
    context=16,
    d_model=16,
    n_layers=1,
    n_heads=2,
    num_tiles=4,
    tiles_per_cluster=2,
    ffn="lookup",
)
MODELS = {
    "lookup": MODEL,
    "dense": TransformerConfig(
        **{**MODEL.__dict__, "ffn": "dense", "ffn_width": 102}  # as many parameters
    ),
    "dense-4d": TransformerConfig(**{**MODEL.__dict__, "ffn": "dense"}),
    "sparse": TransformerConfig(**{**MODEL.__dict__, "ffn": "sparse"}),
    "hash": TransformerConfig(**{**MODEL.__dict__, "ffn": "sparse"}),
}


def record(arm, seed, loss, train_loss=None, size_scale=1.0):
    model = MODELS[arm]
    routed = model.ffn != "dense"
    usage = [[0.25] * 4] if routed else []
    layers = [{"entropy": 1.38, "max_load": 1.0, "dead_tiles": 0}] if routed else []
    steps = [
        {
            "event": "step",
            "step": i,
            "tokens": 32 * i,
            "loss": train_loss or loss,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens_per_second": 1000.0,
            "memory_bytes": 2**28,
            "routing_entropy": [1.38] if routed else [],
            "aux_balance": 1.0,
            "aux_diversity": 0.1,
        }
        for i in range(1, 21)
    ]
    evals = [
        {
            "event": "eval",
            "step": n,
            "tokens": 32 * n,
            "val_loss": value,
            "tile_usage": usage,
            "routing_stability": [0.9] if routed and n == 20 else [],
        }
        for n, value in ((10, loss + 0.5), (20, loss))
    ]
    params = costs(model)._asdict()
    params["total"] = int(params["total"] * size_scale)
    summary = {
        "best_val_loss": loss,
        "final_val_loss": loss,
        "final_val_ppl": math.exp(loss),
        "final_val_bits_per_byte": loss / math.log(2) / 4,
        "seconds": 10.0,
        "tokens": 640,
        "steps": 20,
        "params": params,
        "routing": layers,
        "min_entropy_share": 0.99 if routed else None,
        "max_dead_tiles": 0 if routed else None,
    }
    env = {
        "python": "3.13",
        "system": "Linux",
        "cpu_count": 2,
        "devices": ["cpu"],
        "packages": {"jax": "0.12"},
        "git_commit": None,
    }
    config = RunConfig(seed=seed, arm=arm, model=model, train=TrainConfig(steps=20))
    return RunRecord(config, steps, evals, summary, env)


def finished(size, arm, losses, **more):
    return [
        Finished(
            Run(size, arm, seed, 20, ("preset.yaml", "--arm", arm), f"data/{size}"),
            record(arm, seed, loss, **more),
            "trix-jax train ...",
        )
        for seed, loss in enumerate(losses)
    ]


def test_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, round(half, 3)) == (2.0, round(4.303 / math.sqrt(3), 3))
    assert interval([1.5]) == (1.5, math.inf)


@pytest.mark.parametrize(
    ("trix", "verdict"),
    [
        ([1.5, 1.51, 1.49], "supported"),
        ([2.5, 2.51, 2.49], "not supported"),
        ([2.0, 2.3, 1.7], "undecided"),
        ([1.0], "undecided"),
    ],
)
def test_comparison_is_paired_by_seed_and_says(trix, verdict):
    found = groups(
        finished("s", "lookup", trix) + finished("s", "dense", [2.0, 2.01, 2.0])
    )
    made = compare("s", "lookup", "dense", found, lambda f: f.loss)
    assert made.verdict() == verdict
    assert made.seeds == len(trix)


def test_twin_is_the_dense_arm_of_the_same_cost_or_none():
    found = groups(
        finished("s", "lookup", [2.0])
        + finished("s", "dense", [2.0])
        + finished("s", "dense-4d", [2.0])
    )
    total = {arm: costs(MODELS[arm]).total for arm in ("lookup", "dense")}
    assert abs(total["dense"] / total["lookup"] - 1) < 0.02
    assert twin("s", "lookup", "total", found) == "dense"
    assert twin("s", "lookup", "ffn_active", found) is None


def test_hypotheses_are_answered_from_what_was_run():
    found = groups(
        finished("s", "lookup", [1.5, 1.51, 1.49], train_loss=1.4)
        + finished("s", "dense", [2.0, 2.01, 2.0], train_loss=1.0)
        + finished("s", "sparse", [1.8, 1.81, 1.79])
        + finished("s", "hash", [1.9, 1.91, 1.89])
    )
    lower, special, capacity, regular = _hypotheses(found, ["s"])
    assert lower.startswith(
        "**Lower perplexity than a parameter-equivalent dense FFN: supported.**"
    )
    assert "s, sparse against hash: -0.1000" in special
    assert "supported" in special
    assert "undecided.** Not measured here" in capacity
    assert "regularizes: supported" in regular


def write(directory, runs):
    plan_tree = {
        "name": "e",
        "title": "A title",
        "question": "Does it?",
        "label": "Made up.",
        "runs": [one.run._asdict() for one in runs],
    }
    plan_tree["runs"].append(runs[0].run._replace(seed=99)._asdict())
    directory.mkdir(parents=True)
    (directory / "experiment.json").write_text(json.dumps(plan_tree))
    for one in runs:
        place = one.run.directory(directory)
        place.mkdir(parents=True)
        lines = one.record.steps + one.record.evals
        (place / "metrics.jsonl").write_text(
            "".join(json.dumps(v) + "\n" for v in lines)
        )
        (place / "summary.json").write_text(json.dumps(one.record.summary))
        (place / "env.json").write_text(json.dumps(one.record.env))
        (place / "config.yaml").write_text(json.dumps(to_tree(one.record.config)))
        (place / "REPORT.md").write_text("")


@pytest.mark.slow
def test_report_of_a_ladder_names_what_is_missing_and_draws_everything(tmp_path):
    runs = [
        *finished("s", "lookup", [2.0, 2.1]),
        *finished("s", "dense", [1.9, 2.0]),
        *finished("m", "lookup", [1.8], size_scale=4.0),
        *finished("m", "dense", [1.7], size_scale=4.0),
    ]
    write(tmp_path / "e", runs)
    text = write_experiment_report(tmp_path / "e", lambda _: None).read_text()
    assert text.startswith("# A title\n\nDoes it?\n\n> Made up. **6 of 7 runs are fin")
    assert "missing: s/lookup/seed-99." in text
    assert "**m**, validation loss in nats per token, lowest first: dense 1.7" in text
    for name in ("costs", "s_loss", "m_loss", "m_steps", "s_lookup_routing"):
        assert (tmp_path / "e/plots" / f"{name}.png").stat().st_size > 5000
    assert len(json.loads((tmp_path / "e/metrics.json").read_text())) == 6


def test_report_of_nothing_finished_says_so(tmp_path):
    runs = finished("s", "lookup", [2.0])
    write(tmp_path / "e", runs)
    (tmp_path / "e/runs/s/lookup/seed-0/summary.json").unlink()
    with pytest.raises(ValueError, match=r"must hold a finished run\. Got none of 2"):
        write_experiment_report(tmp_path / "e", lambda _: None)


def test_public_command_has_no_path_of_the_machine():
    flags = ("/home/me/configs/tiny.yaml", "--arm", "dense", "--data.path", "/data/x")
    words = public_command(Run("s", "dense", 1, 5, flags, "/store"))
    assert words == "trix-jax train configs/tiny.yaml --arm dense --data.path data/s"


def test_plan_without_the_compiler_counts_and_models(monkeypatch, tmp_path):
    monkeypatch.setattr(planning.train_steps, "compiler", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = RunConfig(
        model=MODEL,
        data=DataConfig(tokenizer="bpe", vocab_size=64),
        train=TrainConfig(steps=100, batch_size=16),
    )
    text, (row,) = plan(
        {("s", "lookup"): config}, 3, 3.0, "the command", lambda _: None
    )
    assert row["params"] == costs(MODEL).total
    assert row["peak_bytes"] is None
    assert 0 < row["h100_hours"] < row["thor_hours"]
    assert row["usd"] == pytest.approx(3 * planning.SLACK * row["h100_hours"] * 3.0)
    assert "A dash was not compiled" in text
    assert text.endswith("Made by `the command`.")


@pytest.mark.slow
def test_compile_case_compiles_a_step_for_an_absent_gpu():
    python = planning.train_steps.compiler()
    if python is None:
        pytest.skip("needs the dependency group aot, or TRIX_AOT_PYTHON")
    done = planning.train_steps.compile_case(python, "h100", MODEL, 16, 2, 1)
    assert done["peak_bytes"] > 4 * 3 * costs(MODEL).total
