"""A run's config: dataclasses that presets and flags fill in (`trix_jax.lm.presets`),
and the file that a run keeps of it.
"""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from trix_jax.files import json_sha256
from trix_jax.lm.data import DataConfig, Sampler
from trix_jax.nn.transformer import TransformerConfig

DEFAULT_ARM = "hierarchical"  # of no preset: the defaults of `TransformerConfig`
BASE_ARM = "base"  # a preset as it stands

Schedule = Literal["cosine", "constant", "wsd"]
OptimizerKind = Literal["adamw", "muon"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences in a step, over all devices and accumulated micro-batches.
        accumulate: micro-batches a step is cut into.
        schedule: of the rate after its linear warm-up. "cosine" falls from there to the
            last step; "constant" stays; "wsd" (warm-up, stable, decay) stays, then
            falls linearly over the last `decay_share` of the steps. A run of the last
            two can be given more steps later (`trix_jax.lm.train.extend`).
        learning_rate: peak rate, reached after `warmup_steps` (clipped to `steps`).
        ffn_rate_factor: times the rate, for the projections of FFNs, ternary or dense;
            everything else has the rate itself.
        final_learning_rate: share of the peak rate that "cosine" and "wsd" end at.
        warmup_steps: linear warm-up.
        decay_share: of the steps, over which the rate of "wsd" falls; never of the
            warm-up.
        weight_decay: AdamW's and Muon's, on matrices only: never on norms, scales,
            embeddings, splines or the directions of a lookup with shared reads.
        decay_until: share of the run after which no weight is decayed.
        optimizer: "muon" updates the projections of FFNs, ternary or dense, by their
            orthogonalized momentum (a tile is a matrix), everything else by AdamW.
        beta1, beta2: AdamW's, below 1.
        clip: largest global gradient norm; 0 does not clip.
        balance_rate: share of the way that selection biases go towards even loads in a
            step (`routing.update`).
        rebuild_every: steps between rebuilds of the clusters, before the step that
            follows; 0 never.
        eval_every: steps between evaluations on the validation split; each checkpoints.
            The last step always is.
        eval_epochs: evaluates at the end of every epoch too.
        checkpoint_every: further checkpoints, without an evaluation; 0 none.
        eval_batch_size: sequences in an evaluation batch.
        eval_tokens: of the validation split that evaluations predict, the first, rounded
            up to whole windows; 0 all.
        log_every: steps between lines of metrics.jsonl.
        max_skipped: steps in a row that may be skipped because loss or gradient is not
            finite; one more stops the run.
        sampler: "epochs" takes every token as a target once an epoch, "offsets" windows
            at random, as runs did before this setting. None: epochs, or what the run
            that goes on has.
    """

    steps: int = 2000
    batch_size: int = 12
    accumulate: int = 1
    schedule: Schedule = "cosine"
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.1
    warmup_steps: int = 100
    decay_share: float = 0.2
    weight_decay: float = 0.1
    decay_until: float = 1.0
    optimizer: OptimizerKind = "adamw"
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 1.0
    balance_rate: float = 0.5
    rebuild_every: int = 500
    eval_every: int = 500
    eval_epochs: bool = False
    checkpoint_every: int = 0
    eval_batch_size: int = 64
    eval_tokens: int = 0
    log_every: int = 1
    max_skipped: int = 10
    sampler: Sampler | None = None
    ffn_rate_factor: float = 1.0

    def __post_init__(self):
        for name in AT_LEAST_ONE:
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1. Got {value}.")
        for name in NOT_NEGATIVE:
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise ValueError(
                    f"{name} must not be negative, and must be finite. Got {value}."
                )
        for name in SHARES:
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be in 0..1. Got {value}.")
        for name in ("beta1", "beta2"):  # of 1 the correction of the bias divides by 0
            if not 0 <= (value := getattr(self, name)) < 1 or np.float32(value) == 1:
                raise ValueError(
                    f"{name} must be at least 0 and below 1, also in float32. Got {value}."
                )
        for name in ("learning_rate", "ffn_rate_factor"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} must be positive and finite. Got {value}.")
        for name, kind in (("optimizer", OptimizerKind), ("schedule", Schedule)):
            if (value := getattr(self, name)) not in typing.get_args(kind):
                raise ValueError(
                    f"{name} must be {' or '.join(typing.get_args(kind))}. Got {value!r}."
                )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} must divide batch_size={self.batch_size}."
            )


AT_LEAST_ONE = (
    "steps batch_size accumulate eval_every eval_batch_size log_every".split()
)
NOT_NEGATIVE = (
    "warmup_steps weight_decay clip rebuild_every checkpoint_every max_skipped "
    "eval_tokens"
).split()
# Of runs whose config does not name theirs.
SAMPLER_BEFORE = "offsets"
ROUTER_INPUT_BEFORE = "hidden"
SHARES = "decay_share decay_until final_learning_rate balance_rate".split()


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers.

    Attributes:
        seed: of initialization, data order and dropout.
        arm: the name of the override the config was made with.
    """

    seed: int = 42
    arm: str = DEFAULT_ARM
    model: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0..2**32 - 1. Got {self.seed}.")


class _Loader(yaml.SafeLoader):
    """Without aliases: a page of them can stand for more text than there is memory.
    Without a key given twice, of which the first would be lost. And keys are text: to
    YAML an unquoted 64 is a number, and `on` is true. Numbers are decimal: to YAML 1.1
    010 is 8 and 1:30 is 90.
    """

    def construct_mapping(self, node, deep=False):
        seen = set()
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        for key, _ in pairs:
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(
                    None, None, f"keys are text: quote {key.value!r}", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"it has {key.value} twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node):
        text = node.value.lstrip("+-")
        is_octal = text[:1] == "0" and text.strip("0_")[:1].isdecimal()
        self._check_decimal(node, text and not is_octal)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node):
        self._check_decimal(node, node.value)
        return super().construct_yaml_float(node)

    def _check_decimal(self, node, is_decimal):
        if not is_decimal or ":" in node.value:
            raise yaml.constructor.ConstructorError(
                None, None, f"quote {node.value!r} or write it decimal", node.start_mark
            )

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "it has an alias", mark)
        return super().compose_node(parent, index)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a preset or a resolved config.

    Raises:
        ValueError: no such file, or it is not a YAML mapping of text keys; the message
            names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}.") from error
    # A date that is none is a ValueError; nesting is as deep as the file says.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(
            f"config {path} is not YAML: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(tree, dict):
        raise ValueError(
            f"config {path} must be a mapping of names to values. Got {type(tree).__name__}."
        )
    return tree


def resolve(
    config: RunConfig,
    vocab_size: int,
    before: RunConfig | None = None,
    end_token: int | None = None,
) -> RunConfig:
    """Fills in the vocabulary and the end mark, which depend on the data, and the
    sampler, which depends on whether a run goes on.

    Args:
        before: the config of the run that goes on; None for a new one.
        end_token: the tokenizer's end mark; None if it has none.

    Raises:
        ValueError: `model.vocab_size` or `model.end_token` is given and is not the
            tokenizer's; documents are to be kept apart and nothing marks them; a dense
            width is still to be matched; Muon is to train a model that has nothing for
            it.
    """
    model = config.model
    has_projections = model.ffn == "dense" or model.has_ternary_products
    if config.train.optimizer == "muon" and not has_projections:
        raise ValueError(
            "train.optimizer must be adamw with model.ffn='lookup' and model.reads='shared', "
            "which has no projections for muon. Got 'muon'."
        )
    if config.train.ffn_rate_factor != 1 and not has_projections:
        raise ValueError(
            "train.ffn_rate_factor must be 1 with model.ffn='lookup' and model.reads='shared', "
            f"which has no projections. Got {config.train.ffn_rate_factor}."
        )
    if isinstance(model.ffn_width, str):
        raise ValueError(
            f"model.ffn_width={model.ffn_width!r} must be a number by now: "
            "trix_jax.lm.presets.match_width finds it."
        )
    if model.vocab_size not in (None, vocab_size):
        raise ValueError(
            f"model.vocab_size={model.vocab_size} must be the tokenizer's {vocab_size}, or left out."
        )
    end = _end_token(model, end_token)
    model = dataclasses.replace(model, vocab_size=vocab_size, end_token=end)
    own = before.train.sampler if before else None
    sampler = config.train.sampler or own or "epochs"
    train = dataclasses.replace(config.train, sampler=sampler)
    return dataclasses.replace(config, model=model, train=train)


def _end_token(model: TransformerConfig, end_token: int | None) -> int | None:
    """The mark that opens documents, where the model keeps them apart."""
    if model.end_token not in (None, end_token):
        raise ValueError(
            f"model.end_token={model.end_token} must be the tokenizer's {end_token}, or left out."
        )
    if model.document_mask and end_token is None:
        raise ValueError(
            "model.document_mask needs a tokenizer with an end mark: byte, bpe, a file of your "
            "own, or char over several documents. This one has none; give "
            "--data.end-of-text, or --model.no-document-mask."
        )
    return end_token if model.document_mask else None


def to_tree(config: RunConfig) -> dict[str, Any]:
    """A config as nested plain values."""
    return dataclasses.asdict(config)


def from_tree(tree: dict[str, Any]) -> RunConfig:
    """The inverse of `to_tree`, for a config that this program wrote: what one does not
    name is as it was in its time.

    Raises:
        ValueError: unknown or missing names, or values of another type.
    """
    if isinstance(train := tree.get("train"), dict):
        tree = tree | {"train": {"sampler": SAMPLER_BEFORE} | train}
    if isinstance(model := tree.get("model"), dict):
        tree = tree | {"model": _as_it_was(model)}
    return _build(RunConfig, tree, "")


def model_from_tree(tree: dict[str, Any]) -> TransformerConfig:
    """A model's config from nested plain values.

    Raises:
        ValueError: unknown or missing names, or values of another type.
    """
    return _build(TransformerConfig, _as_it_was(tree), "model.")


def _as_it_was(model: dict[str, Any]) -> dict[str, Any]:
    """Signatures of before `router_input` met the hidden state. A lookup of before
    `reads` chose among one cluster, whatever its config says.
    """
    if model.get("ffn") != "dense":
        model = {"router_input": ROUTER_INPUT_BEFORE} | model
    if model.get("ffn") == "lookup" and "reads" not in model:
        return model | {"top_k_clusters": 1}
    return model


def load(path: str | Path) -> RunConfig:
    """Reads a resolved config that this program wrote.

    Raises:
        ValueError: no such file, or it is not such a config; the message names it.
    """
    tree = read_yaml(path)
    try:
        config = from_tree(tree)
    except ValueError as error:
        raise ValueError(f"config {path} cannot be used: {error}") from error
    for field in dataclasses.fields(RunConfig):
        if field.name not in tree:
            raise ValueError(f"config {path} lacks {field.name}: it may be cut off.")
    return config


def fingerprint(config: RunConfig) -> str:
    """sha256 of the config."""
    return json_sha256(to_tree(config))


def _build(kind, tree, prefix):
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix or 'config'} must be a mapping. Got {tree!r}.")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(tree) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise ValueError(
            f"{prefix}{unknown[0]} is not a setting that this version knows."
        )
    values = {}
    for name, value in tree.items():
        hint = hints[name]
        values[name] = (
            _build(hint, value, f"{prefix}{name}.")
            if dataclasses.is_dataclass(hint)
            else value
        )
        if not dataclasses.is_dataclass(hint) and not _fits(value, hint):
            raise ValueError(f"{prefix}{name} must be {hint}. Got {value!r}.")
    return kind(**values)


def _fits(value, hint) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
