"""Processors of published checkpoints: from pictures and prompts to batches, and back to text.

    processor = load_processor(folder, config)
    batch = processor.encode_prompt(["a.jpg", "b.jpg"], "What differs?")
    processor.expanded_ids(["a.jpg", "b.jpg"], "What differs?")    # one id per vision token

What a prompt becomes is what transformers makes of it. Two things differ on purpose: control tokens
that a user's text spells are ordinary characters unless `raw` is set, and nothing is ever cut off.
"""

import functools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.images import Source, read_image
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.parts.assemblies.dual import DualConfig
from zoo.models.parts.assemblies.language import CausalLMConfig
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.assemblies.qwen_vl import QwenVLConfig
from zoo.models.parts.reduce.base import Reducer
from zoo.models.parts.text.bert import BertConfig
from zoo.processors import guide
from zoo.processors.files import read_json
from zoo.processors.hub_text import HubTokenizer
from zoo.processors.image_config import read_views
from zoo.processors.lengths import bucket, text_length
from zoo.processors.native import NativeSpec
from zoo.processors.template import ChatTemplate, Message, find_template
from zoo.processors.views import AnyRes, Native, Single, Stretched, Tiled, Views
from zoo.processors.vision import NativeVision, TileVision, Vision

Batch = dict[str, np.ndarray]
Prompt = str | Sequence[Message]
"""A question, or a conversation."""

Pictures = Source | Sequence[Source] | None
"""The pictures of one prompt."""


class Encoded(NamedTuple):
    """A prompt: ids with one placeholder for each picture, what is seen of these, and which of the
    ids are the question.
    """

    ids: list[int]
    seen: list[Any]
    asked: list[bool]


@dataclass(frozen=True)
class HubProcessor:
    """Between prompts with pictures and the batches of a language model.

    Attributes:
      tokenizer: from text to ids.
      template: how a conversation is spelled out; None if the checkpoint has none.
      stop_ids: the tokens that end an answer.
      context: the most tokens that a prompt may have, with its pictures.
      vision: how pictures become arrays; None for a model that reads text alone.
      around_image: ids that are put before and behind every placeholder.
      folder: where it was read from.
    """

    tokenizer: HubTokenizer
    template: ChatTemplate | None
    stop_ids: tuple[int, ...]
    context: int
    vision: Vision | None
    around_image: tuple[int, int] | None
    folder: Path

    def encode_prompt(
        self,
        images: Pictures | Sequence[Pictures],
        prompts: Prompt | Sequence[Prompt],
        *,
        system: str | None = None,
        raw: bool = False,
        reducer: Reducer | None = None,
    ) -> Batch:
        """A batch of prompts, ready for generation.

        Args:
          images: the pictures of every prompt: None, one, or several in the order in which the
            prompt shows them. With a single prompt they stand by themselves.
          prompts: questions, which the chat template is applied to with the pictures before the
            question, or conversations, whose content says where the pictures stand. A single one
            may stand by itself.
          system: what the model is told before every conversation, where its template has a place
            for it.
          raw: the prompts are texts as the model reads them, special tokens and placeholders
            included; no template is applied.
          reducer: what leaves vision tokens out in the model. A prompt is then too long only if its
            text alone is; the model counts the tokens that remain. Where it reads the text, `guide`
            marks the question: of a conversation the last, of a raw prompt all of it. Where it
            leaves out padding, `shown` says where pictures lie in the squares they were set into.

        Returns:
          The arrays that `zoo.models.core.types` names, padded on the right, their lengths rounded
          up so that few shapes occur.

        Raises:
          UsageError: the numbers of pictures and placeholders differ, there is no prompt, or none
            of the question that the reducer reads.
          ZooError: a picture cannot be read, or a prompt is empty or too long.
        """
        rows = self._encoded(images, prompts, system, raw, reducer)
        ids, seen = [row.ids for row in rows], [row.seen for row in rows]
        if self.vision is None:
            return _padded(ids, self.pad, text_length(max(map(len, ids))))
        batch = self.vision.batch(ids, seen, self.pad)
        if reducer is not None and reducer.reads_text:
            batch["guide"] = np.zeros(batch["ids"].shape, bool)
            for line, row in zip(batch["guide"], rows, strict=True):
                line[: len(row.asked)] = row.asked
        if reducer is not None and reducer.skips_padding and isinstance(self.vision, TileVision):
            batch |= self.vision.shown(seen)
        return batch

    def expanded_ids(
        self,
        images: Pictures | Sequence[Pictures],
        prompts: Prompt | Sequence[Prompt],
        *,
        system: str | None = None,
        raw: bool = False,
    ) -> list[list[int]]:
        """The ids of every prompt with one placeholder for each vision token, as the processors of
        transformers return them, without padding. Arguments as in `encode_prompt`.
        """
        rows = self._encoded(images, prompts, system, raw, None)
        return [self._expanded(row) for row in rows]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of an answer, up to the first token that ends it, without special tokens."""
        answer = []
        for number in map(int, ids):
            if number in self.stop_ids:
                break
            answer.append(number)
        return self.tokenizer.decode(answer)

    @property
    def byte_id(self) -> int | None:
        """See `HubTokenizer.byte`: a text that this token changes was not settled."""
        return self.tokenizer.byte

    @property
    def pad(self) -> int:
        """The id that stands in padding, which nothing reads."""
        return next((i for i in (self.tokenizer.pad, *self.stop_ids) if i is not None), 0)

    def padded(self) -> "HubProcessor":
        """The same, but pictures are set in a square of the mean colour before all else, where it
        would cut out their middle.

        Raises:
          UsageError: a picture is not one tile here.
        """
        views = getattr(self.vision, "views", None)
        if not isinstance(views, Single):
            raise UsageError(f"{self.folder} does not see a picture as one square: nothing to pad")
        views = replace(views, pipeline=replace(views.pipeline, square=True))
        return replace(self, vision=replace(self.vision, views=views))  # type: ignore[type-var]

    @property
    def _in_squares(self) -> bool:
        views = getattr(self.vision, "views", None)
        return isinstance(views, Single) and views.pipeline.square

    def save(self, folder: str | Path) -> None:
        """Write all that `load_processor` needs into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _save_settings(self.folder, folder)
        if self._in_squares:
            _say_squares(folder)
        self.tokenizer.save(folder)
        if self.template is not None:
            (folder / "chat_template.jinja").write_text(self.template.source, "utf-8")
        stops = {"eos_token_id": list(self.stop_ids)}
        (folder / "generation_config.json").write_text(json.dumps(stops) + "\n", "utf-8")

    def _encoded(
        self,
        images: Pictures | Sequence[Pictures],
        prompts: Prompt | Sequence[Prompt],
        system: str | None,
        raw: bool,
        reducer: Reducer | None,
    ) -> list[Encoded]:
        pairs, rows = _pairs(images, prompts), []
        for number, (prompt, shown) in enumerate(pairs, 1):
            try:
                rows.append(self._row(prompt, shown, system, raw, reducer))
            except ZooError as error:
                if len(pairs) == 1:
                    raise
                raise type(error)(f"prompt {number}: {error}") from error
        return rows

    def _row(
        self,
        prompt: Prompt,
        shown: list[Source],
        system: str | None,
        raw: bool,
        reducer: Reducer | None,
    ) -> Encoded:
        if shown and self.vision is None:
            raise UsageError("this model reads text alone: leave the pictures out")
        if isinstance(prompt, str) and not prompt.strip():
            raise UsageError("the prompt is empty: say what you want to know")
        if raw and not isinstance(prompt, str):
            raise UsageError("a raw prompt is a conversation: want a text")
        if isinstance(prompt, str) and (raw or self.template is None):
            text, around = self._plain(prompt, raw, bool(shown), system), True
            question = [(0, len(text))]
        else:
            reads = reducer is not None and reducer.reads_text
            text, around = self._rendered(prompt, len(shown), system, reads)
            text, question = guide.unmarked(text)
        ids, places = self.tokenizer.locate_marked(text, around=around)
        asked = [guide.inside(place, question) for place in places]
        found = 0
        if self.vision is not None:
            if self.vision.video_id in ids:
                raise UsageError(
                    "the prompt shows a video, and pictures alone are read: show some of its "
                    "frames as pictures"
                )
            found = ids.count(self.vision.image_id)
            if self.around_image is not None:
                ids, asked = self._surrounded(ids, asked)
        if found != len(shown):
            name = "" if self.vision is None else f" {self.tokenizer.token(self.vision.image_id)}"
            raise UsageError(
                f"the prompt has {found} placeholders{name} for {len(shown)} pictures: want one "
                "for each, in the order of the pictures"
            )
        alone = len(shown) == 1
        seen = [self.vision.see(read_image(picture), alone=alone) for picture in shown]
        if shown and reducer is not None and reducer.reads_text:
            guide.check(asked, reducer)
        row = Encoded(ids, seen, asked)
        if (length := len(ids if reducer is not None else self._expanded(row))) > self.context:
            counted = "" if reducer is not None else " with its pictures"
            raise ZooError(
                f"the prompt has {length} tokens{counted} and the model takes {self.context}: "
                "shorten it or show less"
            )
        return row

    def _plain(self, prompt: str, raw: bool, shown: bool, system: str | None) -> str:
        """The text of a prompt that no template is applied to, control tokens marked or not."""
        if system is not None:
            raise UsageError("no chat template is applied, so nothing can say what `system` is for")
        if shown and not raw:
            raise UsageError(
                "this checkpoint has no chat template, which would say where pictures stand: "
                "write the whole prompt as the model reads it, and pass raw=True (--raw)"
            )
        return prompt if raw else self.tokenizer.mark(prompt)

    def _rendered(
        self, prompt: Prompt, num_images: int, system: str | None, find: bool
    ) -> tuple[str, bool]:
        """The text of a conversation, its question marked if it is to be found, and whether special
        tokens are still to be put around it.
        """
        if self.template is None:
            raise UsageError("this checkpoint has no chat template for a conversation: give a text")
        pictures = [{"type": "image"}] * num_images
        messages = list(prompt)
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": self._content(prompt, pictures)}]
        if system is not None:
            messages = [{"role": "system", "content": self._content(system, [])}, *messages]
        if find:
            messages = guide.marked(messages)
        text = self.template.render(self.tokenizer.mark(messages, self.template.source))
        if not text.strip():
            raise UsageError("the conversation is empty: say what you want to know")
        if self.vision is None:  # templates of language models spell everything out
            return text, False
        bos = self.template.names.get("bos_token")
        return text, bos is None or not text.startswith(bos)

    def _content(self, text: str, pictures: list[Message]) -> str | list[Message]:
        """What a turn says, in the form that the templates of this sort of model expect."""
        return text if self.vision is None else [*pictures, {"type": "text", "text": text}]

    def _surrounded(self, ids: list[int], asked: list[bool]) -> tuple[list[int], list[bool]]:
        before, after = self.around_image
        image, new = self.vision.image_id, []
        for each, guides in zip(ids, asked, strict=True):
            picture = [(before, False), (each, False), (after, False)]
            new += picture if each == image else [(each, guides)]
        return [each for each, _ in new], [guides for _, guides in new]

    def _expanded(self, row: Encoded) -> list[int]:
        if self.vision is None:
            return row.ids
        image, counts = self.vision.image_id, map(self.vision.num_tokens, row.seen)
        return [i for x in row.ids for i in ([x] * next(counts) if x == image else (x,))]


@dataclass(frozen=True)
class PairProcessor:
    """Between pictures and texts and the batches of encoders, of which a model has one or both.

    Attributes:
      views: how pictures become pixels; None for a model that reads text alone.
      tokenizer: from text to ids; None for a model that sees pictures alone.
      max_length: the most tokens of a text.
      fixed: whether every text is padded to `max_length` and all of it is read; otherwise texts are
        padded to a common length and `text_mask` says what is read.
      folder: where it was read from.
    """

    views: Single | None
    tokenizer: HubTokenizer | None
    max_length: int
    fixed: bool
    folder: Path

    def encode(
        self,
        images: Source | Sequence[Source] | None = None,
        texts: str | Sequence[str] | None = None,
    ) -> Batch:
        """Pictures and texts, in any numbers.

        Returns:
          pixels [B, H, W, 3] float32; ids [T, L] int32 and, unless texts are of one length,
          text_mask [T, L] bool; what was not given is absent.

        Raises:
          UsageError: the model reads no pictures, or no texts.
          ZooError: a picture cannot be read, or a text is empty or too long.
        """
        batch: Batch = {}
        if images is not None:
            batch["pixels"] = self._pixels([images] if isinstance(images, Source) else images)
        if texts is not None:
            batch |= self._ids([texts] if isinstance(texts, str) else texts)
        if not batch:
            raise UsageError("got neither pictures nor texts: want at least one of them")
        return batch

    def save(self, folder: str | Path) -> None:
        """Write all that `load_processor` needs into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _save_settings(self.folder, folder)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    def _pixels(self, images: Sequence[Source]) -> np.ndarray:
        if self.views is None:
            raise UsageError("this model reads text alone: leave the pictures out")
        if not len(images):
            raise UsageError("got no pictures: want at least one")
        return np.concatenate([self.views.tiles(read_image(image)) for image in images])

    def _ids(self, texts: Sequence[str]) -> Batch:
        if self.tokenizer is None:
            raise UsageError("this model sees pictures alone: leave the texts out")
        if not len(texts):
            raise UsageError("got no texts: want at least one")
        rows = []
        for text in texts:
            if not text.strip():
                raise ZooError("a text is empty: say what the picture may show")
            rows.append(self.tokenizer.encode(text))
            if len(rows[-1]) > self.max_length:
                raise ZooError(
                    f"a text has {len(rows[-1])} tokens and the model takes {self.max_length}: "
                    f"shorten {text!r}"
                )
        length = max(map(len, rows))
        length = self.max_length if self.fixed else min(self.max_length, bucket(length))
        batch = _padded(rows, self.tokenizer.pad or 0, length)
        return {"ids": batch["ids"]} if self.fixed else batch


AnyProcessor = HubProcessor | PairProcessor


@functools.singledispatch
def _make(config: ModelConfig, folder: Path) -> AnyProcessor:
    raise UsageError(f"a {type(config).__name__} has no processor: prepare its batches yourself")


def load_processor(folder: str | Path, config: ModelConfig) -> AnyProcessor:
    """The processor of a checkpoint in the layout of Hugging Face.

    Args:
      folder: holds the tokenizer's files, `preprocessor_config.json` or `processor_config.json`,
        and perhaps a chat template and `generation_config.json`.
      config: of the model, as `zoo.models.core.registry.read_hf` reads it.

    Raises:
      ZooError: a file is missing or damaged, or does not fit the model.
      UsageError: a file asks for something that this code does not do.
    """
    try:
        return _make(config, Path(folder))
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise ZooError(
            f"{folder}: a file of the tokenizer or the image processor has a value that means "
            f"nothing ({type(error).__name__}: {error})"
        ) from error


@_make.register
def _(config: CausalLMConfig, folder: Path) -> HubProcessor:
    return _language(folder, config.decoder.context, None)


@_make.register
def _(config: QwenVLConfig, folder: Path) -> HubProcessor:
    tower = config.tower
    views = _expect(read_views(folder), Native)
    cut = (tower.patch_size, tower.temporal_patch_size, tower.merge_size)
    if cut != (views.patch_size, views.temporal_patch_size, views.merge_size):
        raise ZooError(
            f"{folder}: patches are {views.patch_size} x {views.patch_size} pixels of "
            f"{views.temporal_patch_size} frames, merged by {views.merge_size}, and the model has "
            f"{cut}: the two are not of one checkpoint"
        )
    vision = NativeVision(views, NativeSpec.of(config), config.image_id, config.video_id)
    return _language(folder, config.decoder.context, vision)


@_make.register
def _(config: LlavaConfig, folder: Path) -> HubProcessor:
    views = _expect(read_views(folder), Single | AnyRes | Tiled)
    _check_side(views, config.tower.image_size, folder)
    vision = _tile_vision(config, views, folder)
    processor = _language(folder, config.decoder.context, vision)
    names = processor.tokenizer.names
    ends = [names.get(f"{end}_image_token") for end in ("start", "end")]
    if isinstance(views, Tiled) and None not in ends:
        around = tuple(map(processor.tokenizer.id, ends))
        return replace(processor, around_image=around)
    return processor


@_make.register
def _(config: DualConfig, folder: Path) -> PairProcessor:
    views = _expect(read_views(folder), Single)
    _check_side(views, config.vision.image_size, folder)
    tokenizer = HubTokenizer.load(folder)
    text = config.text
    return PairProcessor(views, tokenizer, text.max_length, text.pool == "last", folder)


@_make.register
def _(config: ClassifierConfig, folder: Path) -> PairProcessor:
    return PairProcessor(_expect(read_views(folder), Single), None, 0, False, folder)


@_make.register
def _(config: BertConfig, folder: Path) -> PairProcessor:
    return PairProcessor(None, HubTokenizer.load(folder), config.max_length, False, folder)


def _tile_vision(config: LlavaConfig, views: Single | AnyRes | Tiled, folder: Path) -> TileVision:
    """How tiles are read, if the pictures' settings fit the model."""
    tokens, grid, crops = config.tile_tokens, config.tower.grid, config.crops
    settings = read_json(folder / "processor_config.json")
    if config.newline and crops is not None and isinstance(views, Single):
        if not crops.square:
            raise UsageError(
                f"{folder}: the model sees a picture in rows of tiles, and crops of every tile, "
                "which is square: want a policy whose crops make a square"
            )
        side = config.tower.image_size
        views = Stretched(views.pipeline, side, max_tiles=crops.number, zoom=crops.side)
    if isinstance(views, AnyRes | Stretched) != config.newline:
        has = "has a" if config.newline else "has no"
        raise ZooError(
            f"{folder}: a {type(views).__name__} is made of a picture and the model {has} newline "
            "vector, which goes with rows of tiles: the two are not of one checkpoint"
        )
    told = settings.get("image_seq_length", tokens)
    if isinstance(views, Tiled) and told != tokens:
        raise ZooError(
            f"{folder}: image_seq_length is {told} and the model makes {tokens} tokens of a tile: "
            "the two are not of one checkpoint"
        )
    if crops is not None and not isinstance(views, Single | Stretched):
        raise UsageError(
            f"{folder}: the model sees crops of every image, which are made of pictures that are "
            f"one tile only; those of a {type(views).__name__} are several"
        )
    if not isinstance(views, AnyRes | Stretched):
        return TileVision(views, config.image_id, tokens, grid, crops=crops)
    if tokens != grid[0] * grid[1]:
        raise UsageError(
            f"{folder}: a tile has {tokens} tokens, which are no grid of {grid[0]} x {grid[1]}: "
            "tokens beside the patches cannot be put into rows"
        )
    if isinstance(views, Stretched):
        return TileVision(views, config.image_id, tokens, grid, crops=crops)
    limit = settings.get("vision_aspect_ratio", "anyres_max_9") if views.several else None
    return TileVision(views, config.image_id, tokens, grid, limit and _anyres_max(limit))


def _language(folder: Path, context: int, vision: Vision | None) -> HubProcessor:
    tokenizer = HubTokenizer.load(folder)
    if vision is not None:
        tokenizer.token(vision.image_id)  # or the two are not of one checkpoint
    source = find_template(folder)
    template = None if source is None else ChatTemplate(source, tokenizer.names)
    return HubProcessor(
        tokenizer, template, _stop_ids(folder, tokenizer), context, vision, None, folder
    )


def _stop_ids(folder: Path, tokenizer: HubTokenizer) -> tuple[int, ...]:
    """The ids that end an answer, by the first place that names one."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    places = (read_json(folder / "generation_config.json"), config, text)
    for values in places:
        stop = values.get("eos_token_id") if isinstance(values, Mapping) else None
        if stop is not None:
            return tuple(stop) if isinstance(stop, list) else (int(stop),)
    return () if tokenizer.eos is None else (tokenizer.eos,)


def _expect(views: Views, kind: Any) -> Any:
    if not isinstance(views, kind):
        raise ZooError(
            f"the image processor is one that makes a {type(views).__name__} of a picture, which "
            "this model does not take: the two are not of one checkpoint"
        )
    return views


def _check_side(views: Single | AnyRes | Tiled, side: int, folder: Path) -> None:
    made = views.tiles(np.zeros((side, side, 3), np.uint8)).shape[1:3]
    if made != (side, side):
        raise ZooError(
            f"{folder}: pictures become {made[0]} x {made[1]} pixels and the model takes "
            f"{side} x {side}: the two are not of one checkpoint"
        )


def _anyres_max(ratio: str) -> int:
    """The 9 of "anyres_max_9"."""
    number = ratio.removeprefix("anyres_max_")
    if not number.isdigit():
        raise UsageError(f"vision_aspect_ratio is {ratio!r}: want anyres_max_N")
    return int(number)


def _pairs(
    images: Pictures | Sequence[Pictures], prompts: Prompt | Sequence[Prompt]
) -> list[tuple[Prompt, list[Source]]]:
    """Every prompt with its pictures."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], Mapping)):
        return [(prompts, _listed(images))]
    if not len(prompts):
        raise UsageError("got no prompts: want at least one")
    if images is None:
        images = [None] * len(prompts)
    if isinstance(images, Source) or len(images) != len(prompts):
        count = 1 if isinstance(images, Source) else len(images)
        raise UsageError(
            f"got pictures for {count} prompts and {len(prompts)} prompts: want as many entries, "
            "None where a prompt has no picture"
        )
    return [(prompt, _listed(shown)) for prompt, shown in zip(prompts, images, strict=True)]


def _listed(shown: Pictures) -> list[Source]:
    if shown is None:
        return []
    return [shown] if isinstance(shown, Source) else [image for image in shown if image is not None]


def _padded(rows: Sequence[Sequence[int]], pad: int, length: int) -> Batch:
    ids = np.full((len(rows), length), pad, np.int32)
    mask = np.zeros(ids.shape, bool)
    for line, seen, row in zip(ids, mask, rows, strict=True):
        line[: len(row)], seen[: len(row)] = row, True
    return {"ids": ids, "text_mask": mask}


def _save_settings(source: Path, folder: Path) -> None:
    """Copy how pictures are prepared."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)


def _say_squares(folder: Path) -> None:
    """Let the settings in `folder` say that pictures are set in squares, as LLaVA's class reads."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        values = read_json(folder / name)
        fields = values if name.startswith("pre") else values.get("image_processor")
        if fields and not fields.get("do_pad"):
            fields |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
