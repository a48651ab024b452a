"""`trix-jax push --export DIR --repo OWNER/NAME`."""

import dataclasses

from trix_jax.cli.common import print_json, say
from trix_jax.lm.presets import parse


@dataclasses.dataclass(frozen=True)
class Args:
    """Upload an export to a model hub, with the token that `hf auth login` has set."""

    export: str
    """What `trix-jax export` wrote."""
    repo: str
    """owner/name; made if there is none."""
    public: bool = False
    """Make a new repository public."""
    endpoint: str | None = None
    """Address of the hub; by default huggingface_hub's own."""
    json: bool = False
    """End standard output with the result as one line of JSON."""


def main(argv: list[str]) -> None:
    """Pushes an export."""
    args = parse(Args, argv, "push")
    from trix_jax.lm.serve.hub import push

    url = push(args.export, args.repo, private=not args.public, endpoint=args.endpoint)
    say(args.json)(f"{args.repo}: {url}")
    if args.json:
        print_json({"repo": args.repo, "commit": url})
