"""Data sets by name: where they lie, at which revision, and how much of them is taken.

| name | training tokens | from | vocabulary |
|---|---:|---|---:|
| `fineweb_5m` | 5M | FineWeb-Edu `sample-10BT`, shard 0 | 8,192 |
| `fineweb_50m` | 50M | shard 0 | 16,384 |
| `fineweb_500m` | 500M | shards 0 and 1 | 32,000 |
| `fineweb_10b` | all | all 14 shards, 28.5 GB | 32,000 |
| `stack_250m` | 250M | The Stack v2 (deduplicated), Python, permissive, by Software Heritage's contents | 32,000 |

With a `path` the name keeps its numbers and the text comes from there instead: a folder
of parquet shards for FineWeb-Edu, a folder (or a list) of repositories for The Stack.

FineWeb-Edu's revision and files as used by others; hashes come from the hub at that
revision. The Stack's files hold no source text, only the sha1 under which Software
Heritage serves it.
"""

import dataclasses
from typing import Any, NamedTuple

FINEWEB = "HuggingFaceFW/fineweb-edu"
FINEWEB_REVISION = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
STACK = "bigcode/the-stack-v2-dedup"
STACK_REVISION = "94d47b4385264b30f228e28a5d63e9b2eee8c2c5"
STACK_DUTY = (
    f"{STACK} is gated: accept its terms at https://huggingface.co/datasets/{STACK} with the "
    "account of the token that `hf auth login` sets. They ask for an agreement with Software "
    "Heritage and INRIA before a bulk download (datasets@softwareheritage.org), for its "
    "principles when a model is trained, and that every file's own licence is kept, attribution "
    "included. Without access: --data.path FOLDER, your own repositories."
)
BYTES_PER_TOKEN = 6  # more than a token of a trained BPE holds of English or code
NEAR = 0.8  # Jaccard similarity; Lee et al., 2022, https://arxiv.org/abs/2107.06499


class Dataset(NamedTuple):
    """A part of a repository on the hub.

    Attributes:
        files: paths in the repository; one that ends in "/" is a folder.
        tokens: of the training split; None takes all there is.
        most: files of a folder that are taken, by name.
        is_code: rows name contents at Software Heritage, instead of holding text.
        duty: what to do when the hub refuses access.
    """

    repo: str
    revision: str
    files: tuple[str, ...]
    tokens: int | None
    vocab_size: int
    val_fraction: float
    most: int | None = None
    is_code: bool = False
    duty: str = ""


def _fineweb(
    shards: int, tokens: int | None, vocab_size: int, val_fraction: float
) -> Dataset:
    files = tuple(f"sample/10BT/{i:03d}_00000.parquet" for i in range(shards))
    return Dataset(FINEWEB, FINEWEB_REVISION, files, tokens, vocab_size, val_fraction)


DATASETS = {
    "fineweb_5m": _fineweb(1, 5_000_000, 8192, 0.1),
    "fineweb_50m": _fineweb(1, 50_000_000, 16384, 0.02),
    "fineweb_500m": _fineweb(2, 500_000_000, 32000, 0.005),
    "fineweb_10b": _fineweb(14, None, 32000, 0.0005),
    "stack_250m": Dataset(
        STACK,
        STACK_REVISION,
        ("data/Python/",),
        250_000_000,
        32000,
        0.01,
        most=2,
        is_code=True,
        duty=STACK_DUTY,
    ),
}


def filled_in(config: Any) -> Any:
    """A `DataConfig` with what its data set's name stands for, where it says nothing."""
    named = DATASETS.get(config.source)
    if named is None:
        return config
    tokens = config.max_tokens or named.tokens
    most = config.max_bytes
    if tokens and not most:
        most = int(BYTES_PER_TOKEN * tokens / (1 - config.val_fraction))
    changes: dict[str, Any] = {"max_tokens": tokens, "max_bytes": most}
    if config.near_duplicates is None:
        changes["near_duplicates"] = NEAR
    if named.is_code:
        changes["languages"] = config.languages or "python"
        changes["licenses"] = config.licenses or "permissive"
    return dataclasses.replace(config, **changes)
