"""What fewer tokens are worth on the clock: `python benchmarks/pillars.py [--out FILE]`.

A dense LLaVA against the same model with a Matryoshka Query Transformer (at two budgets), p-MoD,
γ-MoD and DeepStack: reading prompts with one picture each (*prefill*, with the tower), answering
(*decoding*), both together (*answer*), and one training step. All take turns on the same machine,
in float32, with random weights, which decide little about time: p-MoD and γ-MoD compute a fixed
share of a prompt's tokens, whichever they are. (Where γ-MoD skips a layer in decoding depends on
them: FLOPs and bytes are counted as if it never did.)

Beside each ratio of times stands that of FLOPs, counted over the very program that is timed, and
how far the one is from the other. Decoding reads all weights and caches for every token, and is
bound by memory unless many prompts share the weights: beside its ratio of times stands that of the
bytes too. What is to be expected of an answer follows from the dense model's times: prefill shrinks
as its FLOPs do, decoding as its bytes. A ratio above 1 says that the method is faster, or needs
less, than the dense model.

With the default size and rounds it takes seven minutes on two cores of a server. The batch is what
makes prefill dominate an answer, as it does where models are served.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.timing import Runs, machine, report, take_turns, timed
from tests.models.draw import draw
from zoo.convert.place import flat_paths, nested
from zoo.costing import layer_bytes, measure
from zoo.models.connectors.deepstack import DeepStack
from zoo.models.connectors.mqt import MQT
from zoo.models.core.compiled import jit
from zoo.models.core.names import tree_names
from zoo.models.decoders.gamma_mod import GammaMoD
from zoo.models.decoders.p_mod import PMoD
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.towers.vit import ViTConfig

IMAGE_ID = 3
PREFILL, DECODING, STEP = "prefill", "decoding", "training_step"


@dataclass(frozen=True)
class Size:
    """How large everything is; the decoder dominates.

    Attributes:
      width: of the decoder.
      depth: of the decoder.
      kv_heads: of the decoder; every head has 64 channels.
      vocab: of the decoder.
      image: side of the picture in pixels; patches are 14 wide.
      tower_width: of the tower.
      tower_depth: of the tower, whose last layer is not run.
      text: tokens of a prompt's text.
      new: tokens of an answer.
      budgets: of the Matryoshka Query Transformer; the last is the number of its queries.
      batch: prompts at once.
      step_batch: examples of a training step.
    """

    width: int = 768
    depth: int = 8
    kv_heads: int = 3
    vocab: int = 8_000
    image: int = 336
    tower_width: int = 256
    tower_depth: int = 3
    text: int = 64
    new: int = 64
    budgets: tuple[int, ...] = (64, 256)
    batch: int = 10
    step_batch: int = 2


TINY = Size(32, 5, 1, 128, 56, 16, 2, 8, 4, (4, 9), 2, 1)


def contestants(size: Size) -> dict[str, tuple[LlavaConfig, int | None]]:
    """{name: configuration and budget}; "dense" is what the others are compared with."""
    tower = ViTConfig(
        image_size=size.image,
        width=size.tower_width,
        depth=size.tower_depth,
        num_heads=2,
        mlp_dim=4 * size.tower_width,
    )
    decoder = DecoderConfig(
        vocab_size=size.vocab,
        width=size.width,
        depth=size.depth,
        num_heads=max(1, size.width // 64),
        num_kv_heads=size.kv_heads,
        mlp_dim=11 * size.width // 4,
    )
    dense = LlavaConfig(tower, decoder=decoder, image_id=IMAGE_ID, text_tokens=size.text + 1)
    mqt = dataclasses.replace(dense, connector=MQT(num_queries=size.budgets[-1], num_heads=2))
    policies = {
        "p_mod": PMoD(),
        # So that of few layers as many skip tokens as of the published models' 32: three quarters.
        "gamma_mod": GammaMoD("first_last_dense", text_prefix=1, capacity=0.5),
        "deepstack": DeepStack(),
    }
    return {
        "dense": (dense, None),
        **{f"mqt {m}": (mqt, m) for m in size.budgets},
        **{n: (dataclasses.replace(dense, policies=(p,)), None) for n, p in policies.items()},
    }


@dataclass(frozen=True)
class Contestant:
    """A model with weights; those that it shares with the dense one are the same arrays."""

    config: LlavaConfig
    budget: int | None
    boxed: Any
    params: Any

    def batch(self, size: int) -> dict[str, Any]:
        """So many prompts with one picture each."""
        rng = np.random.default_rng(0)
        made = {}
        for name, spec in self.config.inputs(size).items():
            if spec.dtype == jnp.float32:
                made[name] = rng.normal(size=spec.shape).astype(np.float32)
        text = self.config.text_tokens
        made["ids"] = rng.integers(4, self.config.decoder.vocab_size, (size, text), np.int32)
        made["ids"][:, 1] = IMAGE_ID
        return made

    def prefill(self, new: int) -> Any:
        """Weights and prompts to the logits of the first token of each answer, and caches with room
        for `new` tokens.
        """
        options = {"room": new, "budget": self.budget, "method": "prefill"}
        model = self.config.build()
        return lambda params, batch: model.apply({"params": params}, batch, **options)

    def decode(self, new: int) -> Any:
        """Weights and what a prefill returns to greedy answers of `new` tokens, [new, B, 1]."""
        model = self.config.build()

        def answers(params: Any, start: tuple[jax.Array, Any]) -> jax.Array:
            def turn(carry: Any, _: None) -> Any:
                logits, cache = carry
                token = logits.argmax(-1)[:, None].astype(jnp.int32)
                return model.apply({"params": params}, token, cache, method="decode"), token

            return jax.lax.scan(turn, start, None, length=new)[1]

        return answers

    def step(self, params: Any, batch: Any) -> Any:
        """The parameters after one step of gradient descent on all tokens of the text."""
        model = self.config.build()

        def loss(params: Any) -> jax.Array:
            variables = {"params": params}
            out = model.apply(variables, {**batch, "labels": batch["ids"]}, budget=self.budget)
            logits = model.apply(variables, out.hidden, method="head")
            label = out.tokens.tags["label"]
            safe = jnp.maximum(label, 0)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
            extra = [x for report in out.aux for n, x in report.items() if n.endswith("_loss")]
            return jnp.mean(jnp.where(label >= 0, each, 0)) + sum(extra)

        grads = jax.grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)


def enter(size: Size, only: list[str]) -> dict[str, Contestant]:
    """The contestants of these names, and the dense one."""
    every = contestants(size)
    return share({n: every[n] for n in every if not only or n.split()[0] in (*only, "dense")})


def share(chosen: Mapping[str, tuple[LlavaConfig, int | None]]) -> dict[str, Contestant]:
    """Configurations and budgets with weights; those of the same name and shape are the same."""
    found: dict[str, Contestant] = {}
    shared: dict[str, Any] = {}
    for name, (config, budget) in chosen.items():
        boxed = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
        wanted = flat_paths(nn.unbox(boxed))
        kept = {
            p: shared[p] for p, x in wanted.items() if p in shared and shared[p].shape == x.shape
        }
        new = flat_paths(draw(nested({p: x for p, x in wanted.items() if p not in kept})))
        shared |= {path: jnp.asarray(leaf) for path, leaf in new.items()}
        params = nested({path: shared[path] for path in wanted})
        found[name] = Contestant(config, budget, boxed, params)
    return found


def run(size: Size, rounds: int, only: list[str]) -> dict[str, Any]:
    """All that the benchmark finds out at one size."""
    entered = enter(size, only)
    rows = {name: each.params for name, each in entered.items()}
    if jax.default_backend() == "cpu":  # as `zoo.load` lays parameters out for inference
        rows = unstack_once(entered)
    runs: Runs = {}
    flops: dict[str, dict[str, int]] = {PREFILL: {}, DECODING: {}, STEP: {}}
    read: dict[str, int] = {}
    for name, each in entered.items():
        sizes = (size.batch, size.step_batch)
        prompts, examples = (jax.device_put(each.batch(n)) for n in sizes)
        prefill, decode, step = each.prefill(size.new), each.decode(size.new), each.step
        start = jax.eval_shape(prefill, rows[name], prompts)
        read[name] = bytes_of_a_step(rows[name], start[1])
        flops[PREFILL][name] = measure(prefill, rows[name], prompts)[0].total
        flops[DECODING][name] = measure(decode, rows[name], start)[0].total
        flops[STEP][name] = measure(step, each.params, examples)[0].total
        runs |= runs_of(name, (prefill, decode, step), (rows[name], each.params), prompts, examples)
    times = take_turns(runs, rounds)
    found = {
        phase: {
            kind: {name: each[f"{phase}/{name}"] for name in entered}
            for kind, each in times.items()
        }
        for phase in flops
    }
    return summary(found, flops, read)


def runs_of(
    name: str, programs: tuple[Any, Any, Any], params: tuple[Any, Any], prompts: Any, examples: Any
) -> Runs:
    """The three phases of a contestant, of which decoding follows upon its latest prefill."""
    (prefill, decode, step), (rows, stacked) = map(jit, programs), params
    start: list[Any] = [None]

    def read() -> Any:
        start[0] = None  # room for the next one
        start[0] = prefill(rows, prompts)
        return start[0]

    return {
        f"{PREFILL}/{name}": timed(read),
        f"{DECODING}/{name}": timed(lambda: decode(rows, start[0])),
        f"{STEP}/{name}": timed(lambda: step(stacked, examples)),
    }


def summary(
    times: Mapping[str, Mapping[str, Mapping[str, float]]],
    flops: Mapping[str, Mapping[str, int]],
    read: Mapping[str, int],
) -> dict[str, Any]:
    """What is reported of each phase, and of prefill and decoding together.

    Args:
      times: of each phase, the seconds of each kind (fastest, median) of each contestant.
      flops: of each phase and contestant.
      read: bytes of weights and caches that each contestant reads for a new token of every prompt.
    """
    parts = (PREFILL, DECODING)
    names = list(read)
    answer = {
        kind: {name: sum(times[part][kind][name] for part in parts) for name in names}
        for kind in times[PREFILL]
    }
    together = {name: sum(flops[part][name] for part in parts) for name in names}
    found = {phase: {**times[phase], **ratios(times[phase], flops[phase])} for phase in flops}
    found["answer"] = {**answer, **ratios(answer, together)}

    fewer_bytes = {name: read["dense"] / read[name] for name in names}
    found[DECODING]["bytes_read_per_step"] = dict(read)
    found[DECODING]["times_fewer_bytes"] = rounded(fewer_bytes)
    prefill, decoding = (times[part]["seconds"]["dense"] for part in parts)
    fewer = {name: flops[PREFILL]["dense"] / flops[PREFILL][name] for name in names}
    expected = {name: prefill / fewer[name] + decoding / fewer_bytes[name] for name in names}
    found["answer"]["times_faster_expected"] = rounded(
        {name: (prefill + decoding) / seconds for name, seconds in expected.items()}
    )
    return {phase: found[phase] for phase in (*parts, "answer", STEP)}


def ratios(times: Mapping[str, Mapping[str, float]], flops: Mapping[str, int]) -> dict[str, Any]:
    """FLOPs, how many times less of them and of time each needs than the dense one, and by which
    part the latter differs from the former.
    """
    best = times["seconds"]
    faster = {name: best["dense"] / best[name] for name in flops}
    fewer = {name: flops["dense"] / flops[name] for name in flops}
    return {
        "flops": dict(flops),
        "times_faster": rounded(faster),
        "times_fewer_flops": rounded(fewer),
        "off": rounded({name: faster[name] / fewer[name] - 1 for name in flops}),
    }


def rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    """The same with three digits."""
    return {name: round(number, 3) for name, number in numbers.items()}


def bytes_of_a_step(params: Any, cache: Any) -> int:
    """Bytes of weights and caches that a new token of every prompt makes the decoder read; of the
    vocabulary's table it needs a row.
    """
    parts = {name: part for name, part in params["decoder"].items() if name != "embedding"}
    return sum(leaf.nbytes for leaf in jax.tree.leaves(parts)) + sum(layer_bytes(cache.states))


def unstack_once(entered: dict[str, Contestant]) -> dict[str, Any]:
    """The parameters with the rows of stacked ones apart, each made once."""
    made: dict[int, Any] = {}

    def apart(leaf: Any) -> Any:
        if id(leaf) not in made:
            made[id(leaf)] = tuple(leaf)
        return made[id(leaf)]

    return {
        name: jax.tree.map(
            lambda axes, leaf: apart(leaf) if axes and axes[0] == "layers" else leaf,
            tree_names(each.boxed),
            each.params,
            is_leaf=lambda axes: isinstance(axes, tuple),
        )
        for name, each in entered.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Run everything and write what came out, with machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a size that says nothing, for tests")
    parser.add_argument("--only", nargs="*", default=[], help="of: mqt p_mod gamma_mod deepstack")
    parser.add_argument("--batch", type=int, help="prompts at once")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    size = TINY if args.tiny else Size()
    if args.batch is not None:
        size = dataclasses.replace(size, batch=args.batch)
    found = {
        **machine(jax),
        "dtype": "float32",
        "size": dataclasses.asdict(size),
        **run(size, args.rounds, args.only),
    }
    report(found, args.out)


if __name__ == "__main__":
    main()
