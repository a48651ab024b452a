"""A small corpus, and a small run on it, for the tests of the training lane."""

import dataclasses
from pathlib import Path

import jax
import pytest

from trix_jax.lm.config import RunConfig, TrainConfig
from trix_jax.lm.data import DataConfig
from trix_jax.nn.transformer import TransformerConfig


def corpus_text() -> str:
    words = "the tile that matches a token best is the tile that computes it".split()
    rows = (f"{words[i % 13]} {words[i * 7 % 13]} {i * i % 97}" for i in range(700))
    return "\n".join(rows)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(corpus_text())
    return path


@pytest.fixture(scope="session")
def tiny_config(corpus) -> RunConfig:
    return RunConfig(
        arm="sparse",
        model=TransformerConfig(
            context=16,
            d_model=16,
            n_layers=1,
            n_heads=2,
            ffn="sparse",
            num_tiles=4,
            tiles_per_token=2,
        ),
        data=DataConfig(source="text", path=str(corpus), tokenizer="char"),
        train=TrainConfig(
            steps=10,
            batch_size=8,
            learning_rate=1e-2,
            warmup_steps=2,
            eval_every=5,
            rebuild_every=3,
        ),
    )


@pytest.fixture(scope="session")
def one_device() -> list[jax.Device]:
    return jax.devices()[:1]


@pytest.fixture(scope="session")
def run_dir(tiny_config, one_device, tmp_path_factory) -> Path:
    """A finished run of `tiny_config`; tests only read it."""
    from trix_jax.lm.train import train

    directory = tmp_path_factory.mktemp("run") / "run"
    train(tiny_config, directory, devices=one_device, report=lambda _: None)
    return directory


def with_train(config: RunConfig, **changes) -> RunConfig:
    train = dataclasses.replace(config.train, **changes)
    return dataclasses.replace(config, train=train)


def with_model(config: RunConfig, **changes) -> RunConfig:
    model = dataclasses.replace(config.model, **changes)
    return dataclasses.replace(config, model=model)
