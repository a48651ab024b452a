"""`trix-jax import FILE --output DIR`."""

import dataclasses
from typing import Annotated

import tyro

from trix_jax.cli.common import print_json, say
from trix_jax.interop import from_torch
from trix_jax.lm.presets import parse


@dataclasses.dataclass(frozen=True)
class Args:
    """Read a PyTorch TriX checkpoint and write it packed.

    Convert it first, in any Python that has torch:
    `python torch_to_safetensors.py CHECKPOINT.pt FILE` (the script is
    trix_jax/interop/torch_to_safetensors.py).
    """

    file: Annotated[str, tyro.conf.Positional]
    """What torch_to_safetensors.py wrote: a layer or a language model."""
    output: str
    """Where model.safetensors and config.json go."""
    num_tiles: int | None = None
    """Of a TriXLinear or an untrained SparseTriXFFN, whose checkpoints do not say."""
    n_heads: int | None = None
    """Of a language model saved without its config."""
    top_k_clusters: int | None = None
    """Of a HierarchicalTriXFFN that was made with more than one."""
    json: bool = False
    """End standard output with the result as one line of JSON."""


def main(argv: list[str]) -> None:
    """Imports a checkpoint."""
    args = parse(Args, argv, "import")
    imported = from_torch.read(
        args.file,
        num_tiles=args.num_tiles,
        n_heads=args.n_heads,
        top_k_clusters=args.top_k_clusters,
    )
    sizes = from_torch.save(imported, args.output)
    what = (
        imported.kind if imported.kind != "lm" else f"language model of {imported.ffn}"
    )
    say(args.json)(
        f"{args.output}: {what}, ternary weights {sizes['float32']:,} bytes in float32, "
        f"{sizes['packed']:,} packed"
    )
    if args.json:
        result = {"output": args.output, "kind": imported.kind, "ffn": imported.ffn}
        print_json({**result, "settings": imported.settings, "bytes": sizes})
