"""Runs that hold their addresses: they go on bit for bit across the moment, and what is
made of them knows it.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

from trix_jax import RoutingConfig, freeze, routing
from trix_jax.cli.main import main
from trix_jax.lm.accounting import active_width, costs
from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.data import open_store
from trix_jax.lm.data.tokenizer import ByteTokenizer
from trix_jax.lm.inspect import look
from trix_jax.lm.serve.export import WEIGHTS, export
from trix_jax.lm.serve.generate import SamplingConfig, generate
from trix_jax.lm.serve.load import load_run
from trix_jax.lm.train import initial, metrics, parallel
from trix_jax.lm.train.evaluate import evaluate
from trix_jax.lm.train.loop import train
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.step import init_state, make_train_step
from trix_jax.nn.transformer import TransformerLM


def quiet(_):
    pass


def holding(config, after=0.7, hold="scores", **model):
    routing = RoutingConfig(hold_after=after, hold=hold)
    changed = dataclasses.replace(config.model, routing=routing, **model)
    return dataclasses.replace(config, model=changed)


def routers(state):
    return state["routing"]["block_00"]["ffn"]["tiles"]["router"]


def table(state):
    return np.asarray(state["params"]["embed"]["embedding"])


def losses(run):
    lines = metrics.read(run / "metrics.jsonl")
    return [line["loss"] for line in lines if line["event"] == "step"]


@pytest.fixture(scope="module")
def config(tiny_config):
    """Ten steps of pairs, checkpoints of all; from the eighth on scores are held."""
    train = dataclasses.replace(tiny_config.train, checkpoint_every=1, accumulate=2)
    return dataclasses.replace(holding(tiny_config, router_input="pair"), train=train)


@pytest.fixture(scope="module")
def run(config, one_device, tmp_path_factory):
    directory = tmp_path_factory.mktemp("held") / "run"
    keep = checkpoint.save

    def keep_all(*args, **kwargs):
        return keep(*args, **{**kwargs, "keep": 99})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", keep_all)
        train(config, directory, devices=one_device, report=quiet)
    return directory


def tensors_of(path):
    with safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()


def states(run):
    steps = run / "checkpoints"
    return {n: checkpoint.restore_arrays(steps, n) for n in checkpoint.steps(steps)}


@pytest.mark.slow
def test_a_run_holds_what_the_step_at_its_share_saw(run):
    after = states(run)
    assert [bool(routers(after[n])["held"]) for n in range(1, 11)] == [False] * 7 + [
        True
    ] * 3
    for n in (9, 10):
        for get in (
            lambda s: routers(s)["signature"],
            lambda s: s["routing"]["router_input"]["rows"],
        ):
            np.testing.assert_array_equal(get(after[n]), get(after[8]))
    rows = after[8]["routing"]["router_input"]["rows"]
    np.testing.assert_array_equal(rows, table(after[7]))
    assert (rows != table(after[10])).any()
    biases = [routers(after[n])["bias"] for n in (8, 9, 10)]
    assert (biases[0] != biases[1]).any()
    assert (biases[1] != biases[2]).any()


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [6, 7, 8, 9])
def test_killed_before_or_after_the_moment_it_goes_on_bit_for_bit(
    run, config, one_device, tmp_path, killed_after
):
    half = tmp_path / "half"
    shutil.copytree(run, half)
    for step in range(killed_after + 1, 11):
        shutil.rmtree(half / "checkpoints" / f"{step:08d}")
    train(config, half, devices=one_device, report=quiet)
    assert losses(half) == losses(run)
    trees = [checkpoint.restore_arrays(r / "checkpoints", 10) for r in (half, run)]
    for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, 8, 10])
def test_exports_before_and_after_evaluate_as_the_run(run, tmp_path, step):
    model, variables, tokenizer = load_run(run, step)
    store = open_store(run / "data")
    expected = evaluate(model, variables, store)
    export(model, variables, tokenizer, tmp_path / "out")
    again, packed, _ = load_run(tmp_path / "out")
    got = evaluate(again, packed, store)
    assert got.val_loss == expected.val_loss
    np.testing.assert_array_equal(got.routes, expected.routes)
    free = {**variables, "routing": load_run(run, 7)[1]["routing"]}
    assert (evaluate(model, free, store).routes != got.routes).any() == (step > 7)
    prompt = tokenizer.encode("the tile is")
    greedy = SamplingConfig(temperature=0.0)
    new = list(generate(again, packed, prompt, 4, greedy))
    text = list(map(int, prompt))
    for token in new:
        logits, _, _ = model.apply(variables, jnp.asarray([text]))
        assert token == int(jnp.argmax(logits[0, -1]))
        text.append(token)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "held"), [(6, False), (10, True)])
def test_inspect_shows_whether_signatures_are_held_and_holds_nothing(run, step, held):
    found = look(run, open_store(run / "data"), step)
    (layer,) = found["layers"]
    assert (layer["held"], layer["frozen"]) == (held, False)


@pytest.mark.slow
def test_an_export_whose_held_signatures_are_missing_is_refused(run, tmp_path):
    model, variables, tokenizer = load_run(run)
    export(model, variables, tokenizer, tmp_path)
    path = tmp_path / WEIGHTS
    tensors, metadata = tensors_of(path)
    (name,) = (name for name in tensors if name.endswith("signature"))
    del tensors[name]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"router\.signature should be .* Got nothing"):
        load_run(tmp_path)


def after_steps(config, devices, mapping):
    model = dataclasses.replace(config.model, vocab_size=40)
    lm, optimizer = TransformerLM(model), make_optimizer(config.train)

    def make(*axis_and_slices):
        return make_train_step(lm, optimizer, config.train, *axis_and_slices)

    step = parallel.compile_step(make, devices, mapping)
    state = parallel.place(init_state(lm, optimizer, 0), devices, mapping)
    chance = np.random.default_rng(1)  # no margin lies on the edge of a bin
    for _ in range(10):
        batch = chance.integers(0, 40, (2, 8, model.context + 1), np.int32)
        state, _ = step(state, batch)
    return parallel.fetch(state, devices, mapping)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mapping", ["pmap", parallel.Spread(4), parallel.Spread(1, True)]
)
def test_many_devices_hold_what_one_holds(config, mapping):
    settings = dataclasses.replace(config.train, batch_size=16)
    config = dataclasses.replace(config, train=settings)
    one = after_steps(config, jax.devices()[:1], "jit")
    many = after_steps(config, jax.devices()[:8], mapping)
    names = jax.tree_util.tree_leaves_with_path(one.routing)
    for (path, x), y in zip(names, jax.tree.leaves(many.routing), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, err_msg=jax.tree_util.keystr(path))
    assert bool(many.routing["router_input"]["held"])


# What it costs, and what was before --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bits_of_routing_are_those_of_signatures_biases_and_held_rows(tiny_config):
    d, n, v = 16, 4, 40
    base = dataclasses.replace(tiny_config.model, vocab_size=v, n_layers=2)

    def bits(**changes):
        return costs(dataclasses.replace(base, **changes)).routing_bits

    def by(**changes):
        return bits(routing=RoutingConfig(**changes))

    assert bits() == 2 * 16 * (n * d + n)
    assert by(hold_after=0.1) == by(source="random") == bits()
    assert by(hold_after=0.1, hold="scores") == bits() + 16 * v * d
    assert by(source="hash") == bits(ffn="dense") == 0
    assert by(source="learned") == 2 * 16 * n
    clusters = {"ffn": "hierarchical", "tiles_per_cluster": 2}
    assert bits(**clusters) == bits() + 2 * 16 * (n + 2)
    lookup = {"ffn": "lookup", "tiles_per_token": 1, "tiles_per_cluster": 2}
    assert bits(**lookup) == bits(**clusters) - 2 * 16 * n * d


@pytest.mark.slow
def test_a_table_costs_its_bytes_and_saves_the_scores_of_its_layers(tiny_config):
    d, n, v, k = 16, 4, 40, 2
    base = dataclasses.replace(
        tiny_config.model, vocab_size=v, n_layers=3, hidden_from=2
    )
    scored, tabled = costs(base), costs(base, "table")
    assert scored.ffn_active - tabled.ffn_active == 2 * n * d
    assert tabled.ffn_active_training == scored.ffn_active_training
    assert tabled.ffn_bits == scored.ffn_bits
    # Two tables of a byte and a number a tile, and the last layer's signatures.
    assert tabled.routing_bits == 2 * v * k * (8 + 16) + 16 * (n * d + n)
    widths = active_width(base), active_width(base, "table")
    assert widths[0] - widths[1] == pytest.approx(2 / 3 * n / 2)
    no_gates = dataclasses.replace(base, routing=RoutingConfig(gate="none"))
    assert costs(no_gates, "table").routing_bits == 2 * v * k * 8 + 16 * (n * d + n)
    with pytest.raises(ValueError, match="router_input='embedding'"):
        costs(dataclasses.replace(base, router_input="pair"), "table")


@pytest.fixture(scope="module")
def by_token(tiny_config):
    """A model with held scores, not trained, and a tokenizer that is its size."""
    settings = holding(tiny_config, hold="scores").model
    model = TransformerLM(dataclasses.replace(settings, vocab_size=257))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    rows = jax.random.normal(jax.random.key(1), (257, 16))
    state = dict(variables["routing"])
    state["router_input"] = {**state["router_input"], "rows": rows}
    return model, {**variables, "routing": routing.hold_signatures(state)}


@pytest.mark.slow
def test_an_export_with_a_table_serves_as_the_scores_do(by_token, tmp_path):
    model, variables = by_token
    sizes = export(model, variables, ByteTokenizer(), tmp_path, routes="table")
    again, packed, _ = load_run(tmp_path)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, 16)))
    logits, infos, _ = jax.jit(again.apply)(packed, tokens)
    expected, scored, _ = jax.jit(model.apply)(variables, tokens)
    np.testing.assert_array_equal(infos[0].tiles, scored[0].tiles)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    router = packed["packed"]["block_00"]["ffn"]["tiles"]
    assert router.keys() == {"up", "down", "router"}
    table = sum(leaf.nbytes for leaf in router["router"].values())
    gates = router["router"]["gates"]
    assert 8 * table - 16 * gates.size == costs(model.config, "table").routing_bits
    half = export(
        model, variables, ByteTokenizer(), tmp_path / "half", "table", "bfloat16"
    )
    assert sizes["routes"] - half["routes"] == 2 * gates.size
    rounded = load_run(tmp_path / "half")[1]["packed"]["block_00"]["ffn"]["tiles"]
    near = gates.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(rounded["router"]["gates"], near)
    np.testing.assert_array_equal(rounded["router"]["tiles"], router["router"]["tiles"])
    names = tensors_of(tmp_path / WEIGHTS)[0]
    assert not {n for n in names if n.endswith(("signature", ".rows", "_sums"))}
    # What is there beside the table: biases and two flags a layer, one of the rows.
    assert sizes["routes"] == table + 4 * model.config.num_tiles + 2 + 1
    greedy = SamplingConfig(temperature=0.0)
    prompt = np.asarray([5, 6, 7])
    texts = [
        list(generate(m, v, prompt, 20, greedy))
        for m, v in ((again, packed), (model, variables))
    ]
    assert texts[0] == texts[1]
    export(again, packed, ByteTokenizer(), tmp_path / "twice")
    first, second = (tensors_of(d / WEIGHTS)[0] for d in (tmp_path, tmp_path / "twice"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tiles", lambda x: x + np.uint8(4), "must name tiles below 4. Got 7"),
        ("tiles", lambda x: x[:-1].copy(), r"should be uint8\[257, 2\]"),
        ("gates", lambda _: None, "gates should be .* Got nothing"),
    ],
)
def test_a_damaged_table_is_refused(by_token, tmp_path, name, change, message):
    export(*by_token, ByteTokenizer(), tmp_path, routes="table")
    path = tmp_path / WEIGHTS
    tensors, metadata = tensors_of(path)
    key = f"packed.block_00.ffn.tiles.router.{name}"
    tensors[key] = change(tensors[key])
    kept = {k: v for k, v in tensors.items() if v is not None}
    save_file(kept, path, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        load_run(tmp_path)


@pytest.mark.slow
def test_inspect_shows_an_export_whose_routes_are_a_table(
    run_dir, one_device, tiny_config, tmp_path, capsys
):
    model, variables, tokenizer = load_run(run_dir)
    export(model, variables, tokenizer, tmp_path, routes="table")
    scored, tabled = (
        look(place, open_store(run_dir / "data")) for place in (run_dir, tmp_path)
    )
    (one,), (other,) = scored["layers"], tabled["layers"]
    assert one["tiles"] == other["tiles"]
    assert (one["routes"], other["routes"]) == ("signatures", "table")
    assert other["similarity"] is None
    saved = scored["model"]["ffn_active"] - tabled["model"]["ffn_active"]
    assert saved == model.config.num_tiles * model.config.d_model
    data = ["--data", str(run_dir / "data")]
    ask = ["inspect", "--checkpoint", str(tmp_path), *data]
    assert main([*ask, "--against", str(run_dir)]) == 0
    assert "100.0% of the assignments" in capsys.readouterr().out
    assert main([*ask, "--signature", "0:1"]) == 2
    assert "--signature needs signatures" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_from_before_these_settings_loads_and_goes_on(
    run_dir, tiny_config, one_device, tmp_path
):
    half = tmp_path / "half"
    shutil.copytree(run_dir, half)
    tree = yaml.safe_load((half / "config.yaml").read_text())
    for name in ("pair_weight", "hidden_from"):
        del tree["model"][name]
    for name in ("hold_after", "hold"):
        del tree["model"]["routing"][name]
    (half / "config.yaml").write_text(yaml.safe_dump(tree))
    shutil.rmtree(half / "checkpoints" / "00000010")
    train(tiny_config, half, devices=one_device, report=quiet)
    assert losses(half) == losses(run_dir)
    assert json.loads((half / "summary.json").read_text())["params"]["routing_bits"]
    model, variables, _ = load_run(half)
    freeze(model, variables, jnp.zeros((1, 4), jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"after": 0.9}, {"hold": "routes"}, None])
def test_what_is_held_is_not_held_otherwise_by_a_run_that_starts_there(
    run, config, changed
):
    store = open_store(run / "data")
    model = {"vocab_size": store.tokenizer.vocab_size, "router_input": "pair"}
    if changed is None:
        other = dataclasses.replace(config.model, routing=RoutingConfig(), **model)
        other = dataclasses.replace(config, model=other)
    else:
        other = holding(config, **changed, **model)
    step = str(run / "checkpoints" / "00000009")
    with pytest.raises(ValueError, match=r"addresses that are held .*and they stay so"):
        initial.weights(initial.find(step), other, store, quiet)
    same = holding(config, **model)
    found = initial.weights(initial.find(step), same, store, quiet)
    assert routers(found)["held"]
    if changed is not None:
        before = str(run / "checkpoints" / "00000005")
        found = initial.weights(initial.find(before), other, store, quiet)
        assert not routers(found)["held"]
