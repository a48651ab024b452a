"""Losses are those of the weights as they will be served, whatever training computes
with.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from trix_jax import freeze
from trix_jax.cli.main import main
from trix_jax.lm.checkpoint import checkpoint, step_files
from trix_jax.lm.data import open_store
from trix_jax.lm.inspect import route
from trix_jax.lm.serve.load import load_run
from trix_jax.lm.train import metrics
from trix_jax.lm.train.evaluate import evaluate
from trix_jax.lm.train.loop import train
from trix_jax.nn.transformer import TransformerLM
from trix_jax.ternary import TernaryConfig, as_served, is_as_served


def with_ternary(config, **changes):
    ternary = dataclasses.replace(config.model.ternary, **changes)
    model = dataclasses.replace(config.model, ternary=ternary)
    return dataclasses.replace(config, model=model)


@pytest.fixture(scope="module")
def late(tiny_config, one_device, tmp_path_factory):
    """Real weights to the end, nearly: quantized in the last step of ten."""
    run = tmp_path_factory.mktemp("late") / "run"
    config = with_ternary(tiny_config, full_precision_fraction=0.8, hard_fraction=1.0)
    train(config, run, devices=one_device, report=lambda _: None)
    return run


def evals(run):
    lines = metrics.read(run / "metrics.jsonl")
    return {line["step"]: line for line in lines if line["event"] == "eval"}


def packed_loss(run, step):
    model, variables, _ = load_run(run, step)
    tokens = [[0] * model.config.context]
    import jax.numpy as jnp

    packed = freeze(model, variables, jnp.asarray(tokens))
    return evaluate(model, packed, open_store(run / "data")).val_loss


@pytest.mark.slow
def test_loss_before_late_quantization_is_that_of_the_frozen_weights(late):
    lines = evals(late)
    assert lines[5]["val_loss"] == packed_loss(late, 5)
    assert lines[5]["val_loss_unquantized"] != lines[5]["val_loss"]
    assert lines[10]["val_loss"] == packed_loss(late, 10)
    assert "val_loss_unquantized" not in lines[10]


@pytest.mark.slow
def test_best_is_the_best_as_served(late):
    lines = evals(late)
    summary = json.loads((late / "summary.json").read_text())
    assert summary["best_val_loss"] == min(line["val_loss"] for line in lines.values())
    model, variables, _ = load_run(late, "best")
    result = evaluate(model, variables, open_store(late / "data"))
    assert result.val_loss == summary["best_val_loss"]


@pytest.mark.slow
def test_soft_weights_are_evaluated_and_exported_with_what_packing_changes(
    tiny_config, one_device, tmp_path, capsys
):
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    config = with_ternary(tiny_config, mode="soft")
    train(config, run, devices=one_device, report=lambda _: None)
    with pytest.warns(UserWarning, match="training ends between the ternary values"):
        assert main(["export", "--checkpoint", run, "--output", out, "--json"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    data = ["--data", f"{run}/data"]
    assert main(["eval", "--checkpoint", out, *data, "--json"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert said["val_loss"] == json.loads(line)["val_loss"]
    assert json.loads(line)["val_loss_unquantized"] is None
    assert said["val_loss_before"] != said["val_loss"]
    assert main(["eval", "--checkpoint", run, "--json"]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert json.loads(line)["val_loss_unquantized"] == said["val_loss_before"]
    both, lines = [], open_store(f"{run}/data").val.window(0, 33)
    for folder in (run, out):
        model, variables, _ = load_run(folder)
        both.append(route(model, variables, lines).losses)
        argv = ["--checkpoint", folder, "--prompt", "the", "--tokens", "12", "--json"]
        assert main(["generate", *argv]) == 0
        both.append(json.loads(capsys.readouterr().out)["text"])
    np.testing.assert_allclose(both[0], both[2], rtol=1e-5)
    assert both[1] == both[3]


@pytest.mark.parametrize(
    ("config", "progress", "served"),
    [
        (TernaryConfig(), 0.0, True),
        (TernaryConfig(mode="none"), 0.0, True),
        (TernaryConfig(mode="soft"), 1.0, False),
        (TernaryConfig(mode="progressive", hard_fraction=0.6), 0.59, False),
        (TernaryConfig(mode="progressive", hard_fraction=0.6), 0.6, True),
        (TernaryConfig(full_precision_fraction=0.3), 0.29, False),
        (TernaryConfig(full_precision_fraction=0.3), 0.3, True),
    ],
)
def test_when_training_computes_with_what_is_served(config, progress, served):
    assert is_as_served(config, progress) == served
    assert is_as_served(as_served(config), 0.0)


def by_hand(model, variables, tokens, context):
    """Mean loss of the targets of disjoint windows, the last one shorter."""
    last = (len(tokens) - 1) // context * context
    windows = [tokens[start : start + context + 1] for start in range(0, last, context)]
    losses = []
    for rows in (np.stack(windows), tokens[None, last:]):
        logits = jax.jit(model.apply)(variables, rows[:, :-1])[0]
        logits = np.asarray(logits, np.float64)
        targets = np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]
        losses += [(np.log(np.exp(logits).sum(-1)) - targets).ravel()]
    return np.concatenate(losses).mean()


@pytest.mark.slow
@pytest.mark.parametrize(("positions", "context"), [("learned", 5), ("rotary", 40)])
def test_loss_at_another_context_is_that_of_windows_of_its_length(
    run_dir, tiny_config, positions, context
):
    trained, variables, _ = load_run(run_dir)
    config = dataclasses.replace(trained.config, positions=positions)
    if positions == "rotary":
        params = {k: v for k, v in variables["params"].items() if k != "positions"}
        variables = variables | {"params": params}
    store = open_store(run_dir / "data")
    model = TransformerLM(config)
    result = evaluate(model, variables, store, 4, context=context)
    # Of a model that is built for windows as long: it has the same weights.
    longer = TransformerLM(dataclasses.replace(config, context=max(16, context)))
    tokens = store.val.window(0, len(store.val))
    wanted = by_hand(longer, variables, tokens, context)
    assert result.val_loss == pytest.approx(wanted, rel=1e-5)
    assert result.tokens == len(tokens) - 1
    assert result.val_loss != evaluate(model, variables, store).val_loss


@pytest.mark.parametrize("context", [0, 17])
def test_context_that_a_model_learned_no_positions_for_is_refused(run_dir, context):
    model, variables, _ = load_run(run_dir)
    said = f"context must be 1 to 16: .* no positions beyond. Got {context}"
    with pytest.raises(ValueError, match=said):
        evaluate(model, variables, open_store(run_dir / "data"), context=context)


@pytest.mark.slow
def test_eval_says_that_windows_are_not_as_trained(run_dir, capsys):
    flags = ["eval", "--checkpoint", str(run_dir), "--context", "8", "--json"]
    assert main(flags) == 0
    out = capsys.readouterr()
    assert "windows of 8 tokens, short of the 16 it was trained with" in out.err
    assert json.loads(out.out)["context"] == 8


@pytest.mark.slow
def test_evaluation_of_the_first_tokens_is_of_whole_windows(run_dir):
    model, variables, _ = load_run(run_dir)
    store = open_store(run_dir / "data")
    result = evaluate(model, variables, store, 4, most=20)
    tokens = store.val.window(0, 33)
    wanted = by_hand(model, variables, tokens, 16)
    assert result.tokens == 32
    assert result.val_loss == pytest.approx(wanted, rel=1e-5)
    assert result.routes.shape[1] == 32
    everything = evaluate(model, variables, store, 4, most=len(store.val) + 99)
    assert everything.tokens == len(store.val) - 1
    with pytest.raises(ValueError, match=r"must not be negative\. Got -1"):
        evaluate(model, variables, store, most=-1)


@pytest.mark.slow
def test_run_that_goes_on_with_fewer_validation_tokens_compares_them_alone(
    run_dir, tiny_config, one_device, tmp_path
):
    run = shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "00000010")
    _set_best(run, 0.1)
    fewer = dataclasses.replace(tiny_config.train, eval_tokens=20)
    config = dataclasses.replace(tiny_config, train=fewer)
    done = train(config, run, devices=one_device, report=lambda _: None)
    first, last = evals(run).values()
    whole = len(open_store(run / "data").val) - 1
    assert (first["val_tokens"], last["val_tokens"]) == (whole, 32)
    assert last["routing_stability"] == []
    assert done["best_val_loss"] == done["final_val_loss"] == last["val_loss"] > 0.1
    assert checkpoint.resolve(run / "checkpoints", "best") == 10
    load_run(run, 5)
    kept = (run / "summary.json").read_bytes()
    assert train(config, run, devices=one_device, report=lambda _: None) == done
    other = dataclasses.replace(tiny_config.train, eval_tokens=40)
    config = dataclasses.replace(tiny_config, train=other)
    with pytest.raises(ValueError, match="is finished at step 10: nothing is left"):
        train(config, run, devices=one_device, report=lambda _: None)
    assert (run / "summary.json").read_bytes() == kept


def _set_best(run, loss):
    """As if the evaluation of step 5 had this loss."""
    log, path = run / "metrics.jsonl", run / "checkpoints" / "00000005"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        line |= {"val_loss": loss} if line["event"] == "eval" else {}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(
        json.dumps(meta | {"val_loss": loss, "best_val_loss": loss})
    )
    (path / "manifest.json").unlink()
    step_files.write_manifest(path, 5)
