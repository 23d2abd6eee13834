"""What a model costs before it runs: parameters, FLOPs, caches and memory, from shapes alone.

    zoo.cost("llava_1_5_7b", text_tokens=58).flops["prefill"].weights    # 8.38e12

FLOPs are those of matrix products and convolutions, two for every multiply and add, counted over
the program as JAX traces it, so that they hold for any composition and any policy. Products with
weights are told apart from those between activations (attention), because published tables count
the former only. Nothing is computed and no weight is made: a 7B model takes seconds on a laptop.
"""

import argparse
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr

from zoo.models.core import registry
from zoo.models.core.config import ModelConfig, with_dtype
from zoo.models.core.errors import UsageError
from zoo.models.core.tree import size_by_part
from zoo.models.core.types import Batch, Reserve, Tokens


@dataclass(frozen=True)
class Flops:
    """FLOPs of products with weights, and of these and all others."""

    weights: int = 0
    total: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.weights + other.weights, self.total + other.total)

    def __sub__(self, other: "Flops") -> "Flops":
        return Flops(self.weights - other.weights, self.total - other.total)

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.weights * times, self.total * times)


@dataclass(frozen=True)
class Cost:
    """What `cost` has found. FLOPs and bytes are those of the whole batch.

    Attributes:
      model: name of the model.
      batch: examples at once.
      text_tokens: tokens of text per example.
      vision_tokens: slots for vision tokens per example, those that the decoder's first layer sees.
      params: number of parameters by part, and `total`.
      flops: of `encode` (pictures to decoder tokens; of an image encoder or classifier, the whole
        forward pass, and there is nothing else), `prefill` (the decoder over the whole prompt,
        with logits at every position, as published tables have it; generating computes those of the
        last one only), of which these logits are `head`, and `decode_step` (one more token after
        that prompt).
      kv_bytes: of the keys and values that each layer keeps after the prefill, and their sum: those
        of a policy's layer are only those that it keeps.
      weight_bytes: of all parameters.
      activation_bytes: the most that the intermediate results of encoding and prefill take at a
        time if the compiler fuses nothing: an upper bound.
    """

    model: str
    batch: int
    text_tokens: int
    vision_tokens: int
    params: Mapping[str, int]
    flops: Mapping[str, Flops]
    kv_bytes: Mapping[str, Any]
    weight_bytes: int
    activation_bytes: int


def cost(
    model: str | ModelConfig,
    *,
    image_size: int | None = None,
    text_tokens: int | None = None,
    num_images: int | None = None,
    batch: int = 1,
    dtype: str = "bfloat16",
    budget: int | None = None,
    inputs: Batch | None = None,
    **overrides: Any,
) -> Cost:
    """Count what a model costs.

    Args:
      model: a name that `zoo.create` takes, or a configuration.
      image_size: side of the pictures in pixels; the model's own by default.
      text_tokens: tokens of text per example; by default those that the configuration names.
      num_images: pictures per example; 0 for text alone.
      batch: examples at once.
      dtype: of weights, activations and caches.
      budget: vision tokens per picture, where the model can vary them.
      inputs: arrays or shapes of a batch, in place of those that the configuration names; the sizes
        above that say what is in it are then left out.
      **overrides: settings of the model, as `zoo.create` takes them.

    Raises:
      UsageError: an unknown name or setting, a model that neither answers nor encodes images alone,
        or a size that it cannot take.
    """
    name = model if isinstance(model, str) else type(model).__name__
    for what, number, least in (("batch", batch, 1), ("num_images", num_images, 0)):
        if number is not None and number < least:
            raise UsageError(f"{what} is {number}: want {least} or more")
    try:
        width = jnp.dtype(dtype)
    except TypeError as error:
        raise UsageError(f"dtype is {dtype!r}: want a name such as bfloat16") from error
    if not jnp.issubdtype(width, jnp.number):
        raise UsageError(f"dtype is {dtype!r}: want a number's, such as bfloat16")
    if image_size is not None:
        overrides["image_size"] = image_size
    if num_images:
        overrides["num_images"] = num_images
    try:
        config = registry.config(model) if isinstance(model, str) else model
        if not isinstance(config, ModelConfig):
            raise UsageError(f"{name} is no model: there is nothing to count")
        config = with_dtype(registry.override(config, overrides, name), dtype)
        given = dict(config.inputs(batch))
        if inputs is not None:
            given = dict(jax.eval_shape(lambda x: x, dict(inputs)))
            batch = jax.tree.leaves(given)[0].shape[0]
        for unused in ("labels", "segments"):
            given.pop(unused, None)
        if num_images == 0:
            given = {key: given[key] for key in ("ids", "text_mask") if key in given}
        if set(given) == {"pixels"}:
            if text_tokens or num_images or budget:
                raise UsageError(f"{name} sees one image and reads no text: leave these settings")
            return _count_encoder(name, config.build(), given, batch, width)
        text = _resize_text(given, text_tokens)
        return _count(name, config.build(), given, text, batch, width, budget)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error


def _count(
    name: str,
    module: nn.Module,
    inputs: Batch,
    text_tokens: int,
    batch: int,
    dtype: Any,
    budget: int | None,
) -> Cost:
    if not hasattr(module, "prefill"):
        raise UsageError(f"{name} has no decoder: `zoo info` tells its parameters")
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), inputs))["params"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)

    def run(params: Any, *args: Any, method: Any, **options: Any) -> Any:
        return module.apply({"params": params}, *args, method=method, **options)

    def read(module: Any, inputs: Batch) -> tuple[jax.Array, Any]:
        """The final hidden states of a prompt, and what the layers keep of it."""
        stream, memory = module.stream(inputs, budget)
        stream, states, _ = module.decoder.run(stream, Reserve(), memory)
        return stream.hidden, states

    stream = functools.partial(run, method="stream", budget=budget)
    prefill = functools.partial(run, method="prefill", budget=budget)
    encode, _, (embedded, _) = _traced(stream, params, inputs)
    slots = embedded.slots
    encode = encode if slots else Flops()
    whole, activations, (hidden, kept) = _traced(
        functools.partial(run, method=read), params, inputs
    )
    head, _ = measure(functools.partial(run, method="head"), params, hidden)
    per_layer = list(layer_bytes(kept))
    _, cache = jax.eval_shape(functools.partial(prefill, room=1), params, inputs)
    token = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    step, _ = measure(functools.partial(run, method="decode"), params, token, cache)
    return Cost(
        model=name,
        batch=batch,
        text_tokens=text_tokens,
        vision_tokens=slots,
        params=size_by_part(shapes),
        flops={
            "encode": encode,
            "prefill": whole - encode + head,
            "head": head,
            "decode_step": step,
        },
        kv_bytes={"per_layer": per_layer, "total": sum(per_layer)},
        weight_bytes=sum(leaf.size * dtype.itemsize for leaf in jax.tree.leaves(shapes)),
        activation_bytes=activations,
    )


def _count_encoder(name: str, module: nn.Module, inputs: Batch, batch: int, dtype: Any) -> Cost:
    """The cost of a model that takes images only: of one forward pass."""
    made = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), inputs))
    shapes = made["params"]
    cast = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    variables = {**made, "params": cast}
    flops, activations, out = _traced(module.apply, variables, inputs)
    features = getattr(out, "features", None)
    return Cost(
        model=name,
        batch=batch,
        text_tokens=0,
        vision_tokens=0 if features is None else int(features.tokens.shape[-2]),
        params=size_by_part(shapes),
        flops={"encode": flops},
        kv_bytes={"per_layer": [], "total": 0},
        weight_bytes=sum(leaf.size * dtype.itemsize for leaf in jax.tree.leaves(shapes)),
        activation_bytes=activations,
    )


def _resize_text(inputs: dict[str, Any], text_tokens: int | None) -> int:
    """Give the text entries of a batch a length of `text_tokens` beside their placeholders."""
    images = inputs["sizes"].shape[1] if "sizes" in inputs else 0
    if not images and "pixels" in inputs:
        images = inputs["pixels"].shape[1]
    length = inputs["ids"].shape[1]
    if text_tokens is None:
        return length - images
    if text_tokens < 1:
        raise UsageError(f"text_tokens is {text_tokens}: want 1 or more")
    for key in ("ids", "text_mask"):
        if key in inputs:
            shape = (inputs[key].shape[0], text_tokens + images)
            inputs[key] = jax.ShapeDtypeStruct(shape, inputs[key].dtype)
    if "positions" in inputs:
        rows, old, axes = inputs["positions"].shape
        whole = (rows, old + text_tokens + images - length, axes)
        inputs["positions"] = jax.ShapeDtypeStruct(whole, inputs["positions"].dtype)
    return text_tokens


def main(argv: Sequence[str]) -> int:
    """Run `zoo cost`; prints a table or one JSON object.

    Raises:
      UsageError: as `cost`.
      SystemExit: after `--help`, and with status 2 for flags that are unknown or do not parse.
    """
    args = _parser().parse_args(argv)
    found = cost(
        args.name,
        image_size=args.image_size,
        text_tokens=args.text_tokens,
        num_images=args.num_images,
        batch=args.batch,
        dtype=args.dtype,
        budget=args.budget,
    )
    print(json.dumps(asdict(found), indent=2) if args.json else _table(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoo cost", description="Parameters, FLOPs, caches and memory of a model, by shapes."
    )
    parser.add_argument("name", metavar="NAME", help="a name that `zoo info` knows")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="side of the pictures")
    parser.add_argument("--text-tokens", type=int, metavar="N", help="tokens of text")
    parser.add_argument("--num-images", type=int, metavar="N", help="pictures; 0 for text alone")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="examples at once")
    parser.add_argument(
        "--dtype", default="bfloat16", help="of weights, activations and caches (%(default)s)"
    )
    parser.add_argument(
        "--budget", type=int, metavar="M", help="vision tokens per picture; by default all"
    )
    parser.add_argument("--json", action="store_true", help="print one object")
    return parser


def _table(found: Cost) -> str:
    """The lines that `zoo cost` prints for people."""
    kv = found.kv_bytes["per_layer"]
    same = f"{len(kv)} layers of {_bytes(kv[0])}" if len(set(kv)) == 1 else f"{len(kv)} layers"
    text = [f"{found.text_tokens} text tokens"] if kv else []
    cache = [f"  {'KV cache':<14}{_bytes(found.kv_bytes['total']):>18}   {same}"] if kv else []
    sizes = [f"batch {found.batch}", *text, f"{found.vision_tokens} vision tokens"]
    lines = [
        f"{found.model}: {', '.join(sizes)}",
        "",
        "parameters",
        *(f"  {part:<14}{number:>18,}" for part, number in found.params.items()),
        "",
        f"  {'FLOPs':<14}{'weights':>18}{'with attention':>18}",
        *(
            f"  {part.replace('_', ' '):<14}{_flops(each.weights):>18}{_flops(each.total):>18}"
            for part, each in found.flops.items()
        ),
        "",
        f"  {'weights':<14}{_bytes(found.weight_bytes):>18}",
        *cache,
        f"  {'activations':<14}{_bytes(found.activation_bytes):>18}   at most, nothing fused",
    ]
    return "\n".join(lines)


def _flops(number: int) -> str:
    for power, unit in ((12, "T"), (9, "G"), (6, "M")):
        if number >= 10**power:
            return f"{number / 10**power:,.3f} {unit}"
    return f"{number:,}"


def _bytes(number: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 1 << power:
            return f"{number / (1 << power):,.2f} {unit}"
    return f"{number} B"


def layer_bytes(states: Any) -> Iterator[int]:
    """Bytes of the arrays that each layer keeps, without the facts about tokens, in their order.

    `states` are in the layout of `zoo.models.parts.layers.stack.Stack`.
    """
    for state in states:
        if not isinstance(state, tuple):
            yield _kept(state)
            continue
        repeats = jax.tree.leaves(state)[0].shape[0]
        for _ in range(repeats):
            yield from (_kept(each) // repeats for each in state)


def _kept(state: Any) -> int:
    bare = jax.tree.map(
        lambda leaf: None if isinstance(leaf, Tokens) else leaf,
        state,
        is_leaf=lambda leaf: isinstance(leaf, Tokens),
    )
    arrays = [leaf for leaf in jax.tree.leaves(bare) if leaf.ndim > 1]  # cursors are no content
    return sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)


# ------------------------------------------------------------------ counting


def measure(function: Any, params: Any, *args: Any) -> tuple[Flops, int]:
    """FLOPs of `function(params, *args)`, and the most bytes its intermediate results take.

    Args:
      function: traced, not run.
      params: arrays or shapes; products with what is made of them alone count as `weights`.
      *args: arrays or shapes.
    """
    return _traced(function, params, *args)[:2]


def program_flops(program: ClosedJaxpr) -> int:
    """FLOPs of a traced program, without those that none of its results needs."""
    needed = [True] * len(program.jaxpr.outvars)
    jaxpr, _ = dce_jaxpr(program.jaxpr, needed, instantiate=True)
    return _walk(jaxpr, [False] * len(jaxpr.invars))[1].total


def _traced(function: Any, params: Any, *args: Any) -> tuple[Flops, int, Any]:
    """What `measure` returns, and the shapes of what the function does."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(params, *args)
    number = len(jax.tree.leaves(params))
    made = [i < number for i in range(len(closed.jaxpr.invars))]
    _, flops, peak = _walk(closed.jaxpr, made)
    return flops, peak, shapes


def _walk(jaxpr: Jaxpr, made: Sequence[bool]) -> tuple[list[bool], Flops, int]:
    """Go through a program.

    Args:
      jaxpr: the program.
      made: whether each input is made of weights and constants alone.

    Returns:
      the same for each output; the FLOPs; the most bytes of intermediate results at a time.
    """
    of_weights = dict(zip(jaxpr.invars, made, strict=True))
    of_weights |= dict.fromkeys(jaxpr.constvars, True)
    last_use = {
        var: number
        for number, eqn in enumerate(jaxpr.eqns)
        for var in eqn.invars
        if not isinstance(var, Literal)
    }
    last_use |= {var: len(jaxpr.eqns) for var in jaxpr.outvars if not isinstance(var, Literal)}
    flops, peak, live = Flops(), 0, 0
    inside: dict[Any, int] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        flags = [isinstance(var, Literal) or of_weights[var] for var in eqn.invars]
        out_flags, more, inner_peak = _equation(eqn, flags)
        flops += more
        of_weights |= dict(zip(eqn.outvars, out_flags, strict=True))
        for var in eqn.outvars:
            inside[var] = 0 if of_weights[var] else _nbytes(var.aval)
        live += sum(inside[var] for var in eqn.outvars)
        peak = max(peak, live + inner_peak)
        for var in {*eqn.outvars, *(v for v in eqn.invars if not isinstance(v, Literal))}:
            if last_use.get(var, -1) <= number and var in inside:
                live -= inside.pop(var)
    outs = [isinstance(var, Literal) or of_weights[var] for var in jaxpr.outvars]
    return outs, flops, peak


def _equation(eqn: Any, made: list[bool]) -> tuple[list[bool], Flops, int]:
    """What `_walk` returns, of one equation."""
    name, params = eqn.primitive.name, eqn.params
    same = [all(made)] * len(eqn.outvars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return same, _product(2 * depth * math.prod(eqn.outvars[0].aval.shape), made), 0
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        each = 2 * math.prod(kernel) // features
        return same, _product(each * math.prod(eqn.outvars[0].aval.shape), made), 0
    if name == "scan":
        return _scan(eqn, made)
    if name == "while":
        skip = params["cond_nconsts"]
        _, flops, peak = _walk(params["body_jaxpr"].jaxpr, made[skip:])
        if flops.total:
            raise UsageError("the program has products in a loop of unknown length")
        return [False] * len(eqn.outvars), flops, peak
    if name == "cond":
        found = [_walk(branch.jaxpr, made[1:]) for branch in params["branches"]]
        return max(found, key=lambda each: each[1].total)
    if name == "shard_map":  # what one device does
        outs, flops, peak = _walk(params["jaxpr"], made)
        axes = params["newly_manual_axes"]
        return outs, flops * math.prod(params["mesh"].shape[axis] for axis in axes), peak
    for value in params.values():
        inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
        if isinstance(inner, Jaxpr) and len(inner.invars) == len(made):
            return _walk(inner, made)
    return same, Flops(), 0


def _scan(eqn: Any, made: list[bool]) -> tuple[list[bool], Flops, int]:
    consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    flags = list(made)
    while True:  # what is carried is made of weights if it stays so
        outs, flops, peak = _walk(eqn.params["jaxpr"].jaxpr, flags)
        carried = [a and b for a, b in zip(flags[consts : consts + carries], outs)]
        if carried == flags[consts : consts + carries]:
            return outs, flops * eqn.params["length"], peak
        flags[consts : consts + carries] = carried


def _product(flops: int, made: list[bool]) -> Flops:
    return Flops(flops if any(made[:2]) else 0, flops)


def _nbytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0
