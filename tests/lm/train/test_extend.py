"""More steps for a run that is there: the extended run is the long one, bit for bit."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import yaml

from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.config import RunConfig
from trix_jax.lm.serve.load import load_run
from trix_jax.lm.train import extend, metrics
from trix_jax.lm.train.loop import train
from trix_jax.nn.transformer import TransformerConfig
from trix_jax.routing import RoutingConfig
from trix_jax.ternary import TernaryConfig


def quiet(_):
    pass


def of(config, steps, **changes):
    """The config of a run of `steps` that evaluates in its last step alone."""
    changes = {"steps": steps, "eval_every": 100, **changes}
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, **changes)
    )


def arrays(run, step):
    return checkpoint.restore_arrays(run / "checkpoints", step)


def losses(run):
    lines = metrics.read(run / "metrics.jsonl")
    return [line["loss"] for line in lines if line["event"] == "step"]


def assert_same_run(run, other, step):
    assert losses(run) == losses(other)
    for x, y in zip(
        jax.tree.leaves(arrays(run, step)),
        jax.tree.leaves(arrays(other, step)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def contents(run):
    """Every file of a run but its lock, which any try to train leaves."""
    return {
        path.relative_to(run): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def trained(tiny_config, one_device, tmp_path_factory):
    """Runs of a schedule and length, each trained once, copied for each caller."""
    made, folder = {}, tmp_path_factory.mktemp("runs")

    def run(into, steps, **changes):
        key = (steps, *sorted(changes.items()))
        if key not in made:
            made[key] = folder / str(len(made))
            config = of(tiny_config, steps, **changes)
            train(config, made[key], devices=one_device, report=quiet)
        return shutil.copytree(made[key], into)

    return run


@pytest.mark.slow
def test_constant_run_of_four_steps_extended_to_eight_is_one_of_eight(
    tiny_config, one_device, trained, tmp_path
):
    run = trained(tmp_path / "run", 4, schedule="constant")
    said = []
    config = of(tiny_config, 8, schedule="constant")
    summary = train(config, run, devices=one_device, report=said.append)
    assert f"extending {run} from 4 to 8 steps, from step 4 on" in said
    assert_same_run(run, trained(tmp_path / "long", 8, schedule="constant"), 8)
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"] == 8
    assert summary["steps"] == 8
    assert not (run / "steps-4").exists()
    load_run(run, 4)  # a step of the shorter run is one of the longer


@pytest.mark.slow
def test_wsd_run_is_extended_from_its_stable_part_and_keeps_its_decayed_step(
    tiny_config, one_device, trained, tmp_path
):
    run = trained(tmp_path / "run", 5, schedule="wsd")
    before = contents(run)
    assert checkpoint.steps(run / "checkpoints") == [4, 5]  # the rate falls from 4 on
    said = []
    config = of(tiny_config, 10, schedule="wsd")
    train(config, run, devices=one_device, report=said.append)
    kept = run / "steps-5"
    assert (
        f"extending {run} from 5 to 10 steps, from step 4 on; kept in {kept}: 5" in said
    )
    long = trained(tmp_path / "long", 10, schedule="wsd")
    assert_same_run(run, long, 10)
    assert 8 in checkpoint.steps(run / "checkpoints")
    assert set(contents(kept)) <= set(before)
    assert all(data == before[name] for name, data in contents(kept).items())
    _, variables, _ = load_run(kept, "best")
    np.testing.assert_array_equal(
        variables["params"]["embed"]["embedding"],
        arrays(kept, 5)["params"]["embed"]["embedding"],
    )
    with pytest.raises(ValueError, match="has no step 5"):
        load_run(run, 5)


@pytest.mark.slow
def test_extension_that_was_killed_half_way_is_done_by_the_same_command(
    tiny_config, one_device, trained, tmp_path
):
    run = trained(tmp_path / "run", 5, schedule="wsd")
    extend.extend(run, of(tiny_config, 5, schedule="wsd"), 10, 4, quiet)
    assert checkpoint.steps(run / "checkpoints") == [4]  # the config is still of five
    train(of(tiny_config, 10, schedule="wsd"), run, devices=one_device, report=quiet)
    assert_same_run(run, trained(tmp_path / "long", 10, schedule="wsd"), 10)
    assert checkpoint.steps(run / "steps-5" / "checkpoints") == [5]


@pytest.mark.slow
def test_late_quantized_run_is_extended_from_before_its_weights_were_ternary(
    tiny_config, one_device, tmp_path
):
    ternary = TernaryConfig(full_precision_fraction=0.5)
    model = dataclasses.replace(tiny_config.model, ternary=ternary)
    late = of(dataclasses.replace(tiny_config, model=model), 4, schedule="constant")
    run, long = tmp_path / "run", tmp_path / "long"
    train(late, run, devices=one_device, report=quiet)
    train(of(late, 8), run, devices=one_device, report=quiet)
    train(of(late, 8), long, devices=one_device, report=quiet)
    assert_same_run(run, long, 8)
    assert checkpoint.steps(run / "steps-4" / "checkpoints") == [4]


def test_cosine_run_is_not_extended_and_stays_as_it_is(
    tiny_config, one_device, run_dir, tmp_path
):
    run = shutil.copytree(run_dir, tmp_path / "run")
    before = contents(run)
    with pytest.raises(
        ValueError,
        match=r"cannot be extended to 20: train\.schedule=cosine .*--init-from",
    ):
        train(of(tiny_config, 20), run, devices=one_device, report=quiet)
    assert contents(run) == before


@pytest.fixture
def stable(run_dir, tmp_path):
    """A run of ten steps whose rate falls from step 8 on, of which step 5 is kept, by
    what its config says.
    """
    run = shutil.copytree(run_dir, tmp_path / "run")
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["train"]["schedule"] = "wsd"
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    return run


def extended(config, **changes):
    config = dataclasses.replace(config, **changes)
    return of(config, 20, schedule="wsd", eval_every=5)


def test_run_whose_stable_step_is_gone_is_not_extended_and_says_which(
    tiny_config, one_device, stable
):
    shutil.rmtree(stable / "checkpoints" / "00000005")
    said = r"falls from step 8 on\. Its checkpoint of step 8 is gone"
    with pytest.raises(ValueError, match=said):
        train(extended(tiny_config), stable, devices=one_device, report=quiet)


def test_extension_with_other_settings_or_data_changes_nothing(
    tiny_config, one_device, stable
):
    before, config = contents(stable), extended(tiny_config, seed=7)
    with pytest.raises(ValueError, match="other settings: seed was 42 and is 7"):
        train(config, stable, devices=one_device, report=quiet)
    assert contents(stable) == before
    shutil.rmtree(stable / "data")
    before = contents(stable)
    less = dataclasses.replace(tiny_config.data, max_tokens=2000)
    config = extended(tiny_config, data=less)
    with pytest.raises(ValueError, match="trained on other data"):
        train(config, stable, devices=one_device, report=quiet)
    shutil.rmtree(stable / "data")
    assert contents(stable) == before


HARD = TernaryConfig()


def config_with(ffn="sparse", ternary=HARD, hold_after=None, **train_changes):
    routing = RoutingConfig(hold_after=hold_after)
    model = TransformerConfig(
        ffn=ffn, tiles_per_token=1, ternary=ternary, routing=routing
    )
    return of(RunConfig(model=model), 100, warmup_steps=10, **train_changes)


@pytest.mark.parametrize(
    ("config", "step"),
    [
        (config_with(), 0),
        (config_with(schedule="constant"), 100),
        (config_with(schedule="wsd"), 80),
        (config_with(schedule="wsd", decay_share=1.0), 10),
        (config_with(schedule="constant", decay_until=0.55), 55),
        (config_with(schedule="constant", decay_until=0.5, weight_decay=0.0), 100),
        (config_with(schedule="wsd", decay_until=0.9), 80),
        (
            config_with(
                schedule="wsd", ternary=TernaryConfig(full_precision_fraction=0.07)
            ),
            7,
        ),
        (
            config_with(
                "dense",
                schedule="wsd",
                ternary=TernaryConfig(full_precision_fraction=0.3),
            ),
            80,
        ),
        (config_with(schedule="wsd", ternary=TernaryConfig(mode="soft")), 80),
        (config_with(schedule="wsd", hold_after=0.1), 10),
        (config_with(schedule="wsd", hold_after=1.0), 80),
        (
            config_with(schedule="constant", ternary=TernaryConfig(mode="progressive")),
            0,
        ),
    ],
)
def test_last_step_that_a_longer_run_shares(config, step):
    assert extend.stable_until(config).step == step


def test_warmup_longer_than_the_run_depends_on_its_length():
    config = of(RunConfig(), 5, warmup_steps=100, schedule="constant")
    assert extend.stable_until(config).step == 0
