"""A model and a data set that train in a second, and a command that trains them.

`python -m tests.train.tiny OUT [field=value ...]` is what the tests kill, stop and run on one
device; with `recipe` in place of the fields, the stages of `tiny_recipe`. Each record takes
`$SECONDS_PER_RECORD`.
"""

import ast
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from zoo.models.core import codec
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import ZooError
from zoo.models.core.types import IGNORE, Batch, Tokens
from zoo.train.config import Experiment, ProcessorConfig, Recipe
from zoo.train.data.sources import DataConfig
from zoo.train.objectives import NextToken
from zoo.train.optim import OptimConfig
from zoo.train.parts import Part


@struct.dataclass
class Output:
    hidden: jax.Array
    tokens: Tokens
    aux: tuple[dict[str, jax.Array], ...] = ()


class TinyModel(nn.Module):
    """Each token sees itself and the first `budget` columns of the picture."""

    width: int

    def setup(self) -> None:
        table = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "vocab_embed"))
        kernel = nn.with_logical_partitioning(nn.initializers.normal(0.1), ("embed", "mlp"))
        back = nn.with_logical_partitioning(nn.initializers.normal(0.1), ("mlp", "embed"))
        self.table = self.param("embedding", table, (320, self.width))
        self.up = self.param("up", lambda *a: {"kernel": kernel(*a)}, (self.width, 4 * self.width))
        self.down = self.param(
            "down", lambda *a: {"kernel": back(*a)}, (4 * self.width, self.width)
        )
        self.scale = self.param("norm", lambda _: {"scale": jnp.ones(self.width)})["scale"]

    def __call__(self, batch: Batch, *, budget: int | None = None) -> Output:
        x = self.table[batch["ids"]]
        seen = batch["pixels"][..., :budget, :].mean((1, 2, 3, 4))
        x = x + seen[:, None, None]
        x = x + nn.gelu(x @ self.up["kernel"]) @ self.down["kernel"]
        if self.is_initializing():
            self.head(x)
        label = jnp.pad(batch["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
        tokens = Tokens.sequence(batch["text_mask"], label=label)
        return Output(x * self.scale, tokens)

    def head(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.table.T


@dataclass(frozen=True)
class TinyConfig(ModelConfig):
    width: int = 8
    text_tokens: int = 24
    image_size: int = 8

    def build(self) -> TinyModel:
        return TinyModel(self.width)

    def inputs(self, batch_size: int) -> Batch:
        text = (batch_size, self.text_tokens)
        return {
            "pixels": jax.ShapeDtypeStruct(
                (batch_size, 1, self.image_size, self.image_size, 3), jnp.float32
            ),
            "ids": jax.ShapeDtypeStruct(text, jnp.int32),
            "labels": jax.ShapeDtypeStruct(text, jnp.int32),
            "text_mask": jax.ShapeDtypeStruct(text, jnp.bool_),
        }


@dataclass(frozen=True)
class TinyData(DataConfig):
    """Pictures of one shade, and how light it is. Record number `bad` cannot be read."""

    records: int = 40
    bad: int = -1

    def source(self, split: str, data_dir: Any) -> Any:
        return _Source(self)

    def texts(self) -> Iterable[str]:
        return ("how light is it?", *map(str, range(10)))


@dataclass(frozen=True)
class _Source:
    config: TinyData

    def __len__(self) -> int:
        return self.config.records

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        time.sleep(float(os.environ.get("SECONDS_PER_RECORD", "0")))
        if index == self.config.bad:
            raise ZooError(f"record {index} is broken")
        shade = index % 10
        return {
            "id": str(index),
            "image": np.full((8, 8, 3), 25 * shade, np.uint8),
            "conversations": (("how light is it?", str(shade)),),
            "kinds": ("",),
        }


def tiny(**changes: Any) -> Experiment:
    """A run of 12 steps with `changes`."""
    experiment = Experiment(
        name="tiny",
        model=TinyConfig(),
        data=TinyData(),
        steps=12,
        batch_size=8,
        objective=NextToken(budgets=(2, 8)),
        processor=ProcessorConfig(vocab_size=300),
        optim=OptimConfig(lr=1e-2, warmup=2, weight_decay=0.01),
        log_every=1,
        save_every=4,
        keep=2,
    )
    return replace(experiment, **changes)


def tiny_recipe(**changes: Any) -> Recipe:
    """Two stages of 6 and 8 steps, with `changes` in both."""
    align = tiny(
        name="align",
        steps=6,
        objective=NextToken(),
        parts=(Part("(embedding|norm).*", frozen=True), Part("(up|down).*")),
        **changes,
    )
    instruct = tiny(name="instruct", steps=8, seed=1, data=TinyData(records=30), **changes)
    return Recipe("tiny", (align, instruct))


def find_here(name: Any, find: Any = codec._find) -> Any:
    """In place of `codec._find`, which knows the classes of the package alone."""
    own = {codec._name(cls): cls for cls in (TinyConfig, TinyData)}
    return own.get(name) or find(name)


if __name__ == "__main__":
    from zoo.train.loop import train
    from zoo.train.recipe import train_recipe

    # What this file defines is called `__main__` here, and must have the name that tests know.
    for cls in (TinyConfig, TinyData):
        cls.__module__ = "tests.train.tiny"
    codec._find = find_here
    out, *settings = sys.argv[1:]
    try:
        if settings == ["recipe"]:
            result = train_recipe(tiny_recipe(), out)
        else:
            given = (setting.split("=") for setting in settings)
            changes = {name: ast.literal_eval(value) for name, value in given}
            result = train(tiny(**changes), out)
    except ZooError as error:
        sys.exit(f"zoo: {error}")
    sys.exit(128 + result.stopped if result.stopped else 0)
