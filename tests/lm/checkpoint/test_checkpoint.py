import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.checkpoint.checkpoint import CheckpointError


class State(NamedTuple):
    params: dict[str, Any]
    optimizer: Any
    routing: dict[str, Any]
    rng: Any
    step: Any
    extra: Any


def make_state(fill: float = 1.0) -> State:
    params = {
        "dense": {"kernel": jnp.full((3, 4), fill), "bias": jnp.zeros((0, 4))},
        "scale": jnp.full(5, fill, jnp.bfloat16),
        "bits": np.arange(7, dtype=np.uint8),
    }
    return State(
        params=params,
        optimizer=optax.adamw(1e-3).init(params["dense"]),
        routing={"layer_0": {"bias": jnp.array([-0.0, jnp.nan, jnp.inf])}},
        rng={
            "fry": jax.random.key(42),
            "rbg": jax.random.split(jax.random.key(1, impl="rbg")),
        },
        step=7,
        extra=(
            None,
            (),
            {},
            True,
            1e300,
            np.float64(0.1),
            np.array(2**63 - 1),
            np.int32(5),
        ),
    )


def as_bytes(leaf: Any) -> tuple:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), *as_bytes(jax.random.key_data(leaf))
    return (
        type(leaf),
        str(np.asarray(leaf).dtype),
        np.shape(leaf),
        np.asarray(leaf).tobytes(),
    )


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert as_bytes(a) == as_bytes(b)


def save_small(directory: Path, step: int, *, keep: int = 2, **meta: Any) -> Path:
    return checkpoint.save(directory, step, {"w": np.full(50, step)}, meta, keep=keep)


def run_python(
    code: str, *args: object, env: dict[str, str], **kwargs: Any
) -> subprocess.Popen:
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        textwrap.dedent(code),
        *map(str, args),
    ]
    return subprocess.Popen(command, env=env, text=True, **kwargs)


def contents(directory: Path) -> dict[str, tuple]:
    return {
        str(p.relative_to(directory)): (
            p.stat().st_mtime_ns,
            p.is_file() and p.read_bytes(),
        )
        for p in directory.rglob("*")
    }


# Round trip.


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    state = make_state()
    meta = {"val_loss": 1.5, "position": {"epoch": 1}, "note": "é", "list": [1, None]}
    path = checkpoint.save(tmp_path, 1000, state, meta)
    assert path == tmp_path / "00001000"
    restored, restored_meta = checkpoint.restore(tmp_path, 1000, state)
    assert_same(restored, state)
    assert restored_meta == meta


def test_a_template_of_shapes_restores_jax_arrays(tmp_path):
    state = {
        "w": jnp.arange(6.0).reshape(2, 3),
        "rng": jax.random.key(3),
        "none": jnp.zeros((0, 2)),
        "keys": jax.random.key(0)[None][:0],
    }
    checkpoint.save(tmp_path, 0, state, {})
    restored, _ = checkpoint.restore(tmp_path, 0, jax.eval_shape(lambda: state))
    assert_same(restored, state)
    assert not restored["w"].committed


def test_arrays_go_where_the_template_says_on_any_number_of_devices(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    everywhere = jax.NamedSharding(mesh, jax.P())
    state = {
        "w": jax.device_put(jnp.arange(16.0), split),
        "rng": jax.device_put(jax.random.key(0), everywhere),
    }
    checkpoint.save(tmp_path, 1, state, {})
    assert checkpoint.restore(tmp_path, 1, state)[0]["w"].sharding == split
    assert checkpoint.restore(tmp_path, 1, state)[0]["rng"].sharding == everywhere
    one = {"w": jnp.zeros(16), "rng": jax.random.key(9)}
    restored, _ = checkpoint.restore(tmp_path, 1, one)
    assert restored["w"].devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(restored["w"], state["w"])


def test_a_relative_directory_is_as_good(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = Path("runs/a/checkpoints")
    assert save_small(directory, 1) == directory / "00000001"
    assert checkpoint.restore(directory, 1, {"w": np.zeros(50, int)})[0]["w"][0] == 1


@pytest.mark.slow
def test_another_process_restores(tmp_path, user_env):
    state = {"params": {"w": jnp.arange(5.0)}, "rng": jax.random.key(3)}
    checkpoint.save(tmp_path, 1, state, {})
    code = """
        import sys, pathlib, jax
        from trix_jax.lm.checkpoint import checkpoint
        assert "orbax" not in sys.modules
        template = {"params": {"w": jax.ShapeDtypeStruct((5,), "float32")}, "rng": jax.random.key(0)}
        state, _ = checkpoint.restore(pathlib.Path(sys.argv[1]), 1, template)
        print(state["params"]["w"].tolist(), jax.random.key_data(state["rng"]).tolist(), len(jax.devices()))
    """
    process = run_python(
        code, tmp_path, env=user_env, stdout=-1, stderr=subprocess.STDOUT
    )
    assert process.communicate()[0] == "[0.0, 1.0, 2.0, 3.0, 4.0] [0, 3] 1\n"


def test_a_plain_orbax_call_restores_the_same_arrays(tmp_path):
    from orbax.checkpoint import v1 as ocp

    state = make_state()
    checkpoint.save(tmp_path, 1000, state, {})
    plain: Any = ocp.load(f"{tmp_path}/00001000")
    kernel = plain["params"]["dense"]["kernel"]
    assert as_bytes(kernel) == as_bytes(np.asarray(state.params["dense"]["kernel"]))
    np.testing.assert_array_equal(
        plain["rng"]["fry"], jax.random.key_data(state.rng["fry"])
    )
    assert (
        plain["params"]["dense"]["bias"] is None
    )  # Orbax cannot store a zero-sized array


def test_restore_arrays_needs_no_template(tmp_path):
    state = make_state()
    checkpoint.save(tmp_path, 1, state, {})
    some = checkpoint.restore_arrays(tmp_path, 1, ("params", "routing"))
    assert_same(
        some,
        jax.tree.map(np.asarray, {"params": state.params, "routing": state.routing}),
    )
    everything = checkpoint.restore_arrays(tmp_path, 1)
    assert everything["step"] == 7
    np.testing.assert_array_equal(everything["optimizer"]["0"]["count"], 0)
    assert checkpoint.restore_arrays(tmp_path, 1, ("routing", "absent"))["absent"] == {}
    with pytest.raises(CheckpointError, match=r"none of \('parms',\); its state has"):
        checkpoint.restore_arrays(tmp_path, 1, ("parms",))


# Refusals.


def test_a_different_model_is_explained_leaf_by_leaf(tmp_path):
    checkpoint.save(
        tmp_path, 1, {"a": jnp.ones(3), "b": jnp.ones(3), "old": 1, "same": None}, {}
    )
    template = {
        "a": jnp.ones(4),
        "b": jnp.ones(3, jnp.bfloat16),
        "new": jax.random.key(0),
        "same": None,
    }
    with pytest.raises(CheckpointError) as error:
        checkpoint.restore(tmp_path, 1, template)
    assert str(error.value).splitlines()[1:] == [
        "  a: expected float32[4], found float32[3]",
        "  b: expected bfloat16[3], found float32[3]",
        "  new: expected key<fry>[], found nothing",
        "  old: expected nothing, found int",
    ]


@pytest.mark.parametrize(
    ("state", "meta", "kind", "words"),
    [
        ({"a": "text"}, {}, TypeError, "state leaf a must be"),
        ({"a": np.array(["x"])}, {}, TypeError, "state leaf a must be"),
        ({"a": 2**63}, {}, ValueError, "state leaf a must fit 64 bits"),
        ({}, {}, ValueError, "at least one leaf"),
        ({"a/b": 1}, {}, ValueError, "'/' in a key"),
        (
            {"a.b": np.ones(1), "a": {"b": np.zeros(1)}},
            {},
            ValueError,
            "one dotted path",
        ),
        ({"a": 1}, {"x": np.float32(1)}, TypeError, "meta must be what JSON can hold"),
    ],
)
def test_what_cannot_be_saved_is_refused_in_a_sentence(
    tmp_path, state, meta, kind, words
):
    with pytest.raises(kind, match=words):
        checkpoint.save(tmp_path / "checkpoints", 1, state, meta)
    assert not (tmp_path / "checkpoints").exists()


def test_resolve_explains_what_is_missing(tmp_path):
    for which, words in [
        ("latest", "no good step"),
        ("best", "finite val_loss"),
        (3, "no step 3"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            checkpoint.resolve(tmp_path, which)
    with pytest.raises(ValueError, match="which='newest' must be"):
        checkpoint.resolve(tmp_path, "newest")


# Which steps are kept.


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    for step, loss in enumerate([3.0, 1.0, 1.0, 2.0, float("nan"), 2.5]):
        save_small(tmp_path, step, val_loss=loss)
    assert checkpoint.steps(tmp_path) == [1, 4, 5]
    assert checkpoint.resolve(tmp_path, "best") == 1
    assert checkpoint.resolve(tmp_path, "latest") == 5
    assert checkpoint.resolve(tmp_path, "4") == 4


def test_the_best_is_of_the_newest_evaluated_data(tmp_path):
    meta = [("a", 1.0), ("b", 3.0), ("b", 2.0), ("b", 2.5), ("b", 2.6), ("c", None)]
    for step, (data, loss) in enumerate(meta):
        save_small(tmp_path, step, data_fingerprint=data, val_loss=loss)
    assert checkpoint.steps(tmp_path) == [2, 4, 5]
    assert checkpoint.resolve(tmp_path, "best") == 2


def test_a_damaged_step_does_not_count_among_those_kept(tmp_path):
    save_small(tmp_path, 1)
    (save_small(tmp_path, 2) / "meta.json").unlink()
    save_small(tmp_path, 3)
    assert checkpoint.steps(tmp_path) == [1, 2, 3]
    save_small(tmp_path, 4)
    assert checkpoint.steps(tmp_path) == [3, 4]


def test_a_step_just_saved_stays_though_newer_ones_exist(tmp_path):
    for step in (10, 20, 5):
        save_small(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [5, 10, 20]


def test_saving_a_step_again_replaces_it(tmp_path):
    save_small(tmp_path, 1, val_loss=1.0)
    checkpoint.save(tmp_path, 1, {"w": np.zeros(2)}, {"val_loss": 2.0})
    state, meta = checkpoint.restore(tmp_path, 1, {"w": np.zeros(2)})
    assert meta["val_loss"] == 2.0
    assert state["w"].tolist() == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    save_small(tmp_path, 1).rename(tmp_path / ".old-00000001")
    assert checkpoint.newest_good(tmp_path) == 1
    assert checkpoint.restore(tmp_path, 1, {"w": np.zeros(50, int)})[0]["w"][0] == 1
    save_small(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001", "00000002"]


# Damage.


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def step_files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_harm_to_any_file_is_named_and_the_older_step_used(tmp_path, harm):
    save_small(tmp_path, 1)
    newest = save_small(tmp_path, 2)
    files = step_files(newest)
    assert len(files) > 6
    for file in files:
        intact = file.read_bytes()
        harm(file)
        fault = checkpoint.verify(newest) or "nothing"
        assert fault.startswith(file.relative_to(newest).as_posix())
        said = []
        assert checkpoint.newest_good(tmp_path, report=said.append) == 1
        assert said == [f"Step 2 in {tmp_path} is passed over: {fault}"]
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoint.restore(tmp_path, 2, {"w": np.zeros(50, int)})
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoint.resolve(tmp_path, 2)
        file.write_bytes(intact)
    assert checkpoint.verify(newest) is None


def test_no_flipped_bit_of_the_manifest_passes_unseen(tmp_path):
    manifest = save_small(tmp_path, 1) / "manifest.json"
    intact, chance = manifest.read_bytes(), random.Random(0)
    content = json.loads(intact)
    for _ in range(200):
        data = bytearray(intact)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        manifest.write_bytes(data)
        fault = checkpoint.verify(manifest.parent)
        assert (fault or "").startswith("manifest.json") or json.loads(data) == content


def test_extra_files_foreign_steps_and_odd_manifests_are_named(tmp_path):
    path = save_small(tmp_path, 1)
    (path / "state" / "extra").write_text("")
    assert checkpoint.verify(path) == "state/extra is not in the manifest."
    (path / "state" / "extra").unlink()
    shutil.copytree(path, tmp_path / "00000009")
    assert checkpoint.verify(tmp_path / "00000009") == "manifest.json is of step 1."
    for odd in (b"", b"[]", b"{}", b"null", b'{"sha256": 1}', b"\xff", b"[" * 100_000):
        (path / "manifest.json").write_bytes(odd)
        assert (checkpoint.verify(path) or "").startswith("manifest.json ")


def test_set_aside_takes_a_step_out_of_the_run(tmp_path):
    for k in range(2):
        save_small(tmp_path, 1)
        path = checkpoint.set_aside(tmp_path, 1)
        assert path.name == ("damaged-00000001", "damaged-00000001-1")[k]
    assert checkpoint.steps(tmp_path) == []
    assert path.is_dir()


def test_readers_change_nothing(tmp_path):
    save_small(tmp_path, 1, val_loss=1.0)
    flip(save_small(tmp_path, 2, val_loss=0.5) / "meta.json")
    (tmp_path / ".tmp-1").mkdir()
    before = contents(tmp_path)
    checkpoint.resolve(tmp_path, "latest", report=lambda _: None)
    checkpoint.resolve(tmp_path, "best", report=lambda _: None)
    checkpoint.restore(tmp_path, 1, {"w": np.zeros(50, int)})
    checkpoint.restore_arrays(tmp_path, 1)
    checkpoint.restore_arrays(tmp_path, 1, ("w",))
    assert contents(tmp_path) == before
