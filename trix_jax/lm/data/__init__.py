"""Text to batches: sources of documents, tokenizers, the token store, `prepare`, and
the grain pipeline.

`prepare(DataConfig(), directory)` gives a `Store`; `train_batches(store.train, ...)`
and `eval_batches(store.val, ...)` read it.
"""

from trix_jax.lm.data.bpe import train_bpe
from trix_jax.lm.data.config import BPE_SIZE, DataConfig, check_typed, made_with
from trix_jax.lm.data.library_tokenizer import LibraryTokenizer
from trix_jax.lm.data.pipeline import (
    Sampler,
    batch_windows,
    check_context,
    eval_batches,
    eval_targets,
    read_window,
    train_batches,
)
from trix_jax.lm.data.prepare import prepare
from trix_jax.lm.data.sources import Source, infer_source, iter_documents
from trix_jax.lm.data.store import Split, Store, is_store, open_store
from trix_jax.lm.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    IdTokenizer,
    Tokenizer,
    load_tokenizer,
    own_tokenizer,
)

__all__ = [
    "BPE_SIZE",
    "ByteTokenizer",
    "CharTokenizer",
    "DataConfig",
    "IdTokenizer",
    "LibraryTokenizer",
    "Sampler",
    "Source",
    "Split",
    "Store",
    "Tokenizer",
    "batch_windows",
    "check_context",
    "check_typed",
    "eval_batches",
    "eval_targets",
    "infer_source",
    "is_store",
    "iter_documents",
    "load_tokenizer",
    "made_with",
    "open_store",
    "own_tokenizer",
    "prepare",
    "read_window",
    "train_batches",
    "train_bpe",
]
