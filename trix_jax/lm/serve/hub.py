"""An export to a model hub."""

import warnings
from pathlib import Path

from trix_jax.lm.serve.card import CARD, check_card
from trix_jax.lm.serve.export import load
from trix_jax.lm.train.exported import CONFIG, TOKENIZER, WEIGHTS, is_export


def push(
    directory: str | Path,
    repo: str,
    *,
    private: bool = True,
    endpoint: str | None = None,
) -> str:
    """Uploads an export: its weights, config, tokenizer and card, and nothing else.

    Without a card in the export the repository keeps the card that it had, since that may
    be somebody's own words: a warning says so.

    The token is the one that `hf auth login` or the environment has set.

    Args:
        repo: `owner/name`; made if there is none.
        private: of a repository that is made.
        endpoint: of the hub; None is huggingface_hub's own default.

    Returns:
        The address of the commit.

    Raises:
        ValueError: not an export, or one that does not load; a card of other weights.
    """
    from huggingface_hub import HfApi

    directory = Path(directory)
    if not is_export(directory):
        raise ValueError(
            f"{directory} must be an export: `trix-jax export` writes one. It has no {WEIGHTS} or {CONFIG}."
        )
    load(directory)  # refuses what does not fit together
    check_card(directory)
    api = HfApi(endpoint=endpoint)
    api.create_repo(repo, private=private, exist_ok=True)
    has_card = (directory / CARD).exists()
    keeps_card = not has_card and CARD in api.list_repo_files(repo)
    done = api.upload_folder(
        repo_id=repo,
        folder_path=directory,
        allow_patterns=[WEIGHTS, CONFIG, TOKENIZER, CARD],
        commit_message="Upload a trix_jax model",
    )
    if keeps_card:
        warnings.warn(
            f"{repo} keeps the card that it had, and this export has none: its numbers may be of other weights. `trix-jax export --card` writes one.",
            stacklevel=2,
        )
    return str(done.commit_url)
