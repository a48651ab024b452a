"""Training steps of the PyTorch original, one for each line of the standard input.

    PYTHON_WITH_TORCH original_step.py SOURCE TILES TILES_PER_CLUSTER

Run as a file by `experiments.speed.original`; nothing of this repository is imported.
Answers with a line of JSON about itself, then with the seconds of each step.
"""

import json
import platform
import sys
import time
from pathlib import Path

import torch
from torch import nn

LAYERS, D_MODEL, HEADS, CHARACTERS = 4, 128, 4, 65
BATCH, CONTEXT = 64, 128


class CharacterModel(nn.Module):
    """Embeddings, the original's blocks, a head: logits and the blocks' auxiliary loss."""

    def __init__(self, block_of, tiles, tiles_per_cluster):
        super().__init__()
        self.tokens = nn.Embedding(CHARACTERS, D_MODEL)
        self.positions = nn.Embedding(CONTEXT, D_MODEL)
        self.blocks = nn.ModuleList(
            block_of(
                d_model=D_MODEL,
                n_heads=HEADS,
                num_tiles=tiles,
                tiles_per_cluster=tiles_per_cluster,
                dropout=0.0,
            )
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(D_MODEL)
        self.head = nn.Linear(D_MODEL, CHARACTERS, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        auxiliary = 0.0
        for block in self.blocks:
            x, _, losses = block(x)
            auxiliary = auxiliary + losses["total_aux"]
        return self.head(self.norm(x)), auxiliary


def main():
    source, tiles, tiles_per_cluster = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.path.insert(0, str(Path(source) / "src"))
    from trix.nn.hierarchical import HierarchicalTriXBlock

    torch.manual_seed(0)
    model = CharacterModel(HierarchicalTriXBlock, tiles, tiles_per_cluster).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = torch.randint(0, CHARACTERS, (BATCH, CONTEXT + 1))
    about = {"torch": torch.__version__, "python": platform.python_version()}
    about["threads"] = torch.get_num_threads()
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        optimizer.zero_grad()
        logits, auxiliary = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(
            logits.reshape(-1, CHARACTERS), batch[:, 1:].reshape(-1)
        )
        (loss + auxiliary).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
