"""The page, its numbers, and the questions to a run's routing."""

import dataclasses
import json
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax.cli import main
from trix_jax.lm.inspect import Order, diff, look, route, write_page
from trix_jax.lm.serve.export import export
from trix_jax.lm.serve.load import load_run, open_run_data
from trix_jax.nn.transformer import TransformerLM

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def found(run_dir):
    return look(run_dir, open_run_data(run_dir))


@pytest.fixture(scope="module")
def model(run_dir):
    loaded, variables, tokenizer = load_run(run_dir)
    return loaded, variables, tokenizer, open_run_data(run_dir).val.window(0, 400)


def test_numbers_of_a_run_are_consistent(found, run_dir):
    (layer,) = found["layers"]
    assert found["step"] == 10
    assert [e["step"] for e in found["history"]] == [5, 10]
    assert len(found["tokens"]) == len(layer["tiles"]) == len(found["losses"])
    assert "".join(found["tokens"]).count("tile") > 3
    assert sum(layer["usage"]) == pytest.approx(1)
    np.testing.assert_allclose(np.diag(layer["similarity"]), 1, atol=1e-3)
    assert all(0 < share < 1 for share in layer["zero"]["up"])
    assert any(share > 0 for share in layer["flips"]["up"])
    assert layer["bytes"]["float32"] == 16 * layer["bytes"]["packed"]


def test_losses_of_the_text_are_those_of_the_evaluation(model):
    loaded, variables, _, ids = model
    seen = route(loaded, variables, ids)
    logits, infos, _ = loaded.apply(variables, jnp.asarray(ids[None, 16:32]))
    last = logits[0] - np.log(np.exp(logits[0]).sum(-1, keepdims=True))
    own = -np.asarray(last)[np.arange(16), ids[17:33]]
    np.testing.assert_allclose(seen.losses[16:32], own, rtol=1e-4)
    np.testing.assert_array_equal(seen.tiles[0, 16:32], infos[0].tiles[0])


def test_page_is_one_file_without_references(found, tmp_path):
    nasty = {**found, "tokens": ["</script><b>", *found["tokens"][1:]]}
    text = write_page(nasty, tmp_path / "page.html").read_text("utf-8")
    assert text.count("</script>") == 2
    for reference in (" src=", " href=", "url(", "import("):
        assert reference not in text
    embedded = text.split('type="application/json" id="data">')[1].split("</script>")[0]
    assert json.loads(embedded) == json.loads(json.dumps(nasty))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hierarchical", "lookup", "lookup_own"])
def test_packed_export_of_every_kind_is_looked_into(kind, run_dir, tmp_path):
    loaded, _, tokenizer = load_run(run_dir)
    ffn, _, reads = kind.partition("_")
    shape = {
        "reads": reads or "shared",
        "num_tiles": 8,
        "tiles_per_cluster": 4,
        "tiles_per_token": 1,
        "n_layers": 1,
    }
    config = dataclasses.replace(loaded.config, ffn=ffn, grid_size=4, **shape)
    fresh = TransformerLM(config)
    variables = fresh.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    export(fresh, variables, tokenizer, tmp_path)
    found = look(tmp_path, open_run_data(run_dir))
    assert (found["step"], found["history"]) == (None, [])
    (layer,) = found["layers"]
    assert len(layer["usage"]) == len(layer["similarity"]) == 8
    assert sum(layer["usage"]) == pytest.approx(1)
    kernels = {"splines"} if ffn == "lookup" else {"up", "down"}
    kernels |= {"tile_read", "tile_write"} if reads else set()
    assert layer["zero"].keys() == kernels
    assert all(0 < share < 1 for shares in layer["zero"].values() for share in shares)
    clusters = layer["clusters"]
    assert (clusters is None) == (ffn == "sparse")
    assert clusters is None or sorted(np.ravel(clusters)) == list(range(8))
    splines = layer["splines"]
    cells = (8, 1, 4) if reads else (8, 4, 4)
    assert np.shape(splines) == (cells if ffn == "lookup" else ())
    assert ffn != "lookup" or np.abs(splines).max() > 0
    write_page(found, tmp_path / "page.html")  # what JSON cannot hold would raise


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_page_draws_itself_in_a_browser(found, tmp_path):
    page = write_page(found, tmp_path / "page.html")
    click = "<script>document.querySelectorAll('.tile')[2].click()</script></body>"
    page.write_text(page.read_text("utf-8").replace("</body>", click), "utf-8")
    flags = "--headless --no-sandbox --disable-gpu --virtual-time-budget=3000".split()
    command = [CHROMIUM, *flags, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert 'data-ready="yes"' in done.stdout, done.stderr
    assert done.stdout.count('class="tile"') == 3
    assert done.stdout.count('class="tile kept"') == 1
    assert 'id="text" class="alone"' in done.stdout
    marked = done.stdout.count('class="on"')
    assert marked == sum(2 in tiles for tiles in found["layers"][0]["tiles"])
    assert "validation loss" in done.stdout


@pytest.fixture(scope="module")
def elsewhere(model):
    """A tile that the letter e does not take, and where e is."""
    loaded, variables, tokenizer, ids = model
    plain = route(loaded, variables, ids)
    named = ids[: plain.tiles.shape[1]] == int(tokenizer.encode("e")[0])
    free = set(range(loaded.config.num_tiles)) - set(plain.tiles[0, named].ravel())
    return min(free), named


@pytest.mark.slow
def test_orders_move_exactly_the_tokens_named(model, elsewhere):
    loaded, variables, tokenizer, ids = model
    tile, named = elsewhere
    e = int(tokenizer.encode("e")[0])
    plain = route(loaded, variables, ids)
    steered = route(loaded, variables, ids, (Order(0, tile, (e,), pin=True),))
    assert (steered.tiles[0, named] == tile).any(axis=-1).all()
    np.testing.assert_array_equal(steered.tiles[0, ~named], plain.tiles[0, ~named])
    kept = diff(plain, steered)[0]
    assert kept["kept"] < 1
    np.testing.assert_allclose(kept["signature_cosine"], 1, atol=1e-5)
    assert diff(plain, plain)[0]["kept"] == 1


@pytest.mark.slow
def test_verb_writes_the_page_and_answers(run_dir, tmp_path, capsys, elsewhere):
    page, held = tmp_path / "page.html", tmp_path / "held"
    argv = ["inspect", "--checkpoint", str(run_dir), "--output", str(page)]
    argv += [
        "--against",
        "step:5",
        "--signature",
        "0:1",
        "--pin",
        f"0:{elsewhere[0]}:e",
    ]
    argv += ["--freeze", str(held), "--json"]
    assert main(argv) == 0
    answers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert page.is_file()
    assert 0 < answers["diff"][0]["kept"] <= 1
    assert len(answers["signature"]) == 16
    assert answers["loss"] != answers["steered_loss"]
    _, variables, _ = load_run(held)
    assert variables["routing"]["block_00"]["ffn"]["tiles"]["router"]["frozen"]
    assert (
        main(["inspect", "--checkpoint", str(held), "--data", str(run_dir / "data")])
        == 0
    )
    assert (held / "inspect.html").is_file()


def test_verb_refuses_an_order_it_cannot_read(run_dir, tmp_path, capsys):
    argv = [
        "inspect",
        "--checkpoint",
        str(run_dir),
        "--output",
        str(tmp_path / "p.html"),
    ]
    assert main([*argv, "--pin", "0:2"]) == 2
    assert "LAYER:TILE:CHARACTERS" in capsys.readouterr().err


def test_verb_refuses_a_dense_model_beside(run_dir, model, tmp_path, capsys):
    loaded, _, tokenizer, _ = model
    dense = TransformerLM(dataclasses.replace(loaded.config, ffn="dense"))
    variables = dense.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    export(dense, variables, tokenizer, tmp_path / "dense")
    argv = ["inspect", "--checkpoint", str(run_dir), "--output", str(tmp_path / "p")]
    assert main([*argv, "--against", str(tmp_path / "dense")]) == 2
    assert "--against must be of a TriX arm" in capsys.readouterr().err
