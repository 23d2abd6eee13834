"""A model with everything that it needs, ready to be asked."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, overload, runtime_checkable

import flax.linen as nn
import numpy as np

from zoo.convert.place import apart, flat_paths, nested, shardings_of, together
from zoo.convert.transfer import plan_transfer
from zoo.generate.autoregressive import Answers, Decoding, Reader, reading
from zoo.generate.sampling import Sampling
from zoo.generate.text import spoken
from zoo.images import Source
from zoo.models.core.compiled import jit
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError
from zoo.models.core.names import mesh_of, on_mesh_of
from zoo.models.core.registry import override
from zoo.models.core.types import Array, Batch
from zoo.models.parts.assemblies.dual import DualConfig
from zoo.models.parts.assemblies.language import LanguageModel
from zoo.processors.guide import by_first_question, question_of
from zoo.processors.vlm import Processor
from zoo.zeroshot import class_head

Images = Source | Sequence[Source] | None
"""What a prompt shows: one picture, several in the order of their places, or none."""

Prompt = str | Sequence[Mapping[str, Any]]
"""A question; or a conversation, a list of messages with `role` and `content`."""


@runtime_checkable
class Speaker(Protocol):
    """A processor of a model that answers."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        ...

    @property
    def byte_id(self) -> int | None:
        """The token of a byte that is in no character, where there are tokens for bytes."""
        ...

    def encode_prompt(self, images: Any, prompts: Any) -> Batch:
        """A batch of prompts, each with its pictures. For models with a reducer, which are given as
        `reducer`, it marks in `guide` the question by which one that reads text chooses.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer."""
        ...


@dataclass(frozen=True)
class Loaded:
    """A model with everything that it needs.

    Attributes:
      folder: where it was loaded from.
      config: builds the module.
      model: the Flax module.
      params: its parameters.
      processor: from pictures and text to batches, and from ids to text: a `Speaker` for a model
        that answers, None for a checkpoint without a tokenizer.
      about: where it is from, such as the experiment and the step.
      stats: its running statistics, such as those of batch norms; {} where it keeps none.
      decoding: how answers are decoded where it is not from the plain reading of the prompt alone.
      text_encoder: see `guided_by`.
    """

    folder: Path
    config: ModelConfig
    model: nn.Module
    params: Any
    processor: Any
    about: dict[str, Any]
    stats: Any = field(default_factory=dict)
    decoding: Decoding | None = None
    text_encoder: "Loaded | None" = None

    @property
    def variables(self) -> dict[str, Any]:
        """All that the module is applied to: `model.apply(variables, batch)`."""
        return {"params": self.params} | ({"stats": self.stats} if self.stats else {})

    @overload
    def generate(
        self,
        images: Images,
        prompts: Prompt,
        *,
        system: str | None = ...,
        raw: bool = ...,
        budget: int | Array | None = ...,
        max_new_tokens: int = ...,
        sampling: Sampling | None = ...,
        stop: Sequence[str] = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        images: Sequence[Images] | None,
        prompts: list[Prompt],
        *,
        system: str | None = ...,
        raw: bool = ...,
        budget: int | Array | None = ...,
        max_new_tokens: int = ...,
        sampling: Sampling | None = ...,
        stop: Sequence[str] = ...,
    ) -> list[str]: ...

    def generate(
        self,
        images: Images | Sequence[Images],
        prompts: Prompt | Sequence[Prompt],
        *,
        system: str | None = None,
        raw: bool = False,
        budget: int | Array | None = None,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> str | list[str]:
        """Answer one question or the last of a conversation, or a batch of them.

        Args:
          images: what is shown: a file, the bytes of one, a PIL image or an array; None for text
            alone. With several prompts, a list of what each shows.
          prompts: the question or the conversation, or a list of them.
          system: what the model is told before the conversation, where its template has a place for
            it.
          raw: the prompts are texts as the model reads them, control tokens and a placeholder for
            each picture included; no chat template is applied.
          budget: how many vision tokens a picture may take; by default all that the model has. A
            number has a program of its own; as an array (`jnp.int32(4)`) it shares one with others.
          max_new_tokens: where an answer is cut off at the latest.
          sampling: how tokens are chosen; by default the most likely ones.
          stop: strings that end an answer, which is cut off where the first of them begins.

        Returns:
          the answer, or a list of answers to a list of prompts.

        Raises:
          ZooError: a picture cannot be read, or a prompt is empty or too long.
          UsageError: pictures and places for them differ in number, or the model cannot take this
            budget.
        """
        batch = self.encode(images, prompts, system, raw)
        answers = self.answers(
            batch, budget=budget, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop
        )
        single = isinstance(prompts, str) or isinstance(prompts[0], Mapping)
        return answers[0] if single else answers

    def stream(
        self,
        images: Images,
        prompt: Prompt,
        *,
        system: str | None = None,
        raw: bool = False,
        budget: int | Array | None = None,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        every: int = 4,
    ) -> Iterator[str]:
        """Answer one question piece by piece; together the pieces are what `generate` returns.

        Args: as those of `generate`, and
          every: how many tokens are written between two pieces.

        Returns:
          an iterator of texts, which never end in the middle of a character, nor with what may turn
          out to be the beginning of a stop string.

        Raises:
          As `generate`.
        """
        batch = self.encode(images, prompt, system, raw)
        answers = self._begin(batch, budget, max_new_tokens, sampling)
        return _pieces(self._spoken(answers, stop, every))

    def with_(self, *, seed: int = 0, **overrides: Any) -> "Loaded":
        """The same parameters in a model with other settings; nothing is read or copied.

            model.with_(reducer="fastervlm", keep=64)

        Args:
          seed: of parameters that the settings add, which `about` then lists under "new"; those
            that have no place any more are listed under "unused".
          **overrides: settings of the model, as `zoo.create` takes them.

        Raises:
          UsageError: an unknown setting, or one that the parameters do not fit.
        """
        name = str(self.about.get("source", self.folder))
        try:
            config = override(self.config, overrides, name)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from error
        plan = plan_transfer(self.config, config, name)
        had = flat_paths(together(self.params, self.stats))
        flat = {path: leaf for path, leaf in had.items() if path not in plan.unused}
        about = {key: value for key, value in self.about.items() if key not in ("new", "unused")}
        if plan.new:
            flat |= plan.fresh(seed, shardings_of(plan.boxed, mesh_of(self.params)), None)
        if plan.new or plan.unused:
            about |= {"new": sorted(plan.new), "unused": sorted(plan.unused)}
        params, stats = apart(nested(flat))
        changed: dict[str, Any] = {"config": config, "params": params, "stats": stats}
        return replace(self, model=config.build(), about=about, **changed)

    def answers(
        self,
        batch: Batch,
        *,
        budget: int | Array | None = None,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Answer a batch of prompts, as `processor.encode_prompt` makes it.

        Args:
          batch: the prompts.
          budget: as in `generate`, or an array as `zoo.generate.autoregressive.generate` takes it.
          max_new_tokens: as in `generate`.
          sampling: as in `generate`.
          stop: as in `generate`.

        Raises:
          UsageError: the model cannot take this budget, or a prompt with the new tokens is longer
            than its context.
        """
        answers = self._begin(batch, budget, max_new_tokens, sampling)
        *_, texts = self._spoken(answers, stop)
        return texts

    def logits(self, batch: Batch, *, budget: int | Array | None = None) -> Array:
        """Float32 logits [B, L, V] of the token after each token of the expanded sequence.

        Args:
          batch: prompts, or whole conversations.
          budget: as in `answers`.

        Raises:
          UsageError: the model cannot take this budget.
        """
        reader, masked = reading(self.model, budget)
        inputs = {name: array for name, array in batch.items() if name != "labels"}
        with _refusing(budget), on_mesh_of(self.params):
            return _logits(reader, self.variables, inputs, masked)

    def encode(
        self,
        images: Any,
        prompts: Any,
        system: str | None = None,
        raw: bool = False,
        *,
        guide: Literal["last", "first"] = "last",
    ) -> Batch:
        """The batch of what `generate` is asked, as `answers` and `logits` take it. With a method
        that chooses vision tokens by the text, the batch says which text that is.

        Args:
          images: as in `generate`.
          prompts: as in `generate`.
          system: as in `generate`.
          raw: as in `generate`.
          guide: which question of a conversation chooses: the last one, or the first, so that later
            ones are asked of the vision tokens that were chosen for it.

        Raises:
          UsageError: as `generate`, or the method wants a vector of the text and there is no
            encoder that makes it.
        """
        if guide != "last":
            return by_first_question(partial(self.encode, system=system, raw=raw), images, prompts)
        speaker = self.speaker
        options: dict[str, Any] = {"system": system} if system is not None else {}
        options |= {"raw": True} if raw else {}
        if options and isinstance(speaker, Processor):
            what = "system text: leave it out" if system is not None else "other form of a prompt"
            raise UsageError(f"this model has learned no {what}")
        config: Any = self.config
        if not getattr(config, "reducing", False):
            return speaker.encode_prompt(images, prompts, **options)
        batch = speaker.encode_prompt(images, prompts, reducer=config.reducer, **options)
        if "guide_vector" in config.reducer.inputs(1):
            batch = {**batch, "guide_vector": self._vectors(prompts)}
        return batch

    def guided_by(self, encoder: "Loaded") -> "Loaded":
        """The same model for a method that chooses vision tokens by a vector of the question, which
        a dual encoder makes.

            clip = zoo.load("openai/clip-vit-large-patch14-336")
            model = model.with_(reducer=RecoverableCompression(embedding_dim=768)).guided_by(clip)

        Raises:
          UsageError: the encoder reads no texts.
        """
        if not isinstance(encoder.config, DualConfig):
            kind = type(encoder.config).__name__
            raise UsageError(f"a {kind} has no embeddings of texts: want a dual encoder, as CLIP")
        return replace(self, text_encoder=encoder)

    def _vectors(self, prompts: Any) -> np.ndarray:
        """The questions as the text encoder has them, float32 [B, P]."""
        if self.text_encoder is None:
            raise UsageError(
                f"{type(self.config.reducer).__name__} chooses vision tokens by a vector of the "  # type: ignore[attr-defined]
                "question: say by whose, with `guided_by(zoo.load('openai/clip-vit-…'))`, or make "
                "the batch yourself, with `guide_vector`"
            )
        single = isinstance(prompts, str) or isinstance(prompts[0], Mapping)
        questions = [question_of(prompt) for prompt in ([prompts] if single else prompts)]
        if not all(questions):
            raise UsageError("a prompt asks no question, by which vision tokens would be chosen")
        return class_head(self.text_encoder, questions, templates=("{}",))

    def reader(self, budget: int | Array | None = None) -> tuple[Reader, Array | None]:
        """What answers are decoded with, and the budget if it is data."""
        reader, masked = reading(self.model, budget)
        return (reader if self.decoding is None else self.decoding(reader)), masked

    @property
    def speaker(self) -> Any:
        """The processor, a `Speaker`.

        Raises:
          UsageError: this is no model that answers, or it has no tokenizer.
        """
        if not isinstance(self.model, LanguageModel):
            raise UsageError(f"{self.folder} holds a model that writes no text")
        if not isinstance(self.processor, Speaker):
            raise UsageError(
                f"{self.folder} has no tokenizer, so the model takes batches (`logits`) but no "
                "text: add the tokenizer's files to the checkpoint"
            )
        return self.processor

    def _spoken(
        self, answers: Answers, stop: Sequence[str], every: int | None = None
    ) -> Iterator[list[str]]:
        speaker = self.speaker
        return spoken(answers, speaker.decode, byte_id=speaker.byte_id, stop=stop, every=every)

    def _begin(
        self,
        batch: Batch,
        budget: int | Array | None,
        max_new_tokens: int,
        sampling: Sampling | None,
    ) -> Answers:
        """The answers, with their first tokens."""
        reader, masked = self.reader(budget)
        with _refusing(budget):
            return Answers(
                reader,
                self.variables,
                batch,
                max_new_tokens=max_new_tokens,
                eos_id=self.speaker.stop_ids,
                sampling=sampling,
                budget=masked,
            )


def _pieces(texts: Iterator[list[str]]) -> Iterator[str]:
    """What each text of a single row adds to the one before."""
    said = ""
    for [text] in texts:
        if len(text) > len(said):
            yield text[len(said) :]
            said = text


@contextlib.contextmanager
def _refusing(budget: int | Array | None) -> Iterator[None]:
    """Turn what a model raises about a budget that it cannot take into an error of the user's."""
    try:
        yield
    except ValueError as error:
        if budget is None:
            raise
        raise UsageError(str(error)) from error


@jit(static_argnames="reader")
def _logits(reader: Reader, variables: Any, batch: Batch, budget: Array | None) -> Array:
    return reader.logits(variables, batch, budget)
