"""The language model's step, generation and evaluation, TriX beside its dense twins."""

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed.gpu.layer import ACTIVATION, ACTIVE, EQUAL, implementations
from experiments.speed.gpu.shapes import Shapes
from experiments.speed.gpu.timing import Row, summary
from trix_jax import freeze
from trix_jax.lm.config import TrainConfig
from trix_jax.lm.data.store import Split, Store
from trix_jax.lm.serve.generate import SamplingConfig, generate_batch
from trix_jax.lm.train import parallel
from trix_jax.lm.train.evaluate import evaluate
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.step import init_state, make_train_step
from trix_jax.nn.transformer import TransformerConfig, TransformerLM

WAYS = ("trix", EQUAL, ACTIVE)
REFERENCE = "trix, xla"  # whose losses the others' are compared with
BFLOAT16 = 2.0**-8  # relative distance of neighbours: how far two losses may be apart
NORMS = 0.02  # and two norms of gradients, which tell a wrong backward pass sooner


def configs(shapes: Shapes, tiles: int) -> dict[str, TransformerConfig]:
    """TriX of N tiles in each implementation, and its dense twins."""
    width = tiles * shapes.tile_width
    dense = TransformerConfig(
        vocab_size=shapes.vocabulary,
        context=shapes.context,
        d_model=shapes.width,
        n_layers=shapes.layers,
        n_heads=shapes.heads,
        ffn="dense",
        ffn_width=width,
        activation=ACTIVATION,
        dtype="bfloat16",
    )
    trix: dict[str, Any] = {
        "ffn": "sparse",
        "ffn_width": None,
        "num_tiles": tiles,
        "expansion": width // shapes.width,
        "tiles_per_token": shapes.per_token,
    }
    active = shapes.per_token * shapes.tile_width
    ours = {
        f"trix{name}": dataclasses.replace(dense, **trix, **how)
        for name, how in implementations().items()
    }
    twins = {EQUAL: dense, ACTIVE: dataclasses.replace(dense, ffn_width=active)}
    return ours | twins


class Stepper:
    """A model that trains on random tokens, a step a call."""

    def __init__(self, config: TransformerConfig, sequences: int):
        train = TrainConfig(steps=1000, batch_size=sequences)
        model, devices = TransformerLM(config), jax.devices()[:1]
        optimizer = make_optimizer(train)
        state = parallel.place(init_state(model, optimizer, 0), devices, "jit")
        make = partial(make_train_step, model, optimizer, train)
        shape, most = (1, sequences, config.context + 1), config.vocab_size
        self.batch = np.random.default_rng(0).integers(0, most, shape, np.int32)
        step: Any = parallel.compile_step(make, devices, "jit")
        self.compiled = step.lower(state, self.batch).compile()
        self.state, self.loss, self.norm = state, float("nan"), float("nan")

    def __call__(self) -> float:
        """Seconds of a step."""
        began = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        self.loss, self.norm = float(metrics.loss), float(metrics.grad_norm)
        return time.perf_counter() - began

    def step_loss(self) -> float:
        """The loss of a step."""
        self()
        return self.loss

    def about(self) -> Row:
        """Parameters, and bytes: of the state, and of all at the peak."""
        held: Any = self.compiled.memory_analysis()
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
            "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self.state)),
            "peak_bytes": held.argument_size_in_bytes + held.temp_size_in_bytes,
            "donated_bytes": held.alias_size_in_bytes,
        }


def step(shapes: Shapes) -> Iterator[Row]:
    """Training steps of all models in turn."""
    kept: dict[TransformerConfig, Stepper] = {}
    for tiles in shapes.tiles:
        every = configs(shapes, tiles)
        steppers = {
            name: kept.get(every[name]) or Stepper(every[name], shapes.sequences)
            for name in WAYS
        }
        # The dense twin of equal compute is the same for all.
        kept = {every[ACTIVE]: steppers[ACTIVE]}
        yield from _steps(shapes, tiles, steppers)


def _steps(shapes: Shapes, tiles: int, steppers: dict[str, Stepper]) -> Iterator[Row]:
    for stepper in steppers.values():
        stepper()
    taken: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(shapes.rounds):
        for name, stepper in steppers.items():
            taken[name].append(1e6 * stepper())
    tokens = shapes.sequences * shapes.context
    for name, stepper in steppers.items():
        row: Row = {"tiles": tiles, "way": name, **summary(taken[name])}
        row["tokens_per_second"] = round(1e6 * tokens / row["us"])
        row |= stepper.about() | {"loss": stepper.loss}
        yield {"name": f"step, {tiles} tiles: {name}", **row}


def losses(shapes: Shapes) -> Iterator[Row]:
    """Losses, and norms of gradients, of a model of two layers on the kernels, beside
    XLA's path.
    """
    small = shapes._replace(layers=min(shapes.layers, 2))
    for tiles in shapes.tiles:
        found: dict[str, list[float]] = {}
        norms: dict[str, list[float]] = {}
        for name, config in configs(small, tiles).items():
            if name.startswith("trix"):
                stepper = Stepper(config, shapes.sequences)
                found[name], norms[name] = [], []
                for _ in range(shapes.trains_for):
                    found[name].append(stepper.step_loss())
                    norms[name].append(stepper.norm)
        for name, ours in found.items():
            row = {"tiles": tiles, "way": name, "losses": ours, "norms": norms[name]}
            far = compared(norms[name], norms[REFERENCE], NORMS, "norms")
            row |= {"norms_apart": far.pop("apart")} | far
            row |= compared(ours, found[REFERENCE], BFLOAT16, "losses")
            yield {"name": f"losses, {tiles} tiles: {name}", **row}


def compared(ours: list[float], reference: list[float], most: float, what: str) -> Row:
    """How far two lists are apart, `max_i |ours_i - reference_i| / |reference_i|`, and
    `failed` where that is above `most` or any number is not finite.
    """
    a, b = np.array(ours), np.array(reference)
    if not np.isfinite(b).all():
        return {"apart": None, "failed": f"{REFERENCE}: {what} are not finite"}
    if not np.isfinite(a).all():
        return {"apart": None, "failed": f"{what} are not finite"}
    far = float(np.max(np.abs(a - b) / np.abs(b)))
    failed = {"failed": f"{what} {far:.2g} apart"} if not far <= most else {}
    return {"apart": far, **failed}


def served(config: TransformerConfig) -> tuple[TransformerLM, Any]:
    """A model as it is served: bfloat16 weights, two bits each where they are ternary."""
    model = TransformerLM(config.on_any_device())
    tokens = jnp.zeros((1, 8), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    if config.ffn != "dense":
        variables = freeze(model, variables, tokens)

    def narrow(leaf):
        return leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf

    kept = {name: tree for name, tree in variables.items() if name != "params"}
    return model, {**kept, "params": jax.tree.map(narrow, variables["params"])}


def generation(shapes: Shapes) -> Iterator[Row]:
    """Greedy tokens a second after a prompt, of the most tiles."""
    tiles = shapes.tiles[-1]
    ways = {
        name: served(config)
        for name, config in configs(shapes, tiles).items()
        if name in WAYS
    }
    for batch in shapes.batches:
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for run in range(shapes.rounds + 1):
            for name, (model, variables) in ways.items():
                seconds = _generate(model, variables, batch, shapes)
                if run:  # the first one compiles
                    taken[name].append(1e6 * seconds)
        for name, (_, variables) in ways.items():
            row: Row = {
                "tiles": tiles,
                "way": name,
                "batch": batch,
                **summary(taken[name]),
            }
            row["tokens_per_second"] = round(
                1e6 * batch * shapes.new_tokens / row["us"]
            )
            row["served_bytes"] = sum(
                leaf.nbytes for leaf in jax.tree.leaves(variables)
            )
            yield {"name": f"generation, batch {batch}: {name}", **row}


def _generate(model: Any, variables: Any, batch: int, shapes: Shapes) -> float:
    """Seconds that a batch takes."""
    rng, most = np.random.default_rng(0), shapes.vocabulary
    prompts = rng.integers(0, most, (batch, shapes.prompt), np.int32)
    config, began = SamplingConfig(temperature=0.0), time.perf_counter()
    generate_batch(model, variables, list(prompts), shapes.new_tokens, config)
    return time.perf_counter() - began


def evaluation(shapes: Shapes) -> Iterator[Row]:
    """Tokens a second of an evaluation on random tokens, of the most tiles."""
    length = shapes.evaluated * shapes.context + 1
    tokens = np.random.default_rng(0).integers(0, shapes.vocabulary, length, np.uint16)
    store = store_of(tokens)
    tiles = shapes.tiles[-1]
    for name, config in configs(shapes, tiles).items():
        if name not in WAYS:
            continue
        model, taken = TransformerLM(config), []
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
        for _ in range(3):  # the first one compiles
            began = time.perf_counter()
            found = evaluate(model, variables, store, shapes.sequences)
            taken.append(1e6 * (time.perf_counter() - began))
        row: Row = {"tiles": tiles, "way": name, **summary(taken[1:])}
        row["tokens_per_second"] = round(1e6 * found.tokens / row["us"])
        row["val_loss"] = found.val_loss
        yield {"name": f"evaluation, {tiles} tiles: {name}", **row}


def store_of(tokens: np.ndarray) -> Store:
    """Tokens as a store's validation split, of a text that nobody has."""
    split, missing = Split([tokens]), {"tokens": len(tokens), "bytes": None}
    tokenizer: Any = None
    return Store(Path(), split, split, tokenizer, {"splits": {"val": missing}})
