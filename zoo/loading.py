"""A trained model from the folder that it was saved in, ready to be asked."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file

from zoo.generate.autoregressive import generate
from zoo.images import Source
from zoo.models.core.codec import decode
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.tree import flatten_dict, unflatten_dict
from zoo.models.core.types import Array, Batch
from zoo.processors.vlm import Processor
from zoo.saving import CONFIG, LAYOUT, MODEL, PARAMS
from zoo.whole import MANIFEST, check


@dataclass(frozen=True)
class Loaded:
    """A model with everything that it needs.

    Attributes:
      folder: where it was loaded from.
      config: builds the module.
      model: the Flax module.
      params: its parameters; `model.apply({"params": params}, batch)`.
      processor: from pictures and text to batches, and from ids to text.
      about: where it is from, such as the experiment and the step.
    """

    folder: Path
    config: ModelConfig
    model: nn.Module
    params: Any
    processor: Processor
    about: dict[str, Any]

    def generate(
        self,
        image: Source | None,
        prompt: str,
        *,
        budget: int | None = None,
        max_new_tokens: int = 64,
    ) -> str:
        """Answer one question about one picture.

        Args:
          image: a file, the bytes of one, a PIL image or an array; None for text alone.
          prompt: the question.
          budget: how many vision tokens the picture may take; by default all that the model has.
          max_new_tokens: where an answer is cut off at the latest.

        Raises:
          ZooError: the picture cannot be read, or the prompt is empty or too long.
          UsageError: the model cannot take this budget.
        """
        batch = self.processor.encode_prompt(image, prompt)
        return self.answers(batch, budget=budget, max_new_tokens=max_new_tokens)[0]

    def answers(
        self, batch: Batch, *, budget: int | Array | None = None, max_new_tokens: int = 64
    ) -> list[str]:
        """Answer a batch of prompts, as `processor.encode_prompt` makes it.

        Args:
          batch: the prompts.
          budget: as in `generate`, or an array as `zoo.generate.autoregressive.generate` takes it.
          max_new_tokens: as in `generate`.

        Raises:
          UsageError: the model cannot take this budget.
        """
        eos = self.processor.tokenizer.eos
        options: dict[str, Any] = {"eos_id": eos, "max_new_tokens": max_new_tokens}
        try:
            ids = generate(self.model, self.params, batch, budget=budget, **options)
        except ValueError as error:
            if budget is None:
                raise
            raise UsageError(str(error)) from error
        return [self.processor.decode(row) for row in np.asarray(ids)]


def load(folder: str | Path) -> Loaded:
    """Load a trained model.

    Args:
      folder: of a training run, or what `zoo.saving.save_model` has written.

    Raises:
      ZooError: there is no model (then with how far its training is), or it is damaged, of another
        version, or not the one that its configuration describes.
    """
    folder = _find(Path(folder))
    if problem := check(folder):
        raise ZooError(
            f"the model in {folder} cannot be used: {problem}; copy it again, or delete it and run "
            "the training command again, which writes it anew"
        )
    file = folder / CONFIG
    described = json.loads(file.read_text("utf-8"))
    if described.get("layout") != LAYOUT:
        raise ZooError(
            f"{file}: its layout is {described.get('layout')!r} and this version reads {LAYOUT}: "
            "load it with the version that wrote it"
        )
    config = decode(described["model"])
    if not isinstance(config, ModelConfig):
        raise ZooError(f"{file} describes no model")
    model, processor = config.build(), Processor.load(folder)
    return Loaded(folder, config, model, _params(folder, config), processor, described["about"])


def _params(folder: Path, config: ModelConfig) -> Any:
    """The parameters, if they are exactly those that the configuration asks for."""
    file = folder / PARAMS
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ZooError(f"{file} cannot be read: {error}") from error
    variables = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))
    shapes = flatten_dict(nn.unbox(variables)["params"])
    wanted = {"/".join(path): leaf.shape for path, leaf in shapes.items()}
    problems = [f"  {name} is missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"  {name} is not in the model" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"  {name} is {found[name].shape}, want {wanted[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name].shape != wanted[name]
    ]
    if problems:
        listed = "\n".join(problems)
        raise ZooError(f"{file} does not fit the model that {CONFIG} describes:\n{listed}")
    return unflatten_dict({tuple(name.split("/")): leaf for name, leaf in found.items()})


def _find(folder: Path) -> Path:
    """The folder of the model: `folder` itself, or a part of the run that it belongs to."""
    if (folder / MANIFEST).is_file():
        return folder
    if (folder / MODEL).is_dir():
        return folder / MODEL
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ZooError(f"{folder} {what}: name the folder of a training run")
    checkpoints = [path.name for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    if not checkpoints and not (folder / "metrics.jsonl").exists():
        raise ZooError(f"{folder} holds no model: name the folder of a training run")
    step = max(map(int, checkpoints), default=0)
    raise ZooError(
        f"{folder} holds no finished model yet: {_progress(folder, step)}; run the same training "
        "command again to finish it"
    )


def _progress(folder: Path, step: int) -> str:
    try:
        steps = int(json.loads((folder / "config.json").read_text("utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"its training has reached step {step}"
    return f"its training has reached step {step} of {steps}"
