"""What is asked: the runs of an experiment, read from its file.

```
DIR/experiment.json           what was asked: every run with its flags
DIR/data/SIZE/                the token store of a size
DIR/runs/SIZE/ARM/seed-N/     a run directory each, with log.txt
DIR/metrics.json              the results
```
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trix_jax.files import read_json, write_json
from trix_jax.lm.config import RunConfig, read_yaml
from trix_jax.lm.data import DataConfig, is_store, prepare
from trix_jax.lm.presets import flat, to_flags
from trix_jax.lm.signals import Signals

NOTES, RESULTS = "experiment.json", "metrics.json"
WORDS = ("title", "question", "label")
KEYS = ("name", "like", *WORDS, "sizes", "arms", "seeds", "arm_seeds", "set", "arm_set")
BY_ARM = ("arm_set", "arm_seeds")
KINDS = {
    "sizes": dict, "arms": list, "seeds": list, "arm_seeds": dict, "set": dict, "arm_set": dict,
}  # fmt: skip
IN_WORDS = {dict: "mapping", list: "list"}
DATA_PATHS = ("--data.path", "--data.val-path")  # a machine's own


class Spec(NamedTuple):
    """A run to be made.

    Attributes:
        setting: the experiment, or the setting of a sweep, that it belongs to.
        size: of an experiment's runs; none in a sweep.
        steps: its last one; 0 where only its flags say.
        flags: of `trix-jax train`, without data and workdir.
        store: where its tokens are; in an experiment's notes relative to them.
        rate: the learning rate, where a schedule chooses it.
        patch: a module and a name: the run's process is `python -m MODULE NAME train`
            in place of `trix-jax train`.
    """

    setting: str
    size: str
    arm: str
    seed: int
    steps: int
    flags: tuple[str, ...]
    store: str
    rate: float | None = None
    patch: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return name_of(self.setting, self.size, self.arm, self.rate, self.seed)


class Experiment(NamedTuple):
    """An experiment's file or notes, read and checked.

    Attributes:
        question, label: what it asks; what its numbers are worth.
        specs: the runs, in the order of the file.
        configs: size and arm to settings; none of notes.
        data: size to its data; none of notes.
    """

    name: str
    title: str
    question: str
    label: str
    specs: list[Spec]
    configs: dict[tuple[str, str], RunConfig]
    data: dict[str, DataConfig]


def name_of(
    setting: str, size: str | None, arm: str, rate: float | None, seed: int
) -> str:
    """The name of a run, and its directory's inside a folder of runs."""
    if size:
        return f"{size}/{arm}/seed-{seed}"
    return f"{setting}/{arm}-lr{rate:g}-seed{seed}"


def command(spec: Spec, folder: Path) -> list[str]:
    """The arguments that make a run: of `trix-jax`, or of the module of its patch."""
    where = ["--data.path", spec.store, "--workdir", str(folder / spec.name)]
    return [*spec.patch[1:], "train", *spec.flags, *where]


def public_command(spec: Spec) -> str:
    """A run's command without this machine's paths."""
    flags = list(spec.flags)
    for at in reversed(range(len(flags))):
        if flags[at] in DATA_PATHS:
            del flags[at : at + 2]
    if flags and not flags[0].startswith("-"):
        flags[0] = _public_path(Path(flags[0]))
    program = ["python", "-m", *spec.patch] if spec.patch else ["trix-jax"]
    store = f"data/{spec.size or spec.setting}"
    return shlex.join([*program, "train", *flags, "--data.path", store])


def read_experiment(
    path: str | Path, parse: Callable[[list[str]], RunConfig]
) -> Experiment:
    """Reads an experiment's file and checks every run's flags.

    A file that is `like` another one has what that has and it does not say itself: of
    `set` by setting, of `arm_set` by arm, of all else by section. An
    arm is one of the preset's, or what `arm_set` makes of one: `{arm: lookup,
    model.grid_size: 1}`. `arm_seeds` gives an arm seeds of its own.

    Args:
        path: YAML.
        parse: flags of `trix-jax train` to settings.

    Raises:
        ValueError: it is no experiment.
    """
    path = Path(path)
    tree = _checked(_with_like(_read(path), path), path)
    every, by_arm = tree.get("set") or {}, tree.get("arm_set") or {}
    seeds_of = tree.get("arm_seeds") or {}
    name = str(tree.get("name") or path.stem)
    words = {key: str(tree.get(key) or "") for key in WORDS}
    words["title"] = words["title"] or name
    experiment = Experiment(name, **words, specs=[], configs={}, data={})
    for size, given in tree["sizes"].items():
        given = {"config": given} if isinstance(given, str) else dict(given)
        if not isinstance(given.get("config"), str):
            got = given.get("config", "none")
            raise ValueError(f"sizes.{size} in {path} must have a config. Got {got}.")
        preset = _find(given.pop("config"), path)
        for arm in map(str, tree["arms"]):
            own = dict(by_arm.get(arm) or {})
            start = str(own.pop("arm", arm))
            more = to_flags(
                _flat("set", every, path)
                | _flat(f"sizes.{size}", given, path)
                | _flat(f"arm_set.{arm}", own, path)
            )
            config = parse([preset, "--arm", start, *more])
            data = experiment.data.setdefault(str(size), config.data)
            if config.data != data:
                raise ValueError(
                    f"the arms of {size} in {path} must share their data. Got other data for {arm}."
                )
            experiment.configs[str(size), arm] = config
            for seed in seeds_of.get(arm, tree["seeds"]):
                flags = (preset, "--arm", start, "--seed", str(seed), *more)
                where = (config.train.steps, flags, _store_of(str(size), data))
                experiment.specs.append(Spec(name, str(size), arm, seed, *where))
    return experiment


def check_name(experiment: Experiment, workdir: Path) -> None:
    """Raises a ValueError if a directory holds another experiment."""
    path = workdir / NOTES
    if path.exists() and (before := read_json(path)["name"]) != experiment.name:
        raise ValueError(
            f"{workdir} holds the experiment {before!r}. Got {experiment.name!r}: use another workdir."
        )


def write_notes(experiment: Experiment, workdir: Path) -> None:
    """Notes what is asked; a directory holds one experiment."""
    check_name(experiment, workdir)
    path = workdir / NOTES
    words = {key: getattr(experiment, key) for key in ("name", *WORDS)}
    write_json(path, words | {"runs": [spec._asdict() for spec in experiment.specs]})


def read_notes(workdir: Path) -> Experiment:
    """What was asked in a directory.

    Raises:
        ValueError: no notes, or others.
    """
    path = workdir / NOTES
    try:
        tree = read_json(path)
        name = tree["name"]
        specs = [_from_notes(name, workdir, run) for run in tree["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not describe an experiment ({error})."
        ) from error
    words = {key: tree.get(key) or "" for key in WORDS}
    return Experiment(name, **words, specs=specs, configs={}, data={})


def prepare_data(
    experiment: Experiment,
    sizes: Iterable[str],
    workdir: Path,
    report: Callable[[str], None],
) -> None:
    """Prepares what is no token store yet, in the experiment's directory."""
    for size in sorted(sizes):
        data, place = experiment.data[size], workdir / "data" / size
        if data.path and is_store(data.path):
            continue
        state = f"while preparing {place}; nothing was written there"
        with Signals() as signals, signals.at_once(state):
            prepare(data, place, report)


def _read(path: Path) -> dict[str, Any]:
    """A file's tree, each of its parts of the kind that it must be.

    Raises:
        ValueError: one is of another.
    """
    tree = read_yaml(path)
    for key, kind in KINDS.items():
        if not isinstance(given := tree.get(key), kind | None):
            raise ValueError(
                f"{key} in {path} must be a {IN_WORDS[kind]}. Got {given!r}."
            )
    for key, kinds in (("sizes", str | dict), ("arm_set", dict | None)):
        for name, given in (tree.get(key) or {}).items():
            if not isinstance(given, kinds):
                also = "the path of a config, or " if key == "sizes" else ""
                raise ValueError(
                    f"{key}.{name} in {path} must be {also}a mapping of flags to values. "
                    f"Got {given!r}."
                )
    return tree


def _with_like(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """A file's tree over that of the file beside it that it is like, if any."""
    like = tree.pop("like", None)
    if like is None:
        return tree
    base = _read(path.with_name(str(like)))
    if "like" in base:
        raise ValueError(
            f"like in {path} must name a file without a like of its own. Got {like!r}."
        )
    base.pop("name", None)  # or two experiments would have one
    arms = tree.get("arms") or base.get("arms") or []
    sets = [_flat("set", one.get("set") or {}, path) for one in (base, tree)]
    arms_set = [one.get("arm_set") or {} for one in (base, tree)]
    merged = {"set": sets[0] | sets[1], "arm_set": arms_set[0] | arms_set[1]}
    merged["arm_seeds"] = tree.get("arm_seeds") or base.get("arm_seeds") or {}
    for key in BY_ARM:  # without what the other file says of arms that this one has not
        own = tree.get(key) or {}
        merged[key] = {a: v for a, v in merged[key].items() if a in arms or a in own}
    return {**base, **tree, **merged}


def _flat(where: str, given: dict[str, Any], path: Path) -> dict[str, Any]:
    """Settings by their dotted names, so that an arm's own go over those of all one by one."""
    try:
        return flat(given)
    except ValueError as error:
        raise ValueError(f"{where} in {path} {error}") from None


def _checked(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    if odd := sorted(set(tree) - set(KEYS)):
        raise ValueError(
            f"{odd[0]} in {path} must be one of {', '.join(sorted(KEYS))}."
        )
    for key in ("sizes", "arms", "seeds"):
        if not tree.get(key):
            kind = IN_WORDS[KINDS[key]]
            raise ValueError(f"{key} in {path} must be a {kind} with entries.")
    for key in BY_ARM:
        if odd := sorted(set(tree.get(key) or {}) - {*map(str, tree["arms"])}):
            raise ValueError(f"{key} in {path} must name arms. Got {odd[0]!r}.")
    for where, given in _settings_of(tree):
        own = {"seed": "seeds or arm_seeds"}
        own |= {} if where.startswith("arm_set") else {"arm": "arms"}
        for name in own.keys() & given.keys():
            raise ValueError(
                f"{where}.{name} in {path} must be left out: {own[name]} says what runs."
            )
    seeds = {f"arm_seeds.{a}": v for a, v in (tree.get("arm_seeds") or {}).items()}
    seeds["seeds"] = tree["seeds"]
    for key, given in {"arms": tree["arms"], **seeds}.items():
        is_list = isinstance(given, list) and given
        if not is_list or len({*map(str, given)}) < len(given):
            raise ValueError(
                f"{key} in {path} must be a list of different entries. Got {given!r}."
            )
    for key, given in seeds.items():
        if not all(type(seed) is int and 0 <= seed < 2**32 for seed in given):
            raise ValueError(
                f"{key} in {path} must be whole numbers in 0..2**32 - 1. Got {given!r}."
            )
    return tree


def _settings_of(tree: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where an experiment's file sets flags, and which."""
    yield "set", tree.get("set") or {}
    for key in ("sizes", "arm_set"):
        for name, given in (tree.get(key) or {}).items():
            if isinstance(given, dict):
                yield f"{key}.{name}", given


def _find(config: str, experiment: Path) -> str:
    """A config's path: from here, or from a folder above the experiment's file."""
    for folder in (Path(), *experiment.absolute().parents):
        if (folder / config).is_file():
            return str(folder / config)
    raise ValueError(f"config {config} of {experiment} is not there.")


def _store_of(size: str, data: DataConfig) -> str:
    if data.path and is_store(data.path):
        return str(Path(data.path).absolute())
    return f"data/{size}"


def _from_notes(setting: str, workdir: Path, run: Mapping[str, Any]) -> Spec:
    given: dict[str, Any] = {"setting": setting, **run}
    given |= {key: tuple(given.get(key, ())) for key in ("flags", "patch")}
    given["store"] = str(workdir / given["store"])  # which may be absolute
    return Spec(**given)


def _public_path(path: Path) -> str:
    """`configs/tiny.yaml`, wherever that lies."""
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return "/".join(path.parts[-2:]) if path.is_absolute() else str(path)
