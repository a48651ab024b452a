"""Out: the model card, a push to a hub (a server on this machine), and StableHLO."""

import base64
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax.lm.data import DataConfig, prepare
from trix_jax.lm.report.record import read_run
from trix_jax.lm.serve.card import write_card
from trix_jax.lm.serve.export import export, load
from trix_jax.lm.serve.hub import push
from trix_jax.lm.serve.load import load_run, open_run_data
from trix_jax.lm.train.evaluate import evaluate
from trix_jax.nn.transformer import TransformerLM
from trix_jax.routing import RoutingConfig, hold_signatures
from trix_jax.ternary import TernaryConfig


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "model"
    export(*load_run(run_dir), directory)
    return directory


class Hub(BaseHTTPRequestHandler):
    """Enough of a hub to take a repository and one commit; remembers what it was given."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.calls.append((self.path, self.headers["Authorization"]))
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.answer({"url": f"{self.server.address}/someone/tiny"})
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            kinds = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in files
            ]
            return self.answer({"files": kinds})
        if self.path.endswith("/commit/main"):
            self.server.lines = [json.loads(line) for line in body.splitlines()]
            return self.answer(
                {
                    "commitUrl": f"{self.server.address}/someone/tiny/commit/{'0' * 40}",
                    "commitOid": "0" * 40,
                }
            )
        return self.answer({})

    def do_GET(self):
        self.server.calls.append((self.path, None))
        if "/tree/main" in self.path:
            of = {"type": "file", "size": 1, "oid": "0" * 40}
            return self.answer([{"path": path, **of} for path in self.server.there])
        return self.answer({"sha": "0" * 40, "siblings": []})

    def answer(self, tree):
        data = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.created, server.lines = [], None, []
    server.there = []
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_TOKEN", "hf_local")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_push_uploads_the_export_and_nothing_else(exported, hub):
    (exported / "notes.txt").write_text("mine")
    url = push(exported, "someone/tiny", endpoint=hub.address)
    assert url.endswith("/commit/" + "0" * 40)
    assert hub.created["name"] == "tiny"
    assert hub.created["visibility"] == "private"
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in hub.lines
        if line["key"] == "file"
    }
    names = {"model.safetensors", "config.json", "tokenizer.json"}
    assert names <= set(sent) <= {*names, "README.md"}
    for name, content in sent.items():
        assert content == (exported / name).read_bytes()
    assert ("/api/models/someone/tiny/commit/main", "Bearer hf_local") in hub.calls


def test_push_without_a_card_says_that_an_earlier_one_stays(exported, hub):
    hub.there = ["README.md", "model.safetensors"]
    with pytest.warns(UserWarning, match="keeps the card that it had"):
        push(exported, "someone/tiny", endpoint=hub.address)
    assert {line["key"] for line in hub.lines} == {"header", "file"}


@pytest.mark.slow
def test_push_refuses_a_card_of_other_weights(
    run_dir, exported, small_store, hub, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    about = read_run(run_dir).summary
    write_card(folder, open_run_data(run_dir), about)
    push(folder, "someone/tiny", endpoint=hub.address)
    (folder / "model.stablehlo").write_bytes(b"of the weights before")
    model, variables, tokenizer = load_run(run_dir)
    variables["params"]["embed"]["embedding"] += 1.0
    export(model, variables, tokenizer, folder)
    assert not (folder / "model.stablehlo").exists()
    with pytest.raises(ValueError, match="tells of other weights"):
        push(folder, "someone/tiny", endpoint=hub.address)
    (folder / "README.md").write_text("words of one's own")
    push(folder, "someone/tiny", endpoint=hub.address)


def test_push_refuses_what_is_no_export(run_dir, hub):
    with pytest.raises(ValueError, match="must be an export"):
        push(run_dir, "someone/tiny", endpoint=hub.address)
    assert not hub.calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, ["It has met no text but its training data; nothing"]),
        (
            {"data_since": 1200},
            ["Its first 1,200 steps were on other data", "It has met other text than"],
        ),
        (
            {"init_from": {"path": "/home/me/a", "step": 40, "sha256": 64 * "a"}},
            [
                f"the weights of step 40 of a run (sha256 {16 * 'a'}), whose training is "
                "counted nowhere here.",
                "It has met other text than",
            ],
        ),
        (
            {"init_from": {"path": "a", "step": None, "sha256": 64 * "b"}},
            ["the weights of an export (sha256 b", "It has met other text than"],
        ),
    ],
)
def test_card_says_what_else_the_weights_have_met(
    more, words, exported, run_dir, tmp_path
):
    folder = shutil.copytree(exported, tmp_path / "model")
    about = read_run(run_dir).summary | more
    card = write_card(folder, open_run_data(run_dir), about).read_text()
    assert [word for word in words if word not in card] == []
    assert ("no text but" in card) == (not more)
    assert "/home/me" not in card


def test_card_states_what_was_measured(exported, run_dir):
    store = open_run_data(run_dir)
    card = write_card(exported, store, read_run(run_dir).summary).read_text()
    assert card.startswith("---\nlibrary_name: trix-jax\n")
    loss = evaluate(*load(exported)[:2], store).val_loss
    assert f"| this model, packed | {loss:.4f} |" in card
    floors = {
        int(n): float(v)
        for n, v in re.findall(r"\| (\d)-gram counts \| ([\d.]+) \|", card)
    }
    better = re.search(r"Counting alone does better: (.*)\.", card)
    named = {int(n) for n in re.findall(r"(\d)-grams", better[1])} if better else set()
    assert named == {n for n, floor in floors.items() if floor <= loss}
    assert set(floors) == {1, 2, 3, 4, 5}


@pytest.fixture(scope="module")
def small_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("to be or not " * 40)
    config = DataConfig(
        source="text", path=str(folder / "a.txt"), tokenizer="char", val_fraction=0.2
    )
    return prepare(config, folder / "store", lambda _: None)


WEIGHTS = "a tile's address is read off its own weights"


def by(source):
    return {"routing": RoutingConfig(source=source)}


CARDS = [  # what differs, the routes, what the card says, whether weights are ternary
    ({}, "signatures", [WEIGHTS, "an active width of 34"], True),
    (by("learned"), "signatures", ["a learned router has a row"], True),
    (by("random"), "signatures", ["address is a random row"], True),
    (
        {"routing": RoutingConfig(hold_after=1.0)},
        "signatures",
        ["what its own weights were when it was held"],
        True,
    ),
    ({}, "table", [WEIGHTS, "stored as a table", "an active width of 32"], True),
    (by("hash"), "signatures", ["a hash of its id", "width of 32"], True),
    (
        {"ternary": TernaryConfig(mode="none")},
        "signatures",
        [WEIGHTS, " bytes, in float32."],
        False,
    ),
    ({"ffn": "dense"}, "signatures", ["# A dense language", "are dense."], False),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "routes", "words", "is_packed"),
    CARDS,
    ids="weights learned random held table hash real dense".split(),
)
def test_card_says_what_is_exported(
    change, routes, words, is_packed, small_store, tiny_config, tmp_path
):
    vocab_size = small_store.tokenizer.vocab_size
    config = dataclasses.replace(tiny_config.model, vocab_size=vocab_size, **change)
    model, tokens = TransformerLM(config), jnp.zeros((1, 16), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    if config.routing.holds:
        variables["routing"] = hold_signatures(variables["routing"])
    sizes = export(model, variables, small_store.tokenizer, tmp_path, routes)
    about = {"arm": "a", "seed": 0, "steps": 0, "tokens": 0, "seconds": 0.0}
    card = write_card(tmp_path, small_store, about).read_text()
    assert [word for word in words if word not in card] == []
    assert (WEIGHTS in card) == (WEIGHTS in words)
    for word in ("packed |", "wo bits", "ternary, 2-bit", "times fewer"):
        assert (word in card.replace("\n", " ")) == is_packed, word
    if config.ffn != "dense":
        assert f"They take {sizes['ffn_packed']:,} bytes" in card


@pytest.mark.slow
def test_program_runs_without_this_package(exported, tmp_path, user_env):
    pytest.importorskip("flatbuffers")
    from trix_jax.lm.serve.stablehlo import write_program

    model, variables, _ = load(exported)
    tokens = jnp.arange(16, dtype=jnp.int32)[None] % 20
    logits = model.apply(variables, tokens)[0]
    path = write_program(model, variables, tmp_path)
    code = (
        "import sys; sys.modules['trix_jax'] = sys.modules['trix_kernels'] = None\n"
        "import jax, numpy as np; from pathlib import Path\n"
        "program = jax.export.deserialize(bytearray(Path('model.stablehlo').read_bytes()))\n"
        "np.save('logits.npy', program.call(np.arange(16, dtype=np.int32)[None] % 20))\n"
    )
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env=user_env, check=True)
    bound = 1e-5 * np.abs(logits).max()
    np.testing.assert_allclose(
        np.load(tmp_path / "logits.npy"), logits, rtol=0, atol=bound
    )
    assert path.stat().st_size < 200_000
