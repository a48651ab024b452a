"""What every layer must do: one set of tests over all of them, and a naive oracle written from the docstrings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

from trix_jax import (
    HierarchicalTriXFFN,
    SparseLookupFFN,
    SparseTriXFFN,
    TernaryConfig,
    TriXLinear,
)

# Compiling is what takes the time here; no test in this file asks for equal bits across programs.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

D = 16
EPS = np.finfo(np.float32).eps
FFNS = {
    "sparse_top1": SparseTriXFFN(D),
    "sparse_top2": SparseTriXFFN(D, num_tiles=8, tiles_per_token=2),
    "hierarchical": HierarchicalTriXFFN(
        D, num_tiles=8, tiles_per_cluster=2, top_k_clusters=2, tiles_per_token=2
    ),
    "lookup": SparseLookupFFN(D, num_tiles=4, tiles_per_cluster=2, grid_size=3),
}
TILES = {"tiles/up/kernel", "tiles/down/kernel"}
LEAVES = {
    "sparse_top1": TILES,
    "sparse_top2": TILES,
    "hierarchical": TILES | {"norm/scale", "output_scale"},
    "lookup": {
        "norm/scale",
        "norm/bias",
        "directions",
        "splines/kernel",
        "spline_scale",
        "output_scale",
        "compress_in/kernel",
        "compress_in/bias",
        "compress_out/kernel",
        "compress_out/bias",
    },
}
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, D)), jnp.float32)

every_ffn = pytest.mark.parametrize("name", FFNS)


@functools.cache
def initialized(layer, seed=0):
    return jit(layer.init)(jax.random.key(seed), X)


@functools.cache
def applied(layer, train=False):
    return jit(lambda v, x: layer.apply(v, x, train))


def run(name, x=X):
    return applied(FFNS[name])(initialized(FFNS[name]), x)


# The oracle: float64, one token at a time ------------------------------------------------------------------------------


def unit(x):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def ternary(w):
    """Absmean per tile."""
    scale = np.float64(jnp.bfloat16(np.abs(w).mean()))
    return np.clip(np.round(w / scale), -1, 1), scale


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def best(scores, k):
    return np.argsort(-scores, kind="stable")[:k]


def routes(h, signature, k, state, top_k_clusters=1):
    """Tiles of each token and their unbiased scores."""
    chosen, matches = [], []
    for token in unit(h):
        score = signature @ token / np.sqrt(len(token))
        biased = score + np.float64(state["bias"])
        if "members" in state:
            members = np.asarray(state["members"])
            address = unit(np.stack([signature[m].mean(axis=0) for m in members]))
            cluster = address @ token / np.sqrt(len(token))
            cluster = best(cluster + np.float64(state["cluster_bias"]), top_k_clusters)
            closed = np.ones(len(biased), bool)
            closed[members[cluster].reshape(-1)] = False
            biased[closed] = -np.inf
        chosen.append(best(biased, k))
        matches.append(score[chosen[-1]])
    return np.stack(chosen), np.stack(matches)


def tiles_oracle(h, tiles, matches, params):
    """The output, and the sum of the absolute values of its terms, which bounds what float32 may lose."""
    up = [ternary(w) for w in np.float64(params["up"]["kernel"])]
    down = [ternary(w) for w in np.float64(params["down"]["kernel"])]
    y, size = np.zeros_like(h), np.zeros_like(h)
    for t, token in enumerate(h):
        for n, match in zip(tiles[t], matches[t], strict=True):
            (q_up, s_up), (q_down, s_down) = up[n], down[n]
            gate = sigmoid(match)
            hidden = np.maximum((token @ q_up) * s_up, 0) ** 2
            y[t] += gate * (hidden @ q_down) * s_down
            largest = ((np.abs(token) @ np.abs(q_up)) * s_up) ** 2
            size[t] += gate * (largest @ np.abs(q_down)) * s_down
    return y, size


def up_signatures(params):
    return unit(
        np.stack(
            [ternary(w)[0].sum(axis=-1) for w in np.float64(params["up"]["kernel"])]
        )
    )


def sparse_oracle(layer, variables, x):
    params = variables["params"]["tiles"]
    state = variables["routing"]["tiles"]["router"]
    tiles, matches = routes(x, up_signatures(params), layer.tiles_per_token, state)
    return tiles, *tiles_oracle(x, tiles, matches, params)


def hierarchical_oracle(layer, variables, x):
    params, state = variables["params"], variables["routing"]["tiles"]["router"]
    h = unit(x) * np.float64(params["norm"]["scale"])
    tiles, matches = routes(
        h,
        up_signatures(params["tiles"]),
        layer.tiles_per_token,
        state,
        layer.top_k_clusters,
    )
    y, size = tiles_oracle(h, tiles, matches, params["tiles"])
    scale = np.float64(params["output_scale"])
    return tiles, scale * y, np.abs(scale) * size


def lookup_oracle(layer, variables, x):
    p = jax.tree.map(np.float64, variables["params"])
    centred = x - x.mean(axis=-1, keepdims=True)
    h = unit(centred) * p["norm"]["scale"] + p["norm"]["bias"]
    state = variables["routing"]["router"]
    tiles, matches = routes(h, unit(p["directions"]), 1, state)
    hidden = h @ p["compress_in"]["kernel"] + p["compress_in"]["bias"]
    tanh_gelu = np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3))
    hidden = hidden / 2 * (1 + tanh_gelu)
    ab = np.tanh(hidden @ p["compress_out"]["kernel"] + p["compress_out"]["bias"])
    grid = layer.grid_size
    splines = p["splines"]["kernel"].reshape(-1, grid, grid, 3)
    splines = np.sign(splines) * (np.abs(splines) > 0.3)
    y, size = np.zeros_like(x), np.zeros_like(x)
    for t, (n, (a, b)) in enumerate(zip(tiles[:, 0], ab, strict=True)):
        i, j = (min(int((u + 1) / 2 * grid), grid - 1) for u in (a, b))
        la, lb = (a + 1) / 2 * grid - i, (b + 1) / 2 * grid - j
        c0, c1, c2 = splines[n, i, j]
        outside = sigmoid(matches[t, 0]) * p["spline_scale"][n] * p["output_scale"]
        y[t] = outside * (c0 + c1 * la + c2 * lb) * p["directions"][n]
        # An error of tanh in 0..1 counts G times in the place inside a cell.
        size[t] = np.abs(outside * (1 + 2 * grid) * p["directions"][n])
    return tiles, y, size


ORACLES = {
    "sparse_top1": sparse_oracle,
    "sparse_top2": sparse_oracle,
    "hierarchical": hierarchical_oracle,
    "lookup": lookup_oracle,
}


def disturbed(variables):
    """Variables as after some training: nothing is at its initial one or zero, tiles have moved between clusters."""
    rng = np.random.default_rng(5)
    variables = jax.tree.map(
        lambda leaf: (
            leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
            if leaf.dtype == jnp.float32
            else leaf
        ),
        variables,
    )
    state = variables["routing"].get("tiles", variables["routing"])["router"]
    if "members" in state:
        members = rng.permutation(state["members"].size)
        state["members"] = jnp.asarray(
            members.reshape(state["members"].shape), jnp.int32
        )
    return variables


@every_ffn
def test_ffn_matches_the_oracle(name):
    layer = FFNS[name]
    variables = disturbed(initialized(layer))
    y, info, _ = applied(layer)(variables, X)
    tiles, expected, size = ORACLES[name](
        layer, variables, np.float64(X).reshape(-1, D)
    )
    np.testing.assert_array_equal(info.tiles.reshape(-1, tiles.shape[1]), tiles)
    assert len(np.unique(tiles)) > 2
    # Roundings: D and F in the two products (the first squared), D in the norm, D in the gate, a few in between.
    width = 4 * D // 4
    bound = (2 * D + width + 2 * D + 16) * EPS * size
    error = np.abs(np.float64(y).reshape(-1, D) - expected)
    assert (error <= bound).all(), (error / bound).max()


# Initialization --------------------------------------------------------------------------------------------------------


@every_ffn
def test_ffn_at_initialization_changes_its_input_and_moves_every_parameter(name):
    layer, variables = FFNS[name], initialized(FFNS[name])
    dy = jnp.asarray(np.random.default_rng(1).normal(size=X.shape), jnp.float32)

    @jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def task(params):
        y, *_ = layer.apply({**variables, "params": params}, X)
        return jnp.sum(y * dy), y

    (_, y), gradients = task(variables["params"])
    assert 1e-3 < np.abs(y).mean() < 10
    assert np.abs(y - X).mean() > 1e-2
    for path, gradient in flatten_dict(gradients, sep="/").items():
        assert gradient.dtype == jnp.float32
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 1e-6, path


@every_ffn
def test_routing_adds_no_leaf_to_params(name):
    variables = initialized(FFNS[name])
    assert set(flatten_dict(variables["params"], sep="/")) == LEAVES[name]
    assert set(variables) == {"params", "routing"}


# Shapes and dtypes -----------------------------------------------------------------------------------------------------


@every_ffn
def test_rank_two_and_three_give_the_same(name):
    deep, info, aux = run(name)
    flat, flat_info, flat_aux = run(name, X.reshape(-1, D))
    assert deep.shape == X.shape
    assert info.tiles.shape[:-1] == X.shape[:-1] == info.gates.shape[:-1]
    np.testing.assert_array_equal(deep.reshape(-1, D), flat)
    np.testing.assert_array_equal(info.counts, flat_info.counts)
    assert aux["total_aux"] == flat_aux["total_aux"]


@every_ffn
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_output_has_the_dtype_of_the_input(name, x_dtype, dtype):
    layer = FFNS[name].clone(dtype=dtype and jnp.dtype(dtype))
    out = jax.eval_shape(layer.apply, initialized(FFNS[name]), X.astype(x_dtype))
    assert out[0].dtype == x_dtype
    assert out[0].shape == X.shape
    assert out[2]["total_aux"].dtype == jnp.float32


@every_ffn
def test_dtype_none_computes_in_the_dtype_of_the_input(name):
    layer = FFNS[name]
    variables, x = initialized(layer), X.astype(jnp.bfloat16)
    y, _, _ = applied(layer)(variables, x)
    named, _, _ = applied(layer.clone(dtype=jnp.bfloat16))(variables, x)
    np.testing.assert_array_equal(y, named)


@every_ffn
def test_bfloat16_stays_near_float32_where_the_routes_agree(name):
    x = X.astype(jnp.bfloat16)
    y, info, _ = run(name, x)
    whole, whole_info, _ = run(name, x.astype(jnp.float32))
    same = (info.tiles == whole_info.tiles).all(axis=-1)
    assert same.mean() > 0.8
    error = np.abs(y.astype(jnp.float32) - whole)[same]
    # Eight bits, on the way through norm, two products, a square and the gate.
    assert error.max() < 16 * 2**-8 * np.abs(whole).max()
    assert error.max() > 0


@every_ffn
@pytest.mark.parametrize(
    "shape", [(D,), (2, 0, D), (0, D), (2, 3, D + 1), (1, 2, 3, D)]
)
def test_input_of_another_shape_is_refused(name, shape, no_type_hook):
    with pytest.raises(ValueError, match=r"x must be \[tokens, 16\].* Got \["):
        FFNS[name].apply(initialized(FFNS[name]), jnp.zeros(shape))


# Training and evaluation -----------------------------------------------------------------------------------------------


@every_ffn
def test_total_aux_is_there_in_training_and_evaluation(name):
    layer, variables = FFNS[name], initialized(FFNS[name])
    for train in (False, True):
        aux = applied(layer, train)(variables, X)[2]
        assert aux["total_aux"].shape == ()
        assert np.isfinite(aux["total_aux"])
        assert aux["total_aux"] > 0


@every_ffn
def test_dropout_is_active_in_training_only(name):
    layer, variables = FFNS[name].clone(dropout=0.5), initialized(FFNS[name])
    y, _, _ = applied(layer)(variables, X)
    np.testing.assert_array_equal(y, run(name)[0])
    trained = jit(lambda key: layer.apply(variables, X, True, rngs={"dropout": key})[0])
    dropped = trained(jax.random.key(0))
    share = np.mean(np.asarray(dropped == 0) & np.asarray(y != 0))
    assert 0.3 < share < 0.7
    kept = np.asarray(dropped != 0)
    np.testing.assert_allclose(dropped[kept], 2 * y[kept], rtol=1e-5, atol=1e-6)
    assert (trained(jax.random.key(1)) != dropped).any()


@every_ffn
def test_residual_adds_the_input(name):
    layer = FFNS[name].clone(residual=True)
    y, _, _ = applied(layer)(initialized(FFNS[name]), X)
    np.testing.assert_allclose(y, X + run(name)[0], rtol=2 * EPS, atol=2 * EPS)


# Transformations -------------------------------------------------------------------------------------------------------


@every_ffn
def test_changing_routes_share_one_trace(name):
    layer, variables = FFNS[name], initialized(FFNS[name])
    traces = []

    @jit
    def forward(variables, x):
        traces.append(None)
        _, info, _ = layer.apply(variables, x)
        return info.tiles

    seen = {np.asarray(forward(variables, sign * X)).tobytes() for sign in (1, -1)}
    same = jnp.broadcast_to(X[:1, :1], X.shape)
    tiles = np.asarray(forward(variables, same))
    assert (tiles == tiles[0, 0]).all()
    assert len(seen) == 2
    assert len(traces) == 1


@every_ffn
def test_permuting_tokens_permutes_outputs(name):
    order = np.random.default_rng(0).permutation(24)
    flat = X.reshape(-1, D)
    y, info, _ = run(name, flat)
    moved, moved_info, _ = run(name, flat[order])
    np.testing.assert_array_equal(moved_info.tiles, info.tiles[order])
    # A token may sit in another row of a matrix product, whose sums of up to 4 D terms may then be taken in another order.
    np.testing.assert_allclose(
        moved, y[order], rtol=0, atol=4 * D * EPS * np.abs(y).max()
    )


@every_ffn
def test_vmap_equals_a_call_per_element(name):
    layer, variables = FFNS[name], initialized(FFNS[name])
    y = jit(jax.vmap(lambda x: layer.apply(variables, x)[0]))(X)
    one = jnp.stack([run(name, x)[0] for x in X])
    np.testing.assert_allclose(y, one, rtol=0, atol=4 * D * EPS * np.abs(one).max())


class Repeated(nn.Module):
    """One layer twice under `nn.scan`, each with its own weights; `lift` wraps the layer's class."""

    layer: nn.Module
    lift: str = "none"

    @nn.compact
    def __call__(self, x):
        fields = {
            key: getattr(self.layer, key)
            for key in self.layer.__dataclass_fields__
            if key not in ("name", "parent")
        }
        cls = type(self.layer)
        cls = nn.remat(cls, static_argnums=(2,)) if self.lift == "remat" else cls

        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                y, _, aux = cls(**fields, name="ffn")(x, False)
                return x + y, aux["total_aux"]

        scan = nn.scan(
            Step,
            variable_axes={"params": 0, "routing": 0, "packed": 0},
            split_rngs={"params": True},
            length=2,
        )
        return scan(name="steps")(x, None)


@every_ffn
def test_scan_and_remat_equal_the_layers_one_after_another(name):
    layer = FFNS[name]
    stacked = jax.tree.map(
        lambda a, b: jnp.stack([a, b]), initialized(layer), initialized(layer, seed=1)
    )
    nested = {key: {"steps": {"ffn": value}} for key, value in stacked.items()}
    shapes = jax.eval_shape(Repeated(layer).init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, nested)
    x = X
    for i in range(2):
        x = x + applied(layer)(jax.tree.map(lambda a, i=i: a[i], stacked), x)[0]

    @jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, lift):
        y, _ = Repeated(layer, lift).apply({**nested, "params": params}, X)
        return jnp.sum(y**2), y

    loss = jit(loss, static_argnums=1)
    (_, y), gradient = loss(nested["params"], "none")
    np.testing.assert_allclose(y, x, rtol=0, atol=8 * D * EPS * np.abs(x).max())
    (_, again), saved = loss(nested["params"], "remat")
    np.testing.assert_allclose(again, y, rtol=0, atol=8 * D * EPS * np.abs(x).max())
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
        assert (np.abs(b).reshape(2, -1).max(axis=1) > 0).all()


@every_ffn
def test_jax_checkpoint_leaves_value_and_gradient(name):
    layer, variables = FFNS[name], initialized(FFNS[name])
    forward = lambda params: layer.apply({**variables, "params": params}, X)[0].sum()
    plain, saved = (
        jit(jax.value_and_grad(f))(variables["params"])
        for f in (forward, jax.checkpoint(forward))
    )
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(saved), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max() + EPS)


@every_ffn
def test_tabulate_lists_the_parameters(name):
    table = nn.tabulate(FFNS[name], jax.random.key(0), console_kwargs={"width": 200})(X)
    assert type(FFNS[name]).__name__ in table
    total = sum(a.size for a in jax.tree.leaves(initialized(FFNS[name])["params"]))
    assert f"{total:,}" in table


def test_nnx_bridge_runs_and_differentiates_the_hierarchical_ffn():
    layer = FFNS["hierarchical"]
    model = nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(0)).lazy_init(X)

    @nnx.jit
    def loss_and_gradient(model, x):
        return nnx.value_and_grad(lambda m: jnp.sum(m(x)[0] ** 2))(model)

    y, info, aux = model(X)
    assert y.shape == X.shape
    assert info.counts.sum() == 2 * 24
    assert np.isfinite(aux["total_aux"])
    loss, gradient = loss_and_gradient(model, X)
    assert loss > 0
    leaves = jax.tree.leaves(nnx.state(gradient, nnx.Param))
    assert len(leaves) == len(LEAVES["hierarchical"])
    assert all(np.abs(leaf).max() > 0 for leaf in leaves)


# Refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (SparseTriXFFN(D, num_tiles=5), r"num_tiles=5 .* expansion \* d_model=64"),
        (SparseTriXFFN(D, num_tiles=0), "num_tiles=0"),
        (SparseTriXFFN(D, tiles_per_token=5), "tiles_per_token=5 .* num_tiles=4"),
        (SparseTriXFFN(D, tiles_per_token=0), "tiles_per_token=0"),
        (SparseTriXFFN(D, activation="tanh"), "activation must be one of .*'tanh'"),
        (
            HierarchicalTriXFFN(D, num_tiles=6, d_hidden=4, tiles_per_cluster=4),
            "tiles_per_cluster=4 must divide num_tiles=6",
        ),
        (
            HierarchicalTriXFFN(D, num_tiles=6, tiles_per_cluster=3),
            r"num_tiles=6 must divide 4 \* d_model=64",
        ),
        (
            HierarchicalTriXFFN(D, num_tiles=8, tiles_per_cluster=4, top_k_clusters=3),
            "top_k_clusters=3 .* 2 clusters",
        ),
        (
            HierarchicalTriXFFN(D, num_tiles=8, tiles_per_cluster=2, tiles_per_token=3),
            r"tiles_per_token=3 .* top_k_clusters \* tiles_per_cluster=2",
        ),
        (
            SparseLookupFFN(D, num_tiles=6, tiles_per_cluster=4),
            "tiles_per_cluster=4 must divide num_tiles=6",
        ),
        (TriXLinear(10, num_tiles=4), "num_tiles=4 must divide features=10"),
    ],
)
def test_bad_sizes_name_argument_and_value(layer, message, no_type_hook):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), X)


def test_lookup_width_that_four_does_not_divide_is_refused_or_set(no_type_hook):
    small = {"num_tiles": 2, "tiles_per_cluster": 1, "grid_size": 2}
    x = X[..., :6]
    with pytest.raises(ValueError, match="4 must divide d_model=6"):
        jax.eval_shape(SparseLookupFFN(6, **small).init, jax.random.key(0), x)
    layer = SparseLookupFFN(6, compress_hidden=2, **small)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert shapes["params"]["compress_in"]["kernel"].shape == (6, 2)


# TriXLinear ------------------------------------------------------------------------------------------------------------

LINEAR = TriXLinear(12, num_tiles=4, use_bias=True)


def linear_with_bias(layer=LINEAR):
    variables = jax.tree.map(lambda leaf: leaf, initialized(layer))
    variables["params"]["bias"] = jnp.arange(12, dtype=jnp.float32)
    return variables


def linear_oracle(params, x, gate=None):
    y = []
    for n, w in enumerate(np.float64(params["kernel"]["kernel"])):
        q, scale = ternary(w)
        y.append((x @ q) * scale * (1 if gate is None else gate[..., n, None]))
    return np.concatenate(y, axis=-1) + np.float64(params["bias"])


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_linear_matches_the_oracle_with_and_without_gates(lead):
    variables = linear_with_bias()
    rng = np.random.default_rng(3)
    x, gate = rng.normal(size=(*lead, D)), rng.normal(size=(*lead, 4))
    x32, gate32 = jnp.float32(x), jnp.float32(gate)
    apply = jit(LINEAR.apply)
    # Sums of D terms, a scale, a gate and a bias of up to 11.
    bound = (D + 3) * EPS * np.abs(x).sum(axis=-1, keepdims=True) + 12 * EPS
    for y, expected in [
        (apply(variables, x32), linear_oracle(variables["params"], x)),
        (apply(variables, x32, gate32), linear_oracle(variables["params"], x, gate)),
    ]:
        assert y.shape == (*lead, 12)
        np.testing.assert_array_less(np.abs(y - expected), 3 * bound)


def test_linear_gate_of_zero_switches_its_tile_off():
    variables = linear_with_bias()
    gate = jnp.ones((2, 12, 4)).at[..., 1].set(0)
    apply = jit(LINEAR.apply)
    y, full = apply(variables, X, gate), apply(variables, X)
    np.testing.assert_array_equal(y[..., 3:6], jnp.broadcast_to(jnp.float32([3, 4, 5]), (2, 12, 3)))  # fmt: skip
    np.testing.assert_array_equal(y[..., :3], full[..., :3])
    np.testing.assert_array_equal(y[..., 6:], full[..., 6:])


def test_linear_gate_of_another_shape_is_refused(no_type_hook):
    with pytest.raises(
        ValueError, match=r"gate must be \[2, 12, 4\].* Got \[2, 12, 3\]"
    ):
        LINEAR.apply(linear_with_bias(), X, jnp.ones((2, 12, 3)))


def test_linear_signatures_are_the_summed_ternary_weights():
    variables = initialized(LINEAR)
    sums = [
        ternary(w)[0].sum(axis=-1)
        for w in np.float64(variables["params"]["kernel"]["kernel"])
    ]
    got = LINEAR.apply(variables, D, method="signatures")
    np.testing.assert_allclose(got, unit(np.stack(sums)), rtol=4 * EPS)
    signs = LINEAR.apply(variables, D, "sign", method="signatures")
    np.testing.assert_array_equal(signs, np.sign(sums))


@pytest.mark.parametrize("rule", ["absmean", "fixed"])
def test_linear_at_initialization_moves_every_parameter(rule):
    layer = TriXLinear(12, use_bias=True, ternary=TernaryConfig(rule=rule))
    variables = initialized(layer)
    names = {"bias", "kernel/kernel"} | ({"kernel/scale"} if rule == "fixed" else set())
    assert set(variables) == {"params"}
    assert set(flatten_dict(variables["params"], sep="/")) == names
    gradient = jit(jax.grad(lambda v: jnp.sum(layer.apply(v, X) ** 2)))(variables)
    for path, leaf in flatten_dict(gradient["params"], sep="/").items():
        assert np.abs(leaf).max() > 1e-3, path


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_linear_follows_the_dtype_of_its_input_or_its_own(x_dtype):
    x = X.astype(x_dtype)
    out = jax.eval_shape(LINEAR.apply, initialized(LINEAR), x)
    assert out.dtype == x_dtype
    named = LINEAR.clone(dtype=jnp.bfloat16)
    assert jax.eval_shape(named.apply, initialized(LINEAR), x).dtype == jnp.bfloat16
