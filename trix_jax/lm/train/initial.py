"""The weights that a new run starts from (`--init-from`): of another run's best step, of
one of its steps, or of an export that keeps real weights.

Parameters and routing state are taken over; optimizer, data order and progress are new.
The run notes where they came from in `init.json`, and never reads the source again.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from trix_jax.files import file_sha256, read_json, write_json
from trix_jax.interop import safetensors
from trix_jax.lm import config as run_config
from trix_jax.lm.checkpoint import arrays, checkpoint
from trix_jax.lm.config import RunConfig, to_tree
from trix_jax.lm.data import Store
from trix_jax.lm.train import exported, provenance
from trix_jax.nn.transformer import TransformerConfig, TransformerLM
from trix_jax.ops import PACKED

RECORD = "init.json"


class Source(NamedTuple):
    """What a run can start from, its arrays not read yet.

    Attributes:
        given: the path as it was given.
        folder: of the export, or the `checkpoints` that the step is in.
        step: of a run; None for an export.
        settings: of the model and, but for an export, of its training.
        tokenizer_sha256: of its `tokenizer.json`.
        sha256: of the step's manifest, which lists the hash of every file, or of
            `model.safetensors`.
    """

    given: str
    folder: Path
    step: int | None
    settings: RunConfig
    tokenizer_sha256: str
    sha256: str

    @property
    def record(self) -> dict[str, Any]:
        """What a run keeps of it."""
        return {"path": self.given, "step": self.step, "sha256": self.sha256}


def find(given: str) -> Source:
    """Looks at a run directory (its best step), a step's folder or an export.

    Raises:
        ValueError: none of these, or damaged.
    """
    path = Path(given).resolve()
    if exported.is_export(path):
        model = exported.read_model_config(path / exported.CONFIG)
        return Source(
            given,
            path,
            None,
            RunConfig(model=model),
            file_sha256(path / exported.TOKENIZER),
            file_sha256(path / exported.WEIGHTS),
        )
    if (path / "leaves.json").is_file() and path.name.isdecimal():
        return _step(given, path.parent, int(path.name))
    if (path / "config.yaml").is_file():
        checkpoints = path / "checkpoints"
        return _step(given, checkpoints, checkpoint.resolve(checkpoints, "best"))
    raise ValueError(
        "init_from must be a run directory, a step's folder in its checkpoints, or an "
        f"export. Got {given}."
    )


def _step(given: str, checkpoints: Path, number: int) -> Source:
    checkpoint.resolve(checkpoints, number)  # refuses a damaged one
    meta = checkpoint.read_meta(checkpoints, number)
    run = checkpoints.parent
    if "settings" in meta:
        settings = run_config.from_tree(provenance.nested(meta["settings"]))
    else:
        settings = run_config.load(run / "config.yaml")
    tokenizer = meta.get("tokenizer_sha256") or file_sha256(run / "tokenizer.json")
    sha256 = checkpoint.fingerprint(checkpoints, number)
    return Source(given, checkpoints, number, settings, tokenizer, sha256)


def weights(
    source: Source,
    config: RunConfig,
    store: Store,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """The collections `"params"` and `"routing"` for a run of `config`, as numpy arrays.

    Settings of the model that differ and yet fit are told.

    Raises:
        ValueError: the source is damaged or an export of packed weights; it has another
            tokenizer, or arrays of other names, shapes or types, which are listed; its
            addresses are held, and the run would hold others, or none.
    """
    _check_tokenizer(source, store)
    found = _read(source)
    _check_held(source, found["routing"], config.model)
    found = _with_places_to_hold(found, config.model)
    check_shapes(source.given, found, config.model)
    what = (
        source.given if source.step is None else f"step {source.step} of {source.given}"
    )
    report(f"starting from the weights of {what}")
    before, now = (to_tree(c)["model"] for c in (source.settings, config))
    flat = provenance.flat
    for line in provenance.changes(flat(before, "model."), flat(now, "model.")):
        report(f"another setting than {source.given}'s: {line}")
    return found


def _read(source: Source) -> dict[str, Any]:
    if source.step is not None:
        names = "params", "routing"
        return checkpoint.restore_arrays(source.folder, source.step, names)
    path = source.folder / exported.WEIGHTS
    found = safetensors.read(path, TransformerLM(source.settings.model))
    if PACKED in found:
        raise ValueError(
            f"{source.given} is an export of packed weights, and training needs the real "
            "ones behind them: give the run that it was made from, or a step in its "
            "checkpoints."
        )
    return {"params": found["params"], "routing": found.get("routing", {})}


def _check_held(
    source: Source, state: dict[str, Any], model: TransformerConfig
) -> None:
    """What is held stays held: another `hold` or `hold_after` would do nothing."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(dict(state))
    is_held = any(np.any(value) for path, value in flat.items() if path[-1] == "held")
    names = "hold_after", "hold"
    before, now = (
        {name: getattr(c.routing, name) for name in names}
        for c in (source.settings.model, model)
    )
    if is_held and before != now:
        was, wanted = (
            ", ".join(f"routing.{k}={v!r}" for k, v in each.items())
            for each in (before, now)
        )
        raise ValueError(
            f"init_from={source.given} has addresses that are held ({was}), and they stay "
            f"so. Got {wanted}. Leave these out, or begin from a step of before: "
            "RUN/checkpoints/STEP."
        )


def _with_places_to_hold(
    found: dict[str, Any], model: TransformerConfig
) -> dict[str, Any]:
    """The state with what a model that holds addresses keeps besides, nothing held yet,
    where the source is of one that does not.
    """
    if not model.routing.holds:
        return found
    flat: dict[tuple[str, ...], Any] = flatten_dict(dict(found["routing"]))
    rows = found["params"]["embed"]["embedding"]
    for path in flatten_dict(_shapes_of(model)["routing"]):
        if path[-1] == "held":
            flat.setdefault(path, np.zeros((), bool))
        elif path[-1] == "rows":
            flat.setdefault(path, rows)
    return {**found, "routing": unflatten_dict(flat)}


def _check_tokenizer(source: Source, store: Store) -> None:
    own = store.manifest["files"]["tokenizer.json"]["sha256"]
    if own != source.tokenizer_sha256:
        raise ValueError(
            f"{store.directory} must have the tokenizer of {source.given}, since a row of "
            "the embedding belongs to a token: its sha256 must be "
            f"{source.tokenizer_sha256[:12]}. Got {own[:12]}. Prepare the text with the "
            "source's tokenizer.json (--data.tokenizer), in another workdir than one that "
            "has such a store."
        )


def check_shapes(given: str, found: dict[str, Any], model: TransformerConfig) -> None:
    """Raises a ValueError that lists the leaves unless the arrays have the names, shapes
    and types of a model's.
    """
    if lines := arrays.difference(_described(_shapes_of(model)), _described(found)):
        listed = "\n  ".join(lines)
        raise ValueError(f"{given} does not fit the model of this run:\n  {listed}")


def _shapes_of(model: TransformerConfig) -> dict[str, Any]:
    """What a model's parameters and routing state look like."""
    tokens = jnp.zeros((1, model.context), jnp.int32)
    init = TransformerLM(model).init
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), tokens))
    return {name: shapes.get(name, {}) for name in ("params", "routing")}


def _described(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {arrays.name_of(key): arrays.describe(leaf) for key, leaf in leaves}


def read_record(workdir: Path) -> dict[str, Any] | None:
    """What a run notes of where its weights came from; None for one that began anew."""
    path = workdir / RECORD
    return read_json(path) if path.is_file() else None


def write_record(workdir: Path, source: Source) -> None:
    """Notes where a run's weights come from."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / RECORD, source.record)


def check_workdir(workdir: Path, given: str | None, step: int | None) -> None:
    """A run begun with `--init-from` goes on with the same command, or without the flag
    once it has a checkpoint; the source need not be there any more.

    Args:
        step: what the run goes on from; None for a new one.

    Raises:
        ValueError: `workdir` holds a run that was not begun from `given`, or one that
            was begun from somewhere, has no checkpoint yet and is not told where.
    """
    record = read_record(workdir)
    if given is None:
        if record and step is None:
            raise ValueError(
                f"{workdir} was begun with --init-from {record['path']} and has no "
                "checkpoint yet: give it again, or use another workdir."
            )
        return
    if (workdir / "config.yaml").exists() and (
        record is None or record["path"] != given
    ):
        begun = f", begun from {record['path']}" if record else ""
        raise ValueError(
            f"--init-from starts a new run, and {workdir} holds one{begun}: use another "
            "workdir, or leave --init-from out to go on with it."
        )


def defaults(workdir: Path, given: str | None) -> RunConfig | None:
    """Where the settings of a run's model come from unless they are typed: the source
    that it starts from, or what a run begun so has; None: no run begun so.
    """
    path = workdir / "config.yaml"
    if read_record(workdir) and path.is_file():
        found = run_config.load(path)
    elif given:
        found = find(given).settings
    else:
        return None
    model = dataclasses.replace(found.model, vocab_size=None, end_token=None)
    return dataclasses.replace(found, model=model)
