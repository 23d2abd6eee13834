"""A checkpoint here and in the code that it was made for: what comes out of every layer.

Needs torch and transformers, which nothing else in this package imports.
"""

import importlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from zoo.convert.export import export
from zoo.convert.folder import is_checkpoint, read_config
from zoo.convert.hub import folder_of
from zoo.loaded import Loaded
from zoo.loading import load
from zoo.models.core.errors import ZooError
from zoo.models.core.keytable import Row, Table
from zoo.models.core.registry import base
from zoo.models.parts.assemblies.language import LanguageModel
from zoo.models.parts.layers.stack import Stack
from zoo.processors.hf import HubProcessor

QUESTION = "What is shown here?"

_OUTPUTS = {
    "logits": ("logits", "logits_per_image"),
    "image": ("image_embeds",),
    "text": ("text_embeds",),
    "tokens": ("last_hidden_state",),
}
"""{output of ours: names that theirs may have}."""

_SAME = 1e-4
"""Relative difference up to which two token sequences are taken for the same."""


@dataclass(frozen=True)
class Line:
    """One comparison: the largest difference, and the largest value of the original."""

    name: str
    error: float
    scale: float


@dataclass(frozen=True)
class Report:
    """All comparisons, in the order of the computation, and the class that they are made with."""

    original: str
    lines: tuple[Line, ...]

    @property
    def worst(self) -> float:
        """The largest of all errors, relative to the scale of its line."""
        return max(line.error / max(line.scale, 1e-12) for line in self.lines)


def verify(source: str | Path) -> Report:
    """Run both codes on the same picture and text in float32 and compare them layer by layer.

    A model that reads pictures in prompts is shown one, through its own processor; what the
    processor of the original makes of the prompt is compared too, by its outcome, but for the
    rounding of pixels. A checkpoint without a tokenizer gets random ids.

    Args:
      source: a Hugging Face folder or hub name, or a converted model, which is exported first.

    Raises:
      ZooError: torch or transformers is not installed, or the original cannot be loaded.
      UsageError: as `zoo.load`.
    """
    torch, transformers = _originals()
    ours = load(source, dtype="float32")
    folder = folder_of(source)
    with tempfile.TemporaryDirectory() as scratch:
        if not is_checkpoint(folder):
            folder = Path(export(ours.folder, Path(scratch) / "original").folder)
        config = read_config(folder)
        theirs = _load_original(torch, transformers, folder, config)
        batch, inputs = _inputs(torch, transformers, ours, folder, theirs.config)
        found, stacks = _run_ours(ours, batch)
        wanted, layers = _run_theirs(
            torch, theirs, inputs, _homes(base(ours.about["base"]).table(ours.config))
        )
    lines = [line for name, run in stacks.items() for line in _layers(name, run, layers.get(name))]
    lines += _outputs(found, wanted)
    return Report(type(theirs).__name__, tuple(lines))


def _originals() -> tuple[Any, Any]:
    try:
        return importlib.import_module("torch"), importlib.import_module("transformers")
    except ImportError as error:
        raise ZooError(
            f"zoo verify compares with the original code and needs it ({error}): "
            "pip install torch transformers"
        ) from error


def _load_original(torch: Any, transformers: Any, folder: Path, config: Mapping[str, Any]) -> Any:
    """The original model in float32, of the class that its configuration names."""
    name = (config.get("architectures") or ["AutoModel"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ZooError(f"transformers {transformers.__version__} has no class {name}: update it")
    try:
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        return cls.from_pretrained(folder, local_files_only=True, **options).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ZooError(f"transformers cannot load {folder}: {error}") from error


def _inputs(
    torch: Any, transformers: Any, ours: Loaded, folder: Path, config: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same picture and text for both: our batch, and the keyword arguments of the original."""
    processor = ours.processor
    if isinstance(processor, HubProcessor) and processor.vision and processor.template:
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": content}]
        batch = processor.encode_prompt([[_picture()]], [messages])
        theirs = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
        text = theirs.apply_chat_template(messages, add_generation_prompt=True)
        made = theirs(text=[text], images=[_pil(_picture())], return_tensors="pt")
        inputs = {name: made[name] for name in made if name != "num_patches"}
        return batch, {**inputs, "pixel_values": _our_pixels(torch, batch, made["pixel_values"])}
    if isinstance(processor, HubProcessor):
        batch = processor.encode_prompt([None], [QUESTION])
    elif processor is not None:
        wanted = ours.config.inputs(1)
        images = [_picture()] if "pixels" in wanted else None
        batch = processor.encode(images, [QUESTION] if "ids" in wanted else None)
    else:
        batch = _random(ours, config)
    return batch, _translated(torch, batch)


def _our_pixels(torch: Any, batch: Mapping[str, Any], theirs: Any) -> Any:
    """Our pixels in the shape of theirs: which kind of resampling their processor uses, and how it
    rounds, depends on what is installed beside it.
    """
    pixels = batch["patches"] if "patches" in batch else np.moveaxis(batch["pixels"], -1, -3)
    flat = np.asarray(pixels)[0]
    count = theirs.numel() // flat[0].size
    return torch.tensor(np.ascontiguousarray(flat[:count])).reshape(theirs.shape)


def _picture() -> np.ndarray:
    """A picture [150, 210, 3] uint8 of waves, blocks and noise, the same every time."""
    y, x = np.mgrid[:150, :210]
    waves = 127 + 60 * np.sin(x / 17 + np.arange(3)[:, None, None]) * np.cos(y / 11)
    blocks = 40 * ((x // 30 + y // 25) % 2)
    noise = np.random.default_rng(0).normal(0, 8, (3, 150, 210))
    return np.clip(waves + blocks + noise, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def _pil(picture: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(picture)


def _random(ours: Loaded, config: Any) -> dict[str, Any]:
    """A batch without a processor: random pixels, and random ids without placeholders."""
    wanted = ours.config.inputs(1)
    rng = np.random.default_rng(0)
    batch: dict[str, Any] = {}
    text = config.get_text_config()
    if "ids" in wanted:
        length = min(24, wanted["ids"].shape[1])
        ids = rng.integers(0, text.vocab_size, (1, length), np.int32)
        special = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
        ids[np.isin(ids, [i for i in special if i is not None])] = 0
        end = getattr(text, "eos_token_id", None)
        if isinstance(end, int) and end < text.vocab_size:
            ids[ids == end] = 0
            ids[:, -1] = end  # where encoders of text read their vector
        batch |= {"ids": ids, "text_mask": np.ones(ids.shape, bool)}
    if "pixels" in wanted and not isinstance(ours.model, LanguageModel):
        batch["pixels"] = rng.standard_normal(wanted["pixels"].shape, np.float32)
    return batch


def _translated(torch: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without placeholders as arguments of transformers."""
    inputs = {}
    if "ids" in batch:
        mask = np.asarray(batch.get("text_mask", np.ones_like(batch["ids"], bool)))
        length = int(mask.sum(-1).max())
        inputs["input_ids"] = torch.tensor(np.asarray(batch["ids"])[:, :length], dtype=torch.long)
    if "pixels" in batch:
        pixels = np.asarray(batch["pixels"])
        inputs["pixel_values"] = torch.tensor(np.ascontiguousarray(np.moveaxis(pixels, -1, -3)))
    return inputs


def _run_ours(
    ours: Loaded, batch: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, list[np.ndarray]]]:
    """{output: array} and, for every stack, the tokens [n, D] before and behind each layer."""

    def forward(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        out = model(batch)
        if isinstance(model, LanguageModel):
            return {"logits": model.head(out.hidden), "valid": out.tokens.valid}
        return {name: getattr(out, name) for name in _OUTPUTS if hasattr(out, name)}

    @jax.jit
    def run(variables: Any, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        seen: dict[str, list[Any]] = {}

        def watch(
            call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext
        ) -> Any:
            if not isinstance(context.module, Stack) or context.method_name != "__call__":
                return call(*args, **kwargs)
            path = "/".join(context.module.path)
            stream, _, memory = (*args, None, None)[:3]
            start, stop = kwargs.get("start", 0), kwargs.get("stop")
            aux: tuple = ()
            seen.setdefault(path, [(stream.hidden, stream.tokens.valid)])
            for step in range(start, len(context.module.steps) if stop is None else stop):
                stream, _, each = call(stream, None, memory, start=step, stop=step + 1)
                seen[path].append((stream.hidden, stream.tokens.valid))
                aux += each
            return stream, None, aux

        with nn.intercept_methods(watch):
            found = ours.model.apply(variables, batch, method=forward)
        return found, seen

    found, seen = jax.device_get(run(ours.variables, dict(batch)))
    valid = found.pop("valid", None)
    if valid is not None:
        found["logits"] = found["logits"][valid]
    layers = {path: [hidden[valid] for hidden, valid in run] for path, run in seen.items()}
    return {name: array for name, array in found.items() if array is not None}, layers


def _homes(table: Table) -> dict[str, str]:
    """{path of a stack of ours: prefix of its layers in the original's names}."""
    homes = {}
    for row in table.rows:
        if not isinstance(row, Row) or row.steps is None:
            continue
        path = row.paths if isinstance(row.paths, str) else row.paths[0]
        if "stack/" not in path:  # blocks that are no stream of tokens
            continue
        key = row.keys if isinstance(row.keys, str) else row.keys[0]
        stack = path[: path.index("stack/") + len("stack")]
        homes.setdefault(stack, key.partition(".{}")[0])
    return homes


def _run_theirs(
    torch: Any, model: Any, inputs: Mapping[str, Any], homes: Mapping[str, str]
) -> tuple[Any, dict[str, list[np.ndarray]]]:
    """Their outputs and, for every stack of ours, their tokens [n, D] as in `_run_ours`."""
    seen: dict[str, list[np.ndarray]] = {}

    def keep(name: str, value: Any) -> None:
        hidden = value[0] if isinstance(value, tuple) else value
        array = hidden.detach().float().numpy()
        seen.setdefault(name, []).append(array.reshape(-1, array.shape[-1]))

    def before(name: str) -> Any:
        return lambda _, args, kwargs: keep(name, args[0] if args else kwargs["hidden_states"])

    def behind(name: str) -> Any:
        return lambda _, args, out: keep(name, out)

    for name, prefix in homes.items():
        layers = _closest(torch, model, prefix)
        layers[0].register_forward_pre_hook(before(name), with_kwargs=True)
        for layer in layers:
            layer.register_forward_hook(behind(name))
    with torch.no_grad():
        return model(**inputs), seen


def _closest(torch: Any, model: Any, prefix: str) -> Any:
    """The list of layers whose name has most in common with that in the checkpoint."""
    wanted = set(prefix.split("."))
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
    }
    name = max(lists, key=lambda name: (len(wanted & set(name.split("."))), -len(name)))
    return lists[name]


def _layers(name: str, ours: list[np.ndarray], theirs: list[np.ndarray] | None) -> list[Line]:
    """A line per layer; the original may run more of them, or the tokens in another order."""
    if theirs is None or ours[0].shape != theirs[0].shape:
        return []  # the original did not run it, or not on these tokens
    order = _order(ours[0], theirs[0])
    part = name.removesuffix("/stack")
    pairs = zip(ours, theirs)
    return [
        _line(f"{part} layer {number}" if number else f"{part} input", x[order], y)
        for number, (x, y) in enumerate(pairs)
    ]


def _order(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Which token of ours is each of theirs, by what enters the first layer."""
    same = np.arange(len(ours))
    if np.abs(ours - theirs).max() <= _SAME * np.abs(theirs).max():
        return same
    distance = (ours**2).sum(-1) - 2 * theirs @ ours.T  # of each of theirs, but for a constant
    nearest = distance.argmin(-1)
    return nearest if len(set(nearest.tolist())) == len(nearest) else same


def _outputs(found: Mapping[str, np.ndarray], wanted: Any) -> list[Line]:
    lines = []
    for name, array in found.items():
        theirs = next((wanted[key] for key in _OUTPUTS[name] if wanted.get(key) is not None), None)
        if theirs is not None:
            other = theirs.detach().float().numpy()
            lines.append(_line(name, np.asarray(array).reshape(other.shape), other))
    return lines


def _line(name: str, ours: np.ndarray, theirs: np.ndarray) -> Line:
    error = float(np.abs(ours.astype(np.float32) - theirs).max())
    return Line(name, error, float(np.abs(theirs).max()))
