"""Text to batches: sources of documents, tokenizers, the token store, `prepare`, and
the grain pipeline.

`prepare(DataConfig(), directory)` gives a `Store`; `train_batches(store.train, ...)`
and `eval_batches(store.val, ...)` read it.
"""

from trix_jax.lm.data.config import DataConfig, check_typed, made_with
from trix_jax.lm.data.pipeline import (
    Sampler,
    batch_windows,
    check_context,
    eval_batches,
    read_window,
    train_batches,
)
from trix_jax.lm.data.prepare import prepare
from trix_jax.lm.data.sources import Source, infer_source, iter_documents
from trix_jax.lm.data.store import Split, Store, is_store, open_store
from trix_jax.lm.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "DataConfig",
    "Sampler",
    "Source",
    "Split",
    "Store",
    "Tokenizer",
    "batch_windows",
    "check_context",
    "check_typed",
    "eval_batches",
    "infer_source",
    "is_store",
    "iter_documents",
    "load_tokenizer",
    "made_with",
    "open_store",
    "prepare",
    "read_window",
    "train_batches",
    "train_bpe",
]
