"""What other people's training code does with a layer, with the right values: meshes,
exports, scans, boxes, initializers; and what is refused or warned of.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from trix_jax import (
    HierarchicalTriXFFN,
    SparseLookupFFN,
    SparseTriXBlock,
    SparseTriXFFN,
    TernaryConfig,
    TriXLinear,
    freeze,
    routing,
)
from trix_kernels.hlo import while_loops

D, EPS = 16, np.finfo(np.float32).eps
X = jax.random.normal(jax.random.key(0), (4, 6, D))
LAYERS = {
    "sparse": SparseTriXFFN(D, num_tiles=4, tiles_per_token=2),
    "hierarchical": HierarchicalTriXFFN(D, num_tiles=4, tiles_per_cluster=2),
    "lookup": SparseLookupFFN(D, num_tiles=4, tiles_per_cluster=2, grid_size=2),
    "linear": TriXLinear(D),
    "block": SparseTriXBlock(D, 2),
}
most_layers = pytest.mark.parametrize(
    "name",
    [
        "sparse",
        *(pytest.param(n, marks=pytest.mark.slow) for n in LAYERS if n != "sparse"),
    ],
)


def output(returned):
    return returned if isinstance(returned, jax.Array) else returned[0]


@functools.cache
def variables_of(name):
    return jax.jit(LAYERS[name].init)(jax.random.key(1), X)


def assert_near(got, expected, roundings=64):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.float64(a), np.float64(b)
        bound = roundings * EPS * max(np.abs(b).max(), 1e-6)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


# Meshes and exports ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LAYERS)[:3])
def test_shard_map_as_it_is_gives_the_step_of_one_device(name):
    layer, variables = LAYERS[name], variables_of(name)
    axis = (AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), axis_types=axis, devices=jax.devices()[:4])

    def step(params, state, x, axis_name=None):
        def loss(params):
            variables = {"params": params, "routing": state}
            (y, _, aux), new = layer.clone(axis_name=axis_name).apply(
                variables, x, True, mutable=["routing"]
            )
            return jnp.mean(y**2) + aux["total_aux"], new["routing"]

        (_, new), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return gradient, routing.update(new, axis_name=axis_name)

    specs = {"in_specs": (P(), P(), P("data")), "out_specs": (P(), P())}
    shared = functools.partial(step, axis_name="data")
    mapped = jax.jit(jax.shard_map(shared, mesh=mesh, **specs))
    both = variables["params"], variables["routing"]
    gradient, state = mapped(*both, X)
    # Of what is the same everywhere, JAX has summed the gradients already.
    expected, expected_state = jax.jit(step)(*both, X)
    assert_near(jax.tree.map(lambda g: g / 4, gradient), expected)
    assert_near(state, expected_state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "is_frozen"), [*((name, True) for name in LAYERS), ("sparse", False)]
)
def test_export_with_a_symbolic_batch_gives_the_numbers_of_a_call(name, is_frozen):
    layer, variables = LAYERS[name], variables_of(name)
    if is_frozen:
        variables = freeze(layer, variables, X)
    (batch,) = jax.export.symbolic_shape("batch")
    call = jax.jit(lambda x: output(layer.apply(variables, x)))
    shape = jax.ShapeDtypeStruct((batch, 6, D), jnp.float32)
    exported = jax.export.export(call)(shape)
    for size in (1, 3):
        assert_near(exported.call(X[:size]), call(X[:size]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse", "hierarchical"])
def test_training_step_as_a_gpu_runs_it_has_no_loop(name):
    """Under `vmap`, where a CPU too takes blocks all at once, as a GPU does."""
    layer, variables = LAYERS[name], variables_of(name)

    def loss(params, x):
        given = {**variables, "params": params}
        (y, _, aux), state = layer.apply(given, x, True, mutable=["routing"])
        return jnp.sum(y**2) + aux["total_aux"], state

    step = jax.jit(jax.vmap(jax.grad(loss, has_aux=True), (None, 0)))
    text = step.lower(variables["params"], X[None]).compile().as_text()
    assert while_loops(text) == 0


# Boxes, initializers, frozen variables ---------------------------------------------------------------------------------


def boxed_layer(**how):
    init = nn.initializers.lecun_normal()
    names = ("tile", "embed", "mlp")
    return SparseTriXFFN(
        D,
        up_init=nn.with_partitioning(init, names),
        down_init=nn.with_logical_partitioning(init, names),
        **how,
    )


@pytest.mark.slow
def test_boxes_go_through_init_apply_freeze_and_gradients():
    layer = boxed_layer()
    boxed = jax.jit(layer.init)(jax.random.key(1), X)
    up = boxed["params"]["tiles"]["up"]["kernel"]
    assert up.names == ("tile", "embed", "mlp")
    assert up.value.shape == (4, D, D)
    plain = nn.unbox(boxed)
    call = jax.jit(lambda v: layer.apply(v, X)[0])
    np.testing.assert_array_equal(call(boxed), call(plain))
    frozen, expected = freeze(layer, boxed, X), freeze(layer, plain, X)
    jax.tree.map(np.testing.assert_array_equal, nn.unbox(frozen), expected)
    np.testing.assert_array_equal(call(frozen), call(expected))

    def loss(variables):
        return jnp.sum(layer.apply(variables, X)[0] ** 2)

    gradient = jax.jit(jax.grad(lambda p: loss({**boxed, "params": p})))(
        boxed["params"]
    )
    assert gradient["tiles"]["up"]["kernel"].names == up.names


@pytest.mark.slow
def test_packed_leaves_keep_the_names_of_the_axes_before_the_matrices():
    """What names say of frozen variables holds: sharded by them, outputs stay."""
    layer = boxed_layer()
    boxed = jax.jit(layer.init)(jax.random.key(1), X)
    frozen = freeze(layer, boxed, X)
    for tiles in (frozen["packed"]["tiles"]["up"], frozen["packed"]["tiles"]["down"]):
        for name in ("bits", "scale"):
            assert tiles[name].names == ("tile", None, None)
            assert tiles[name].value.shape[0] == 4
    kind = frozen["packed"]["tiles"]["down"]["bits"]
    assert isinstance(kind, nn.LogicallyPartitioned)
    specs = nn.get_partition_spec(frozen)["packed"]["tiles"]
    assert specs["up"]["bits"] == specs["up"]["scale"] == P("tile", None, None)
    assert specs["signature_sums"] == P()
    mesh = jax.make_mesh((4,), ("tile",), axis_types=(AxisType.Auto,))
    placed = jax.device_put(nn.unbox(frozen), nn.get_sharding(frozen, mesh))
    bits = placed["packed"]["tiles"]["up"]["bits"]
    assert {shard.data.shape[0] for shard in bits.addressable_shards} == {1}
    call = jax.jit(lambda v: layer.apply(v, X)[0])
    assert_near(call(placed), call(frozen))


@pytest.mark.slow
def test_packed_leaves_of_a_stack_of_layers_keep_its_name_under_scan():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + boxed_layer(name="ffn")(x)[0], None

    axes = {"params": 0, "routing": 0, "packed": 0}
    stack = nn.scan(
        Step,
        variable_axes=axes,
        split_rngs={"params": True},
        length=2,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    boxed = jax.jit(stack.init)(jax.random.key(1), X, None)
    frozen = freeze(stack, boxed, X, None)
    bits = frozen["packed"]["ffn"]["tiles"]["up"]["bits"]
    assert bits.names == ("layers", "tile", None, None)
    call = jax.jit(lambda v: stack.apply(v, X, None)[0])
    assert_near(call(frozen), call(nn.unbox(boxed)))


def test_box_around_what_is_not_packed_stays():
    variables = variables_of("hierarchical")
    box = nn.Partitioned(variables["params"]["norm"]["scale"], ("embed",))
    params = {**variables["params"], "norm": {"scale": box}}
    frozen = freeze(LAYERS["hierarchical"], {**variables, "params": params}, X)
    assert frozen["params"]["norm"]["scale"].names == ("embed",)


@pytest.mark.parametrize(
    ("init", "scale"),
    [
        (nn.initializers.lecun_normal(), 1.0),
        pytest.param(nn.initializers.xavier_uniform(), 4 / 3, marks=pytest.mark.slow),
    ],
)
def test_stock_initializer_sees_the_matrix_of_one_tile(init, scale):
    layer = SparseTriXFFN(64, num_tiles=16, expansion=8, up_init=init)
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 64)))
    up = np.asarray(variables["params"]["tiles"]["up"]["kernel"])
    assert up.shape == (16, 64, 32)
    # The variance is 1 / 64, or 2 / (64 + 32); of 32,768 numbers within 5 %.
    np.testing.assert_allclose(up.std() * 8, scale**0.5, rtol=0.05)
    assert np.unique(up).size > 30_000  # no tile has another's numbers
    one = init(jax.random.split(jax.random.key(3), 2)[1], (64, 32), jnp.float32)
    kernel = nn_kernel(init)(jax.random.key(3), (2, 64, 32))
    np.testing.assert_array_equal(kernel[1], one)


def nn_kernel(init):
    from trix_jax.nn.kernel import per_tile

    return per_tile(init)


@most_layers
def test_freeze_needs_shapes_only_and_keeps_a_frozen_dict(name):
    layer, variables = LAYERS[name], variables_of(name)
    expected = freeze(layer, variables, X)
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    frozen = freeze(layer, FrozenDict(variables), shape)
    assert isinstance(frozen, FrozenDict)
    jax.tree.map(np.testing.assert_array_equal, frozen.unfreeze(), expected)


def test_routing_functions_keep_a_frozen_dict():
    state = FrozenDict(variables_of("hierarchical")["routing"])
    for change in (
        routing.update,
        routing.freeze_routing,
        routing.rebuild_clusters,
    ):
        changed = jax.eval_shape(change, state)
        assert isinstance(changed, FrozenDict)
        assert jax.tree.structure(changed) == jax.tree.structure(state)


def test_freeze_of_what_are_no_variables_says_so():
    layer, variables = LAYERS["sparse"], variables_of("sparse")
    with pytest.raises(ValueError, match=r"must hold 'params'.* Got \['tiles'\]"):
        freeze(layer, variables["params"], X)


class Stack(nn.Module):
    """Two layers under `nn.scan`."""

    axes: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + SparseTriXFFN(D, name="ffn")(x)[0], None

        axes = dict.fromkeys(self.axes, 0)
        scan = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=2)
        return scan(name="steps")(x, None)[0]


@pytest.mark.slow
def test_frozen_variables_under_scan_need_their_axis_and_the_message_says_which():
    model = Stack(("params", "routing", "packed"))
    variables = jax.jit(model.init)(jax.random.key(0), X)
    frozen = freeze(model, variables, X)
    call = jax.jit(model.apply)
    np.testing.assert_array_equal(call(frozen, X), call(variables, X))
    with pytest.raises(ValueError, match=r"variable_axes=\{.*'packed': 0\}"):
        trace(Stack(("params", "routing")), frozen, X)


# Misuse ----------------------------------------------------------------------------------------------------------------


def trace(layer, variables, *args, **how):
    """A call whose shapes alone are computed: what is said, is said as it is traced."""
    return jax.eval_shape(lambda v: layer.apply(v, *args, **how), variables)


def train(name, variables, x=X, **how):
    return trace(LAYERS[name], variables, x, True, **how)


def test_training_and_evaluation_without_the_collection_are_refused():
    for name in ("sparse", "hierarchical", "lookup", "block"):
        params = {"params": variables_of(name)["params"]}
        with pytest.raises(ValueError, match=r"collection 'routing'.*Write apply\("):
            train(name, params, mutable=["routing"])
        with pytest.raises(ValueError, match=r"collection 'routing'.*Write apply\("):
            trace(LAYERS[name], params, X)


@pytest.mark.parametrize("name", ["sparse", "hierarchical", "lookup", "block"])
def test_training_without_mutable_warns_and_with_it_does_not(name):
    with pytest.warns(UserWarning, match=r"mutable=\['routing'\].*routing\.update"):
        train(name, variables_of(name))
    train(name, variables_of(name), mutable=["routing"])


SCHEDULES = [
    TernaryConfig(mode="progressive"),
    TernaryConfig(full_precision_fraction=0.5),
]


@pytest.mark.parametrize("config", SCHEDULES)
def test_schedule_without_progress_is_refused_in_training_alone(config):
    layer, variables = LAYERS["sparse"].clone(ternary=config), variables_of("sparse")
    with pytest.raises(ValueError, match="Write progress=step / steps"):
        trace(layer, variables, X, True, mutable=["routing"])
    trace(layer, variables, X, True, progress=0.1, mutable=["routing"])
    pair = jax.jit(lambda v: [m.apply(v, X)[0] for m in (layer, LAYERS["sparse"])])
    np.testing.assert_array_equal(*pair(variables))  # evaluation is at the end
    linear = LAYERS["linear"].clone(ternary=config)
    with pytest.warns(UserWarning, match="progress=step / steps"):
        trace(linear, variables_of("linear"), X)


def test_progress_that_is_no_share_is_refused():
    with pytest.raises(ValueError, match=r"progress .* 0 to 1.* Got 500"):
        trace(LAYERS["sparse"], variables_of("sparse"), X, progress=500.0)


def test_router_input_ids_and_mask_of_another_shape_are_refused():
    swapped = jnp.swapaxes(X, 0, 1)
    for name in ("sparse", "hierarchical", "lookup", "block"):
        call = functools.partial(trace, LAYERS[name], variables_of(name), X)
        with pytest.raises(ValueError, match=r"\[4, 6, 16\].* Got \[6, 4, 16\]"):
            call(router_input=swapped)
        with pytest.raises(ValueError, match=r"token_ids .*\[4, 6\].* Got \[6, 4\]"):
            call(token_ids=jnp.zeros((6, 4), int))
        with pytest.raises(ValueError, match=r"mask .*\[4, 6\].* Got \[6, 4\]"):
            call(mask=jnp.ones((6, 4), bool))
        with pytest.raises(ValueError, match=r"write mask != 0\. Got int32"):
            call(mask=jnp.ones((4, 6), jnp.int32))


@pytest.mark.slow
def test_state_of_a_vmapped_call_is_refused_and_reduces_inside():
    layer, variables = LAYERS["sparse"], variables_of("sparse")

    def one(x):
        _, new = layer.apply(variables, x, True, mutable=["routing"])
        return new["routing"]

    wrong = jax.jit(jax.vmap(one))(X)
    with pytest.raises(ValueError, match=r"Got \[4, 4\].*routing\.reduce\(state"):
        trace(layer, {**variables, "routing": wrong}, X)
    shared = jax.vmap(
        lambda x: routing.reduce(one(x), "batch"), axis_name="batch", out_axes=None
    )
    reduced, whole = jax.jit(lambda x: (shared(x), one(x)))(X)
    assert_near(reduced, whole)

    def again(state, x):
        """A micro-batch more, its examples apart."""

        def own(example):
            given = {**variables, "routing": state}
            _, new = layer.apply(given, example, True, mutable=["routing"])
            return routing.reduce(new["routing"], "batch", since=state)

        return jax.vmap(own, axis_name="batch", out_axes=None)(x)

    twice = jax.jit(again)(reduced, X)["tiles"]["router"]["margins"]
    np.testing.assert_array_equal(twice, 2 * reduced["tiles"]["router"]["margins"])
