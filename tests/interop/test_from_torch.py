"""Imported PyTorch layers compute what the real modules computed: `golden/`, made by
`make_golden.py`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trix_jax.interop import from_torch, original

# Another folder that make_golden.py has filled, from modules of another seed.
GOLDEN = Path(os.environ.get("TRIX_GOLDEN", Path(__file__).parent / "golden"))
KINDS = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
LMS = {"lm": "lookup", "lm_sparse": "sparse", "lm_hierarchical": "hierarchical"}
FFNS = [kind for kind in KINDS if kind not in ("linear", *LMS)]
SETTINGS = {
    "linear": {"num_tiles": 4},
    "hierarchical_top2": {"top_k_clusters": 2},
    "lm_sparse": {"n_heads": 2},
    "lm_hierarchical": {"n_heads": 2},
}
EPS = np.finfo(np.float32).eps


def golden(kind):
    path = GOLDEN / f"{kind}.safetensors"
    tensors = load_file(path)
    wanted = {
        n.removeprefix("golden."): jnp.asarray(v)
        for n, v in tensors.items()
        if "golden." in n
    }
    imported = from_torch.read(path, **SETTINGS.get(kind, {}))
    arrays = {n: a for n, a in imported.arrays.items() if "golden." not in n}
    return imported._replace(arrays=arrays), wanted


def assert_close(got, wanted, terms):
    """Sums of `terms` products, taken in another order than torch takes them."""
    bound = terms * EPS * np.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=bound)


def test_golden_files_are_there_for_every_kind():
    assert {"linear", "sparse", "hierarchical", "lookup", "lm"} <= set(KINDS)


def test_linear_equals_the_original():
    imported, wanted = golden("linear")
    assert imported.kind == "linear"
    assert_close(from_torch.apply(imported, wanted["x"]), wanted["y"], 16)
    gated = original.linear(
        imported.arrays, wanted["x"], imported.settings, wanted["gate"]
    )
    assert_close(gated, wanted["y_gated"], 16)
    signatures = original.row_signatures(imported.arrays["weight"], 4)
    np.testing.assert_array_equal(signatures, wanted["signatures"])


@pytest.mark.parametrize("kind", FFNS)
def test_ffn_routes_and_computes_as_the_original(kind):
    imported, wanted = golden(kind)
    assert imported.kind == kind.split("_")[0]
    y, tiles = jax.jit(lambda x: from_torch.apply(imported, x))(wanted["x"])
    np.testing.assert_array_equal(tiles, wanted["tiles"])
    assert len(np.unique(tiles)) > 2
    residual = 0 if kind == "sparse" else wanted["x"]
    assert np.abs(wanted["y"] - residual).max() > 0.01  # the layer does something
    assert_close(y, wanted["y"], 4 * 16)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LMS)
def test_language_model_equals_the_original(kind):
    imported, wanted = golden(kind)
    assert (imported.kind, imported.ffn) == ("lm", LMS[kind])
    assert imported.settings["n_heads"] == 2  # of "lm" from the checkpoint's config
    logits, tiles = from_torch.apply(imported, wanted["x"])
    np.testing.assert_array_equal(np.stack(tiles), wanted["tiles"])
    assert_close(logits, wanted["y"], 8 * 16)


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [("linear", 1), ("sparse", 2), ("hierarchical", 16)],
)
def test_packed_bytes_are_the_original_s(kind, kernels, tmp_path):
    assert_same_bytes(kind, kernels, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kernels"), [("lm_sparse", 4), ("lm_hierarchical", 32)]
)
def test_packed_bytes_of_a_language_model_are_the_original_s(kind, kernels, tmp_path):
    assert_same_bytes(kind, kernels, tmp_path)


def assert_same_bytes(kind, kernels, folder):
    """Every ternary kernel in our file holds the bytes of the original's packing."""
    imported, wanted = golden(kind)
    from_torch.save(imported, folder)
    ours = load_file(folder / "model.safetensors")
    packed = {n: v for n, v in wanted.items() if n.startswith("packed.")}
    assert len(packed) == kernels
    for name, bits in packed.items():
        name = name.removeprefix("packed.")
        tile = re.search(r"tiles\.(\d+)\.", name)
        stacked = ours[f"{re.sub(r'tiles.[0-9]+.', 'tiles.', name)}.bits"]
        np.testing.assert_array_equal(stacked[int(tile[1])] if tile else stacked, bits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", *FFNS, "lm"])
def test_saved_and_loaded_model_computes_the_same(kind, tmp_path):
    imported, wanted = golden(kind)
    sizes = from_torch.save(imported, tmp_path)
    assert kind == "lookup_float" or sizes["float32"] >= 12 * sizes["packed"]
    loaded = from_torch.load(tmp_path)
    assert loaded.settings == imported.settings
    before, after = (from_torch.apply(m, wanted["x"]) for m in (imported, loaded))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    from_torch.save(loaded, tmp_path / "again")
    once, twice = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path, tmp_path / "again")
    )
    assert once.keys() == twice.keys()
    for name, value in once.items():
        np.testing.assert_array_equal(twice[name], value)


@pytest.mark.slow
def test_gradient_reaches_the_latent_weights():
    imported, wanted = golden("sparse")

    def loss(arrays):
        y, _ = from_torch.apply(imported._replace(arrays=arrays), wanted["x"])
        return jnp.sum(y**2)

    grads = jax.grad(loss)(imported.arrays)
    for name in ("up_proj.weight", "up_proj.scales", "down_proj.weight"):
        assert np.abs(grads[name]).max() > 0


def test_layer_without_its_number_of_tiles_is_refused():
    with pytest.raises(ValueError, match="num_tiles must be given"):
        from_torch.read(GOLDEN / "linear.safetensors")


@pytest.mark.parametrize(
    ("kind", "known", "match"),
    [
        ("linear", {"num_tiles": 0}, "num_tiles must divide the .* rows .* Got 0"),
        ("linear", {"num_tiles": 5}, "num_tiles must divide the .* rows .* Got 5"),
        ("hierarchical", {"top_k_clusters": 99}, "at most the .* clusters. Got 99"),
        ("hierarchical", {"top_k_clusters": 0}, "top_k_clusters must be at least 1"),
    ],
)
def test_a_number_that_the_checkpoint_does_not_bear_is_refused(kind, known, match):
    with pytest.raises(ValueError, match=match):
        from_torch.read(GOLDEN / f"{kind}.safetensors", **known)


def test_another_number_of_tiles_than_the_checkpoints_is_refused(tmp_path):
    tensors = load_file(GOLDEN / "sparse.safetensors")
    number = golden("sparse")[0].settings["num_tiles"]
    tensors["ema_signatures"] = np.ones((number, tensors["up_proj.weight"].shape[1]))
    about = {"format": "trix-pytorch", "about": "{}"}
    save_file(tensors, tmp_path / "sparse.safetensors", about)
    read = from_torch.read(tmp_path / "sparse.safetensors", num_tiles=number)
    assert read.settings["num_tiles"] == number
    with pytest.raises(ValueError, match=f"num_tiles must be {number}, as the check"):
        from_torch.read(tmp_path / "sparse.safetensors", num_tiles=2 * number)


def test_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        from_torch.read(tmp_path / "x.safetensors")


def test_code_11_in_an_imported_file_is_refused(tmp_path):
    imported, _ = golden("sparse")
    from_torch.save(imported, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    data = bytearray(path.read_bytes())
    first = data.find(tensors["up_proj.weight.bits"].tobytes())
    data[first] = 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match="11"):
        from_torch.load(tmp_path)


@pytest.mark.slow
def test_import_verb_packs_a_layer(tmp_path, user_env):
    source = GOLDEN / "linear.safetensors"
    verb = [sys.executable, "-m", "trix_jax.cli.main", "import", str(source)]
    rest = ["--output", str(tmp_path / "out"), "--num-tiles", "4"]
    done = subprocess.run([*verb, *rest], env=user_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "linear" in done.stdout
    assert from_torch.load(tmp_path / "out").kind == "linear"
