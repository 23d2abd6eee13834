"""What a model is asked in a comparison: the validation questions of an experiment, or prompts that
are made up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo.cache import cache_folder
from zoo.loaded import Loaded, Speaker
from zoo.loading import load
from zoo.models.core import registry
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError
from zoo.models.core.types import Batch
from zoo.models.parts.assemblies.qwen_vl import QwenVLConfig
from zoo.processors.chat import prompt
from zoo.processors.native import NativeSpec
from zoo.train.cli import find
from zoo.train.config import Experiment
from zoo.train.data.pipeline import Questions

QUESTION = "What is in this picture?"


@dataclass(frozen=True)
class Asked:
    """A batch of prompts.

    Attributes:
      batch: as the model takes it.
      valid: bool [B], the rows that count.
      answers: what is expected, "" where nothing is.
    """

    batch: Batch
    valid: np.ndarray
    answers: tuple[str, ...]


def opened(model: str, seed: int = 0) -> Loaded:
    """The model of a folder or a checkpoint; or, of a name that `zoo.create` takes, one with random
    weights.

    Raises:
      UsageError, ZooError: as `zoo.load`, or a name of something that does not answer.
    """
    if Path(model).is_dir() or (registry.base_slug(model) is None and not _is_system(model)):
        return load(model)
    config = registry.config(model)
    if not isinstance(config, ModelConfig) or not hasattr(config, "decoder"):
        raise UsageError(f"{model} does not answer prompts: want a vision-language model")
    module = config.build()
    inputs = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), dict(config.inputs(1)))
    params = nn.unbox(jax.jit(module.init)(jax.random.key(seed), inputs))["params"]
    return Loaded(Path(model), config, module, params, None, {"source": model})


def _is_system(name: str) -> bool:
    try:
        registry.resolve(name)
    except UsageError:
        return False
    return True


def questions(
    loaded: Loaded, data: str | Experiment, *, batch: int, limit: int | None = None
) -> list[Asked]:
    """The first validation questions of an experiment, or of the one with that name.

    Raises:
      UsageError: no experiment is called so, or the model has no tokenizer.
    """
    experiment = find(data) if isinstance(data, str) else data
    if not isinstance(experiment, Experiment):
        raise UsageError(f"data is {data!r}: want an experiment, such as digits_vqa")
    processor = loaded.speaker
    longest = max(len(prompt(processor.tokenizer, text)) for text in experiment.data.texts())
    processor = replace(processor, max_length=longest)
    folder = cache_folder() / "data"
    found = Questions(experiment.data, processor, batch, folder, limit=limit)
    return [Asked(each.batch, each.valid, tuple(each.answers)) for each in found]


def made_up(loaded: Loaded, *, batch: int, number: int = 1, seed: int = 0) -> list[Asked]:
    """Batches of smooth random pictures with one question; of a model without a tokenizer, random
    inputs of the shapes that it names.

    Raises:
      UsageError: a model without a tokenizer whose inputs are of another form than LLaVA's or
        Qwen-VL's.
    """
    rng = np.random.default_rng(seed)
    every, answers = np.ones(batch, bool), ("",) * batch
    if isinstance(loaded.processor, Speaker):
        found = []
        for _ in range(number):
            pictures = [_picture(rng) for _ in range(batch)]
            found.append(loaded.encode(pictures, [QUESTION] * batch))
    else:
        found = [_inputs(loaded.config, batch, rng) for _ in range(number)]
    return [Asked(each, every, answers) for each in found]


def _picture(rng: np.random.Generator) -> np.ndarray:
    """A picture [336, 336, 3] of a few coloured spots."""
    small = rng.integers(0, 256, (6, 6, 3), np.uint8)
    return np.asarray(np.kron(small, np.ones((56, 56, 1), np.uint8)), np.uint8)


def _inputs(config: Any, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random inputs of the shapes that a configuration names."""
    made: dict[str, np.ndarray] = {}
    if isinstance(config, QwenVLConfig):
        return _native(config, batch, rng)
    for name, spec in config.inputs(batch).items():
        if name in ("pixels", "crops"):
            made[name] = rng.normal(size=spec.shape).astype(np.float32)
        elif name == "ids":
            ids = rng.integers(0, config.decoder.vocab_size, spec.shape).astype(np.int32)
            ids[ids == config.image_id] += 1
            images = 1 if config.num_slots is not None or config.newline else config.num_images
            ids[:, 1 : 1 + images] = config.image_id
            made[name] = ids
        elif name == "text_mask":
            made[name] = np.ones(spec.shape, bool)
        elif name == "layout":
            line = np.arange(spec.shape[1], dtype=np.int32)
            made[name] = np.broadcast_to(line, spec.shape)
            made["sizes"] = np.full((batch, 1), spec.shape[1], np.int32)
        elif name == "tiles":
            made[name] = np.tile(np.int32([config.num_images, 0, 0]), (batch, 1, 1))
        elif name == "view_grid":
            made[name] = np.ones(spec.shape, np.int32)
        elif name not in ("labels", "segments", "sizes"):
            raise UsageError(
                f"{type(config).__name__} has inputs ({name}) that cannot be made up: want a "
                "checkpoint with a tokenizer"
            )
    return made


def _native(config: QwenVLConfig, batch: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A random picture of the size that a configuration names in each of some random texts."""
    spec, shape = NativeSpec.of(config), (1, config.image_size, config.image_size, 3)
    placeholders = config.image_id, config.video_id
    ids = rng.integers(0, min(placeholders), (batch, config.text_tokens))
    ids[:, 1] = config.image_id
    seen = [[spec.picture(rng.normal(size=shape).astype(np.float32))] for _ in range(batch)]
    return spec.batch(ids.tolist(), seen, placeholders=placeholders, pad=0)


def as_keeps(text: str) -> tuple[int | float, ...]:
    """The budgets of "192,128,0.25": numbers of tokens, and shares with a point.

    Raises:
      UsageError: something else.
    """
    try:
        found = tuple(float(part) if "." in part else int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--keep {text}: want numbers such as 192,128,64 or 0.5,0.25") from error
    return found


def as_methods(text: str) -> Sequence[str]:
    """The methods of "fastervlm,fastv", or all that there are.

    Raises:
      UsageError: no method is called so.
    """
    known = registry.reducers()
    if text == "all":
        return known
    found = text.split(",")
    if bad := [name for name in found if name not in known]:
        raise UsageError(f"--methods {','.join(bad)}: want all, or some of {', '.join(known)}")
    return found
