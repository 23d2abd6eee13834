"""DeepStack: how crops become groups, where they are added, and what they leave as it was."""

import dataclasses
import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import zoo
from tests.models.draw import draw
from tests.models.test_systems import random_batch, shapes
from tests.processors.test_hub import write_checkpoint
from zoo.cli import main
from zoo.models.connectors.deepstack import DeepStack, DeepStackV, Levels, Views
from zoo.models.connectors.mqt import MQT
from zoo.models.core import registry
from zoo.models.core.errors import UsageError
from zoo.models.core.names import tree_names
from zoo.models.core.types import Stream, Tokens
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.connect.crops import Crops, deal
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.decoders.policies import AddTap, wrap
from zoo.models.parts.layers.block import Block
from zoo.models.parts.layers.plan import Step, layers
from zoo.models.parts.layers.stack import Stack, unstack
from zoo.models.parts.towers.vit import ViTConfig
from zoo.processors import Processor, Tokenizer, tiling
from zoo.processors.hf import load_processor
from zoo.processors.vlm import Rows
from zoo.saving import save_model
from zoo.train.config import ProcessorConfig
from zoo.train.data.chats import Chats

ROOM = 2
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


# Groups.


@pytest.mark.parametrize("grid", [(2, 2), (1, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("sampling", ["2d", "1d", "grid"])
def test_groups_by_hand(grid, sampling):
    """Slices of the map of all crops; groups that there are no crops for are zeros."""
    (h, w), side, groups = grid, (3, 2), 4
    tokens = np.random.default_rng(0).normal(size=(groups, 6, 5)).astype(np.float32)
    rows = [np.concatenate(tokens[i * w : i * w + w].reshape(w, *side, 5), 1) for i in range(h)]
    whole = np.concatenate(rows)  # [3 h, 2 w, 5]
    want = np.zeros_like(tokens)
    for group in range(h * w):
        want[group] = {
            "2d": whole[group // w :: h, group % w :: w].reshape(-1, 5),
            "1d": whole.reshape(-1, 5)[group :: h * w],
            "grid": tokens[group],
        }[sampling]
    dealt = jax.jit(partial(deal, side=side, groups=groups, sampling=sampling))
    got = dealt(jnp.stack([tokens, 2 * tokens]), jnp.array([grid, grid]))
    np.testing.assert_array_equal(got, np.stack([want, 2 * want]))


def test_crops_that_make_no_grid_are_refused():
    with pytest.raises(ValueError, match="3 crops: want a square number"):
        Crops(3, square=True)
    with pytest.raises(ValueError, match="1 crops: want 2 or more"):
        registry.config("deepstack_tiny", policies=(DeepStack(groups=1),))
    with pytest.raises(ValueError, match="sampling = '3d': want one of 2d, 1d, grid"):
        Views(sampling="3d")


# The policy.


def taps_stream(cell, seed=0):
    rng = np.random.default_rng(seed)
    cell = jnp.asarray(cell)
    tokens = Tokens.sequence(jnp.ones(cell.shape, bool), cell=cell)
    hidden = jnp.asarray(rng.normal(size=(*cell.shape, 8)), jnp.float32)
    return Stream(hidden, tokens, int((cell[0] >= 0).sum()))


def test_taps_find_their_tokens_by_cell():
    """Wherever a token stands; text, cells without a tap and decoding are left alone."""
    stream = taps_stream([[-1, 2, 0, 5, -1], [4, -1, -1, 1, 3]])
    taps = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 5, 8)), jnp.float32)

    def entered(stream, memory):
        return AddTap(level=1)(None, None, lambda s, _: (s.hidden, None, {}), stream, None, memory)

    got = np.asarray(entered(stream, {"taps": taps})[0] - stream.hidden)
    for row, cells in enumerate(np.asarray(stream.tokens.tags["cell"])):
        for place, cell in enumerate(cells):
            want = taps[1, row, cell] if 0 <= cell < 5 else np.zeros(8)
            np.testing.assert_allclose(got[row, place], want, atol=1e-6)
    for same in (entered(stream, {}), entered(stream.replace(slots=0), {"taps": taps})):
        np.testing.assert_array_equal(same[0], stream.hidden)


def test_wrap_puts_the_policy_outside():
    block = Block(width=8, num_heads=2, mlp_dim=8)
    plan = wrap(layers(block, 3), {1: AddTap(level=0)})
    assert [len(step.policies) for step in plan] == [0, 1, 0]
    with pytest.raises(ValueError, match=r"add_tap: no layers \[3\]; the plan has layers 0 to 2"):
        wrap(plan, {1: AddTap(level=1), 3: AddTap(level=2)})
    with pytest.raises(ValueError, match="twice"):
        wrap(plan, {1: AddTap(level=1)})


def test_levels_are_data_of_one_scanned_program():
    """Scanned equals unrolled, and a level more is no program more."""
    block = Block(width=8, num_heads=2, mlp_dim=8)
    plan = DeepStack(start=1, groups=6).apply(layers(block, 8), slots=3)
    assert len({step.kind for step in plan}) == 2
    stream = taps_stream([[-1, 0, 1, 2, -1, -1]])
    taps = jnp.asarray(np.random.default_rng(1).normal(size=(6, 1, 3, 8)), jnp.float32)
    stack = Stack(plan)
    params = draw(jax.eval_shape(lambda k: stack.init(k, stream), jax.random.key(0))["params"])

    def run(scan):
        out = Stack(plan, scan=scan).apply({"params": params}, stream, None, {"taps": taps})
        return out[0].hidden

    scanned, unrolled = jax.jit(run, static_argnums=0)(True), jax.jit(run, static_argnums=0)(False)
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-5, atol=1e-6)

    @jax.jit
    def by_hand(params):
        """Added before layers 1 to 6, after all before them."""
        now = stream
        for layer in range(8):
            if 1 <= layer <= 6:
                now = now.replace(hidden=now.hidden.at[:, 1:4].add(taps[layer - 1]))
            row = jax.tree.map(lambda leaf, at=layer: leaf[at], params["layers"])
            now, _, _ = Step(block).run(row, (), now, None, {})
        return now.hidden

    np.testing.assert_allclose(scanned, by_hand(params), **CLOSE)


# The model.


@pytest.fixture(scope="module")
def setup():
    """Two rows of two images, of which one is cut into 2 x 2 crops and the other into 1 x 3."""
    config = registry.config("deepstack_tiny", num_images=2)
    batch = random_batch(config)
    batch["text_mask"][1, 10:] = False
    batch["view_grid"] = np.array([[[2, 2], [1, 3]], [[1, 3], [2, 2]]], np.int32)
    model, params = config.build(), draw(shapes(config))
    run = jax.jit(lambda p, b: model.apply({"params": p}, b).hidden)
    stream = jax.jit(lambda p, b: model.apply({"params": p}, b, None, method="stream"))
    return config, model, params, batch, run, stream


def test_zero_taps_are_plain_llava(setup):
    """And the parameters are those of LLaVA, which knows nothing of crops."""
    config, model, params, batch, run, stream = setup
    plain = dataclasses.replace(config, policies=()).build()
    embedded, memory = stream(params, batch)

    @partial(jax.jit, static_argnums=0)
    def rest(model, params, memory):
        return model.bind({"params": params}).decoder.run(embedded, None, memory)[0].hidden

    # Unrolled, as the layers with taps are, or both would round in another way.
    want = rest(plain, unstack(params, tree_names(shapes(config))), {})
    zeros = rest(model, params, {"taps": jnp.zeros_like(memory["taps"])})
    np.testing.assert_allclose(zeros, want, rtol=0, atol=1e-6 * np.abs(want).max())
    np.testing.assert_allclose(rest(model, params, memory), run(params, batch), **CLOSE)
    assert np.abs(run(params, batch) - want).max() > 0.01
    others = {name: leaf for name, leaf in batch.items() if name != "crops"}
    ours, _ = jax.jit(lambda p, b: plain.apply({"params": p}, b, None, method="stream"))(
        params, others
    )
    np.testing.assert_allclose(embedded.hidden, ours.hidden, **CLOSE)


def test_groups_are_those_of_the_connected_crops(setup):
    """For a connector that works token by token, it may come before or after the dealing."""
    config, _, params, batch, _, stream = setup
    _, memory = stream(params, batch)
    plain = dataclasses.replace(config, policies=()).build()
    crops = jnp.asarray(batch["crops"]).reshape(2, 8, 16, 16, 3)
    encode = jax.jit(lambda p, x: plain.apply({"params": p}, x, method="encode_image"))
    tokens = encode(params, crops).tokens.tokens
    tokens = tokens.reshape(2, 2, 4, 16, -1)
    want = deal(tokens, batch["view_grid"], side=(4, 4), groups=4, sampling="2d")
    got = memory["taps"].reshape(4, 2, 2, 16, -1).transpose(1, 2, 0, 3, 4)
    np.testing.assert_allclose(got, want, **CLOSE)
    assert (np.asarray(got)[0, 1, 3] == 0).all()  # 1 x 3 crops make three groups


def test_decoding_equals_recomputation(setup):
    _, model, params, batch, run, _ = setup
    whole = {k: v[:1] for k, v in batch.items() if k not in ("labels", "segments")}
    logits = model.apply({"params": params}, run(params, whole), method="head")
    prompt = {**whole, **{k: whole[k][:, :-ROOM] for k in ("ids", "text_mask")}}
    got, cache = jax.jit(lambda p, b: model.apply({"params": p}, b, room=ROOM, method="prefill"))(
        params, prompt
    )
    assert cache.memory == {}  # decoding never reads the groups
    decode = jax.jit(lambda p, i, c: model.apply({"params": p}, i, c, method="decode"))
    length = whole["ids"].shape[1]
    for i in range(ROOM):
        np.testing.assert_allclose(got, logits[:, -ROOM - 1 + i], **CLOSE)
        got, cache = decode(params, whole["ids"][:, length - ROOM + i][:, None], cache)
    np.testing.assert_allclose(got, logits[:, -1], **CLOSE)


def test_a_row_does_not_see_its_neighbours(setup):
    _, _, params, batch, run, _ = setup
    got, valid = run(params, batch), batch["text_mask"].sum(1) + 2 * 16 - 2
    for row in range(2):
        alone = run(params, {k: v[[row, row]] for k, v in batch.items()})
        np.testing.assert_allclose(got[row, : valid[row]], alone[0, : valid[row]], **CLOSE)


def test_a_crop_changes_its_image_and_what_follows(setup):
    """The second image's crops: tokens of the first image and before do not know of them."""
    _, _, params, batch, run, _ = setup
    first, second = 1, 1 + 16  # where the images begin: one token of text comes before them
    other = {**batch, "crops": batch["crops"].copy()}
    other["crops"][:, 1, 0] += 1
    change = np.abs(np.asarray(run(params, other) - run(params, batch))).max(-1)
    assert (change[:, :second] == 0).all() and (change[:, second:-2] > 0).all()
    other["crops"][:, 0, 0] += 1
    change = np.abs(np.asarray(run(params, other) - run(params, batch))).max(-1)
    assert (change[:, :first] == 0).all() and (change[:, first:second] > 0).all()


def test_gradients_reach_the_tower_through_the_groups(setup):
    config, model, params, batch, _, _ = setup

    def loss(params, crops):
        _, memory = model.apply(
            {"params": params}, {**batch, "crops": crops}, None, method="stream"
        )
        return jnp.mean(memory["taps"] ** 2)

    grads, to_crops = jax.jit(jax.grad(loss, (0, 1)))(params, batch["crops"])
    unread = {tuple(path.split("/")[1:]) for path in config.unread}
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads["tower"]):
        if tuple(key.key for key in path) not in unread:
            assert np.abs(leaf).max() > 0, path
    seen = np.abs(np.asarray(to_crops)).max((3, 4, 5)) > 0  # [B, M, V]
    np.testing.assert_array_equal(seen[0], [[1, 1, 1, 1], [1, 1, 1, 0]])


def test_any_connector_and_any_budget():
    """Groups shrink with the budget; a static one and a masked one are the same."""
    config = registry.config("deepstack_tiny", connector=MQT(num_queries=4, num_heads=2))
    model, params, batch = config.build(), draw(shapes(config)), random_batch(config)

    @partial(jax.jit, static_argnames="static")
    def run(params, batch, masked=None, static=None):
        bound = model.bind({"params": params})
        stream, memory = bound.stream(batch, masked if static is None else static)
        out, _, _ = bound.decoder.run(stream, None, memory)
        return memory["taps"], out.hidden[:, -5:], stream.tokens.valid.sum(-1)

    taps, cut, length = run(params, batch, static=2)
    whole, masked, same = run(params, batch, masked=jnp.int32(2))
    assert taps.shape[2] == 2 and whole.shape[2] == 4
    np.testing.assert_allclose(taps, whole[:, :, :2], **CLOSE)
    np.testing.assert_allclose(cut, masked, **CLOSE)
    np.testing.assert_array_equal(length, same)


def test_groups_from_levels_of_the_tower():
    source = Levels((1, -1))
    config = registry.config("llava_tiny", policies=(DeepStack(0, 1, 2, source),))
    model, params, batch = config.build(), draw(shapes(config)), random_batch(config)
    assert config.crops is None and "crops" not in batch

    @jax.jit
    def both(params, batch):
        """What the model hands to its decoder, and the same by hand."""
        _, memory = model.apply({"params": params}, batch, None, method="stream")
        tower, own = config.tower.build(), config.connector.build(16, 24, (4, 4))
        features = tower.apply({"params": params["tower"]}, batch["pixels"], taps=(1, 3))
        want = []
        for number, layer in enumerate((1, 3)):
            vision = features.replace(tokens=features.taps[layer][..., 1:, :])
            level = {"params": params["taps"][f"levels_{number}"]}
            want.append(own.apply(level, vision).tokens.tokens[:, 0])
        return memory["taps"], jnp.stack(want)

    np.testing.assert_allclose(*both(params, batch), **CLOSE)


def test_newlines_and_blends_are_laid_out_in_every_level():
    """A newline is its own tap; where slots blend four tokens, so do their taps."""
    config = registry.config("deepstack_tiny", newline=True, num_images=5, num_slots=88)
    model, params, batch = config.build(), draw(shapes(config)), random_batch(config, 1)
    batch["ids"][:, 2:6] = 7  # one placeholder for all five tiles
    size = (32, 32)
    run = jax.jit(lambda b: model.apply({"params": params}, b, None, method="stream"))
    reading = tiling.anyres(size, [size], tile=16, grid=(4, 4))
    stream, memory = run({**batch, **tiling.pack([[reading]], tokens=16)})
    assert stream.slots == 16 + 8 * 9 and memory["taps"].shape == (4, 1, 5 * 16 + 1, 24)
    np.testing.assert_array_equal(
        memory["taps"][:, 0, -1], np.broadcast_to(params["newline"], (4, 24))
    )
    plain = memory["taps"]
    reading = tiling.anyres(size, [size], tile=16, grid=(4, 4), max_tiles=1)
    places = tiling.pack([[reading]], tokens=16)
    stream, memory = run({**batch, **places})
    mixed = np.einsum(
        "sk,gskd->gsd", places["blend"][0], np.asarray(plain)[:, 0, places["layout"][0]]
    )
    np.testing.assert_allclose(memory["taps"][:, 0], mixed, **CLOSE)


def test_what_does_not_go_together_is_refused():
    tiny = registry.config("deepstack_tiny")
    change = partial(dataclasses.replace, tiny)
    with pytest.raises(ValueError, match=r"no layers \[6\]; the plan has layers 0 to 5"):
        change(policies=(DeepStack(start=3),))
    with pytest.raises(ValueError, match=r"hidden states \[5\]: the tower has 0 to 3"):
        change(policies=(DeepStack(groups=2, source=Levels((2, 5))),))
    with pytest.raises(ValueError, match="groups = 4: want one for each of the layers"):
        DeepStack(source=Levels((1, 2)))
    with pytest.raises(ValueError, match="makes 16 tokens of an image, which are added to 4"):
        change(connector=MQT(4, 2), policies=(DeepStack(groups=1, source=Levels((2,))),))
    with pytest.raises(ValueError, match="one at most that makes taps"):
        change(policies=(DeepStack(groups=2), DeepStack(groups=3)))
    with pytest.raises(ValueError, match="want the same crops"):
        change(tower=DeepStackV(**dataclasses.asdict(tiny.tower)))
    with pytest.raises(ValueError, match="keep_class"):
        change(keep_class=True)
    with pytest.raises(ValueError, match="interval = 0"):
        DeepStack(interval=0)

    model, batch = tiny.build(), random_batch(tiny)
    init = partial(jax.eval_shape, model.init, jax.random.key(0))
    with pytest.raises(ValueError, match="needs crops: 4 of each image"):
        init({k: v for k, v in batch.items() if k != "crops"})
    with pytest.raises(ValueError, match=r"crops: got \(2, 1, 3"):
        init({**batch, "crops": batch["crops"][:, :, :3]})
    three = change(policies=(DeepStack(groups=3),))
    batch = {k: v for k, v in random_batch(three).items() if k != "view_grid"}
    with pytest.raises(ValueError, match="3 crops are no square: want the rows and columns"):
        jax.eval_shape(three.build().init, jax.random.key(0), batch)


# The tower that adds groups within itself.


def test_a_tower_that_sees_crops():
    """Up to `start` it is the plain tower; from there on it knows of the crops."""
    sizes = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 4, "num_heads": 2}
    sizes["mlp_dim"] = 32
    config, plain = DeepStackV(**sizes), ViTConfig(**sizes)
    assert config.first == 2
    llava = registry.config("llava_tiny", tower=config)
    batch, params = random_batch(llava), draw(shapes(llava))
    views = np.concatenate([batch["pixels"][:, :, None], batch["crops"]], 2)

    @jax.jit
    def run(params, views):
        own, taps = {"params": params["tower"]}, (0, 1, 2, 3)
        got = config.build().apply(own, views, taps=taps)
        stopped = config.build().apply(own, views, taps=(3,), stop_after=3)
        want = plain.build().apply(own, views, taps=(0, 1, 2), stop_after=2)
        images = {"pixels": views[:, :, 0], "crops": views[:, :, 1:]}
        visual = llava.build().apply({"params": params}, **images, method="encode_image")
        vision = got.replace(tokens=got.taps[3][..., 1:, :])
        read = llava.build().apply({"params": params}, method=lambda m: m.connector(vision))
        tokens = visual.tokens.tokens, read.tokens.tokens
        return got.taps, stopped.taps[3], want.taps, tokens

    got, stopped, want, tokens = run(params, views)
    for layer in (0, 1):
        np.testing.assert_allclose(got[layer], want[layer][:, :, 0], **CLOSE)
    grid = jnp.array([2, 2])
    groups = deal(want[2][:, :, 1:, 1:], grid, side=(4, 4), groups=4, sampling="2d")
    np.testing.assert_allclose(got[2][:, :, 1:], want[2][:, :, 0, 1:] + groups[:, :, 0], **CLOSE)
    np.testing.assert_allclose(got[2][:, :, 0], want[2][:, :, 0, 0], **CLOSE)  # the class token
    np.testing.assert_allclose(stopped, got[3], **CLOSE)
    np.testing.assert_allclose(*tokens, **CLOSE)
    with pytest.raises(ValueError, match="start = 4: the tower has layers 0 to 3"):
        DeepStackV(**sizes, start=4)
    with pytest.raises(ValueError, match="added = 4: want 0 or more, and less than 4"):
        DeepStackV(**sizes, added=4)


def test_groups_within_the_tower_and_within_the_decoder():
    """Both at once: the sequence is that of DeepStack-V, the groups are those of DeepStack-L."""
    tiny = registry.config("deepstack_tiny", policies=(DeepStack(source=Views(square=True)),))
    fields = {f.name: getattr(tiny.tower, f.name) for f in dataclasses.fields(tiny.tower)}
    both = dataclasses.replace(tiny, tower=DeepStackV(**fields))
    within = dataclasses.replace(both, policies=())
    params, batch = draw(shapes(both)), random_batch(both)
    assert both.crops == tiny.crops == within.crops == Crops(4, square=True)

    @jax.jit
    def streams(params, batch):
        configs = both, within, tiny
        found = [c.build().apply({"params": params}, batch, None, method="stream") for c in configs]
        return [(stream.hidden, memory.get("taps")) for stream, memory in found]

    (hidden, taps), (want, nothing), (plain, groups) = streams(params, batch)
    assert nothing is None and np.abs(want - plain).max() > 0.01
    np.testing.assert_allclose(hidden, want, **CLOSE)
    np.testing.assert_allclose(taps, groups, **CLOSE)


# Figures.


def test_figures_of_the_paper():
    """Five views at the price of one sequence: the parameters and the decoder are LLaVA-1.5's."""
    plain = zoo.cost("deepstack_l_vicuna_7b", policies=())
    stacked = zoo.cost("deepstack_l_vicuna_7b")
    within = zoo.cost("deepstack_v_vicuna_7b")
    assert stacked.params == plain.params == within.params
    assert stacked.params["total"] == 7_062_902_784
    assert stacked.vision_tokens == plain.vision_tokens == 576
    assert stacked.flops["prefill"] == plain.flops["prefill"]
    assert stacked.flops["decode_step"] == plain.flops["decode_step"]
    assert stacked.kv_bytes == plain.kv_bytes
    assert stacked.flops["encode"].total == 5 * plain.flops["encode"].total
    # Layers 0 to 11 see five views, layers 12 to 22 one.
    connect = 2 * 576 * (1024 * 4096 + 4096 * 4096)
    patch = 2 * 576 * 3 * 14 * 14 * 1024
    layer = (plain.flops["encode"].total - connect - patch) // 23
    assert within.flops["encode"].total == 5 * patch + (5 * 12 + 11) * layer + connect
    assert registry.config("deepstack_l_hd_vicuna_7b").slots == 576 + 48 * 49


def test_the_key_table_is_that_of_llava():
    entry = registry.entry("deepstack")
    found = {}
    for name, config in entry.variants.items():
        found[name] = set(entry.table(config).shapes(nn.unbox(shapes(config))))
    plain, hd, within = (found[f"deepstack_{kind}_vicuna_7b"] for kind in ("l", "l_hd", "v"))
    assert plain == within and hd - plain == {"model.image_newline"}
    assert {"model.mm_projector.0.weight", "model.mm_projector.2.bias"} <= plain


def test_added_layers_of_the_tower_have_keys_of_their_own():
    tiny, entry = registry.config("deepstack_tiny"), registry.entry("deepstack")
    sizes = {f.name: getattr(tiny.tower, f.name) for f in dataclasses.fields(tiny.tower)}
    longer = DeepStackV(**sizes | {"depth": 8}, start=3, added=5)
    configs = tiny, dataclasses.replace(tiny, tower=longer, policies=(), vision_layer=-1)
    plain, added = (set(entry.table(c).shapes(nn.unbox(shapes(c)))) for c in configs)
    layer = "model.vision_tower.vision_tower.vision_model.encoder.layers.0."
    leaves = {key.removeprefix(layer) for key in plain if key.startswith(layer)}
    own = {f"model.vision_tower.post_encoder.{n}.{leaf}" for n in range(5) for leaf in leaves}
    assert plain <= added and added - plain == own


# From a picture.

HD = LlavaConfig(
    tower=ViTConfig(image_size=28, patch_size=14, width=8, depth=2, num_heads=2, mlp_dim=8),
    decoder=DecoderConfig(
        vocab_size=300, width=8, depth=4, num_heads=2, num_kv_heads=1, mlp_dim=8, context=64
    ),
    policies=(DeepStack(start=0, source=Views(square=True)),),
    newline=True,
    image_id=259,
    num_images=5,
    num_slots=4 + 4 * 5,
)


@pytest.fixture(scope="module")
def high_resolution(tmp_path_factory):
    """A model of tiles with crops, with the processor of its checkpoint; and a wide picture."""
    folder, rng = tmp_path_factory.mktemp("hd"), np.random.default_rng(0)
    processor = load_processor(write_checkpoint(folder / "hub"), HD)
    picture = rng.integers(0, 256, (30, 70, 3), np.uint8)
    Image.fromarray(picture).save(folder / "wide.png")
    save_model(folder / "model", HD, draw(shapes(HD)), processor, {})
    return folder, processor, picture


def test_a_picture_in_tiles_with_crops_of_each(high_resolution):
    """It is stretched to one tile and to 1 x 3, which suits it best, and to twice as much."""
    _, processor, picture = high_resolution
    batch = processor.encode_prompt(picture, "what?")
    views = processor.vision.views

    def stretched(height, width):
        large = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
        return views.pipeline.normalised(np.asarray(large))

    pixels, crops = batch["pixels"][0], batch["crops"][0]
    assert pixels.shape == (4, 28, 28, 3) and crops.shape == (4, 4, 28, 28, 3)
    np.testing.assert_array_equal(pixels[0], stretched(28, 28))
    np.testing.assert_array_equal(np.concatenate(pixels[1:], 1), stretched(28, 84))
    for tile, want in ((0, stretched(56, 56)), (2, stretched(56, 168)[:, 56:112])):
        rows = [np.concatenate(crops[tile, i : i + 2], 1) for i in (0, 2)]
        np.testing.assert_array_equal(np.concatenate(rows), want)
    assert batch["view_grid"].tolist() == [[[2, 2]] * 4]
    # All of the whole; then two rows of the map of three tiles, 6 wide, each with a newline.
    assert batch["sizes"].tolist() == [[4 + 2 * 7]]
    rows = [[4, 5, 8, 9, 12, 13, 16], [6, 7, 10, 11, 14, 15, 16]]
    assert batch["layout"][0, :18].tolist() == [0, 1, 2, 3, *rows[0], *rows[1]]
    loose = dataclasses.replace(HD, policies=(DeepStack(start=0),))
    with pytest.raises(UsageError, match="want a policy whose crops make a square"):
        load_processor(processor.folder, loose)


def test_tiles_and_crops_stand_where_they_belong(high_resolution):
    """Every tile reads its own crops; with 2 x 2 tokens each, group g is token g of each crop."""
    folder, processor, picture = high_resolution
    loaded = zoo.load(folder / "model")
    batch = processor.encode_prompt(picture, "what?")

    @jax.jit
    def run(params, batch):
        module, variables = loaded.model, {"params": params}
        stream, memory = module.apply(variables, batch, None, method="stream")
        plain = {name: leaf for name, leaf in params.items() if name in ("tower", "connector")}
        crops = batch["crops"].reshape(1, 16, *batch["crops"].shape[3:])
        seen = jnp.concatenate([batch["pixels"], crops], 1)
        config = dataclasses.replace(HD, policies=(), newline=False, num_slots=None)
        visual = config.build().apply({"params": plain}, seen, method="encode_image")
        return stream, memory["taps"], visual.tokens.tokens[0]

    stream, taps, tokens = run(loaded.params, dict(batch))
    whole, crops = tokens[:4].reshape(16, -1), tokens[4:].reshape(4, 4, 4, -1)
    newline = np.asarray(loaded.params["newline"])
    rows = np.concatenate([whole, newline[None]])[batch["layout"][0, :18]]
    at = np.flatnonzero(np.asarray(stream.tokens.tags["cell"][0]) >= 0)
    np.testing.assert_allclose(np.asarray(stream.hidden[0])[at], rows, **CLOSE)
    want = crops.transpose(2, 0, 1, 3).reshape(4, 16, -1)  # [G, tile and crop, D]
    np.testing.assert_allclose(taps[:, 0, :16], want, **CLOSE)
    np.testing.assert_allclose(taps[:, 0, 16], np.tile(newline, (4, 1)), **CLOSE)


def test_the_command_answers_about_a_picture_in_high_resolution(high_resolution, capsys):
    folder, _, _ = high_resolution
    argv = ["generate", str(folder / "model"), "--image", str(folder / "wide.png")]
    assert main([*argv, "--prompt", "what?", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "what?"


def test_a_training_example_in_high_resolution(high_resolution):
    """Newlines have the number after all five tiles, of which a wide picture has four."""
    folder, processor, picture = high_resolution
    chats = Chats.load(folder / "hub", dataclasses.replace(HD, text_tokens=40))
    example = chats.encode({"image": picture, "conversations": [("what?", "noise")]})
    batch = processor.encode_prompt(picture, "what?")
    layout = batch["layout"][0, :18]
    np.testing.assert_array_equal(example["layout"][:18], np.where(layout == 16, 20, layout))
    for name in ("pixels", "crops"):
        np.testing.assert_array_equal(example[name][:4], batch[name][0])
        assert len(example[name]) == 5 and not example[name][4].any()


def test_a_tokenizer_of_ones_own_in_high_resolution(high_resolution, tmp_path):
    """Its processor makes what that of the checkpoint does, from the same mean and deviation."""
    _, hub, picture = high_resolution
    model = dataclasses.replace(HD, text_tokens=40)
    pipeline = hub.vision.views.pipeline
    known = Tokenizer.train(["what?", "noise"], 300)
    made = ProcessorConfig(mean=pipeline.mean, std=pipeline.std).build(model, None, known)
    made.save(tmp_path)
    processor, batch = Processor.load(tmp_path), hub.encode_prompt(picture, "what?")
    assert processor.rows == made.rows == Rows(5, (2, 2), 24)
    example = processor.encode({"image": picture, "conversations": [("what?", "noise")]})
    wanted = {name: leaf.shape[1:] for name, leaf in model.inputs(1).items()}
    assert {name: array.shape for name, array in example.items()} == wanted
    layout = batch["layout"][0, :18]
    np.testing.assert_array_equal(example["layout"][:18], np.where(layout == 16, 20, layout))
    assert example["sizes"].tolist() == [18] and (example["ids"] == known.image).sum() == 1
    for name in ("pixels", "crops"):
        np.testing.assert_array_equal(example[name][:4], batch[name][0])
        assert not example[name][4].any()
    blind = processor.encode({"image": None, "conversations": [("what?", "noise")]})
    assert blind["sizes"].tolist() == [0] and not blind["pixels"].any()
    with pytest.raises(UsageError, match="rows of tiles, as the processor of a checkpoint"):
        ProcessorConfig().build(dataclasses.replace(model, policies=()), None, known)
