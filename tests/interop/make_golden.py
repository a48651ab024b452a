"""Makes `golden/` from the real PyTorch modules, through our converter.

    git clone https://github.com/anjaustin/trix ORIGINAL
    python tests/interop/make_golden.py ORIGINAL [FOLDER SEED]

in a Python with torch and pyyaml (torch 2.13.0 made the committed files, with seed 0).
Every file holds a checkpoint as `torch_to_safetensors.py` writes it and, under
`golden.*`, inputs and what the original makes of them: outputs, tiles, packed bytes.
Modules are trained for some steps first, so that scales, norms and averaged signatures
are not what they were set to.

With a FOLDER of its own and another SEED this proves us against modules that nobody has
seen before, in this environment again:

    TRIX_GOLDEN=FOLDER pytest -m "slow or not slow" tests/interop/test_from_torch.py
"""

import functools
import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
D, TOKENS = 16, 24
TERNARY = re.compile(r"^weight$|(up|down)_(proj\.)?weight$")


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main(source, folder=Path(__file__).parent / "golden", seed=0):
    sys.path.insert(0, str(source / "src"))
    from trix.kernel import TriXLinear, bindings
    from trix.nn.hierarchical import HierarchicalTriXFFN
    from trix.nn.sparse import SparseTriXFFN
    from trix.nn.sparse_lookup import SparseLookupFFN

    train = load("original_train", source / "experiments" / "training" / "train.py")
    torch.manual_seed(int(seed))
    x = torch.randn(TOKENS, D)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write = functools.partial(write_golden, folder, bindings.pack_weights)

    def vary(layer):
        """Random scales, norms and latent weights wide enough for all three values."""
        with torch.no_grad():
            for name, p in layer.named_parameters():
                if "scale" in name or "norm" in name:
                    p.add_(0.2 * torch.randn_like(p))
                elif name.endswith(("up_weight", "down_weight", "directions")):
                    p.normal_(0, 0.7)
        return layer

    layer = vary(TriXLinear(D, 12, num_tiles=4, bias=True)).eval()
    gate = (torch.rand(TOKENS, 4) > 0.5).float()
    write(
        "linear",
        layer,
        x=x,
        gate=gate,
        y=layer(x, torch.ones_like(gate)),
        y_gated=layer(x, gate),
        signatures=layer.get_tile_signatures(),
    )

    layer = steps(vary(SparseTriXFFN(D, num_tiles=4, dropout=0.0)), x)
    y, routes, _ = layer(x)
    write("sparse", layer, x=x, y=y, tiles=routes.argmax(-1))

    for name, k in (("hierarchical", 1), ("hierarchical_top2", 2)):
        ffn = HierarchicalTriXFFN(
            D, num_tiles=8, tiles_per_cluster=2, dropout=0.0, top_k_clusters=k
        )
        layer = steps(vary(ffn), x)
        y, info, _ = layer(x)
        write(name, layer, x=x, y=y, tiles=info["tile_idx"])

    for name, ternary in (("lookup", True), ("lookup_float", False)):
        ffn = SparseLookupFFN(
            D,
            num_tiles=8,
            tiles_per_cluster=4,
            grid_size=4,
            dropout=0.0,
            ternary_splines=ternary,
        )
        layer = steps(vary(ffn), x[None])
        y, info, _ = layer(x[None])
        write(name, layer, x=x, y=y[0], tiles=info["tile_idx"][0])

    config = train.ExperimentConfig(
        d_model=D,
        n_heads=2,
        n_layers=2,
        vocab_size=32,
        num_tiles=8,
        tiles_per_cluster=4,
        grid_size=4,
        seq_length=12,
        dropout=0.0,
    )
    model = vary(train.TriXLanguageModel(config)).eval()
    ids = torch.randint(0, 32, (2, 12))
    with torch.no_grad():
        y, aux = model(ids)
    tiles = torch.stack([info["tile_idx"] for info in aux["routing_info"]])
    checkpoint = {
        "step": 3,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": torch.optim.AdamW(model.parameters()).state_dict(),
        "config": train.asdict(config),
    }
    write("lm", checkpoint, x=ids, y=y, tiles=tiles)

    from trix.nn.hierarchical import HierarchicalTriXBlock
    from trix.nn.sparse import SparseTriXBlock

    for name, block, tiles_of in (
        ("lm_sparse", SparseTriXBlock, lambda gate: gate.argmax(-1)),
        ("lm_hierarchical", HierarchicalTriXBlock, lambda info: info["tile_idx"]),
    ):
        model = Stack([block(D, 2, num_tiles=8, dropout=0.0) for _ in range(2)])
        model.train()
        model(ids)  # makes averaged signatures, and clusters
        model = vary(model).eval()
        with torch.no_grad():
            y, routes = model(ids)
        tiles = torch.stack([tiles_of(route) for route in routes])
        write(name, model, x=ids, y=y, tiles=tiles)


class Stack(torch.nn.Module):
    """The language model of the original's `experiments/training/train.py`, around
    other blocks of its.
    """

    def __init__(self, blocks):
        super().__init__()
        self.token_emb = torch.nn.Embedding(32, D)
        self.pos_emb = torch.nn.Embedding(12, D)
        self.blocks = torch.nn.ModuleList(blocks)
        self.ln_f = torch.nn.LayerNorm(D)
        self.lm_head = torch.nn.Linear(D, 32, bias=False)

    def forward(self, ids):
        x = self.token_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        routes = []
        for block in self.blocks:
            x, route, _ = block(x)
            routes.append(route)
        return self.lm_head(self.ln_f(x)), routes


def steps(layer, x):
    """Some steps of SGD in training mode, then evaluation mode."""
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for _ in range(5):
        y = layer(x)[0]
        (y - torch.sin(x)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer.eval()


def write_golden(folder, pack, name, what, **golden):
    """Saves a checkpoint, converts it as a user would, and adds inputs and results."""
    convert = load(
        "torch_to_safetensors",
        ROOT / "trix_jax" / "interop" / "torch_to_safetensors.py",
    )
    state = what if isinstance(what, dict) else what.state_dict()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "checkpoint.pt"
        torch.save(state, path)
        state, metadata = convert.read(str(path))
    packed = {f"packed.{n}": pack(w) for n, w in state.items() if TERNARY.search(n)}
    golden = {f"golden.{n}": value for n, value in (golden | packed).items()}
    path = folder / f"{name}.safetensors"
    convert.write(str(path), {**state, **golden}, metadata)
    about = json.loads(metadata["about"]).get("step", "bare state dict")
    print(name, about, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
