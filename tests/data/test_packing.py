"""Packing: many examples in a row give the losses and gradients that each gives in its own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.numbered import Numbers, number_processor, same, take
from zoo.models.connectors.mqt import VARIANTS
from zoo.models.core.types import EXAMPLE, Tokens
from zoo.models.parts.layers.attention import causal
from zoo.processors import ImageProcessor
from zoo.train.data.packing import Packer
from zoo.train.data.pipeline import Pipeline
from zoo.train.objectives import NextToken

LENGTH, IMAGES = 40, 3


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(8, 8, 3), dtype=np.uint8)


RECORDS = [
    {"image": picture(0), "conversations": [("what 1?", "1")]},
    {"image": None, "conversations": [("what 2?", "2 3"), ("what 4?", "4")]},
    {
        "image": picture(1),
        "conversations": [("what 5?", "6"), ("what 7?", "8 9")],
        "independent": True,
    },
    {"image": (picture(2), picture(3)), "conversations": [("<image> what 1? <image>", "2")]},
    {"image": picture(4), "conversations": [("what 9?", "9"), ("what 3?", "3")]},
]


@pytest.fixture(scope="module")
def setup():
    config = dataclasses.replace(VARIANTS["mqt_tiny"], num_images=IMAGES, text_tokens=LENGTH)
    processor = number_processor(max_length=LENGTH, num_images=IMAGES)
    size = config.tower.image_size
    processor = dataclasses.replace(processor, image=ImageProcessor(size))
    model = config.build()
    examples = [processor.encode(record) for record in RECORDS]
    batch = {name: np.stack([e[name] for e in examples]) for name in examples[0]}
    params = jax.jit(model.init)(jax.random.key(0), batch)["params"]

    @jax.jit
    def run(params, batch):
        def loss(params):
            variables = {"params": params}
            means, *_ = NextToken().loss(model, variables, {}, batch, jax.random.key(0), None)
            return means["loss"].total, means["loss"].weight

        return jax.value_and_grad(loss, has_aux=True)(params)

    return processor, examples, batch, params, run


def packed(processor, examples, rows: int):
    packer = Packer(rows, processor.tokenizer.image, processor.tokenizer.pad)
    assert all(packer.add(example) for example in examples)
    return packer.batch()


def test_losses_and_gradients_are_those_of_unpacked_examples(setup):
    processor, examples, batch, params, run = setup
    together = packed(processor, examples, rows=3)
    assert max(together["segments"].max(-1)) >= EXAMPLE  # something is packed at all
    (total, weight), gradient = run(params, batch)
    (got_total, got_weight), got = run(params, together)
    assert got_weight == weight > 10
    np.testing.assert_allclose(got_total, total, rtol=1e-5)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * scale)


def test_the_proof_notices_leaks(setup):
    """Without the numbers of the examples, the loss is another one."""
    processor, examples, _, params, run = setup
    together = packed(processor, examples, rows=3)
    (total, _), _ = run(params, together)
    leaking = {**together, "segments": together["segments"] % EXAMPLE}
    (leaked, _), _ = run(params, leaking)
    assert abs(leaked - total) > 1e-3 * abs(total)
    swapped = {**together, "pixels": together["pixels"][:, ::-1].copy()}
    (wrong, _), _ = run(params, swapped)
    assert abs(wrong - total) > 1e-5 * abs(total)


def test_a_row_has_its_pictures_in_order_and_the_rest_in_the_padding(setup):
    processor, examples, _, _, _ = setup
    row = {
        name: array[0] for name, array in packed(processor, [examples[0], examples[3]], 1).items()
    }
    holders = row["ids"] == processor.tokenizer.image
    assert holders.sum() == IMAGES
    assert row["text_mask"][holders].all()
    pictures = [examples[0]["pixels"][0], *examples[3]["pixels"][:2]]
    assert np.array_equal(row["pixels"], pictures)
    assert list(row["segments"][holders]) == [0, EXAMPLE, EXAMPLE]
    row = {name: array[0] for name, array in packed(processor, [examples[0]], 1).items()}
    holders = row["ids"] == processor.tokenizer.image
    assert (holders & ~row["text_mask"]).sum() == IMAGES - 1
    assert not row["pixels"][1:].any()
    assert (row["labels"][~row["text_mask"]] == -100).all()


def test_neither_tokens_nor_pictures_overflow(setup):
    processor, examples, _, _, _ = setup
    tokenizer = processor.tokenizer
    packer = Packer(1, tokenizer.image, tokenizer.pad)
    assert packer.add(examples[3])
    assert not packer.add(examples[3])  # that would be four pictures
    assert packer.add(examples[0])
    packer = Packer(1, tokenizer.image, tokenizer.pad)
    each, added = int(examples[1]["text_mask"].sum()), 0
    while packer.add(examples[1]):
        added += 1
    assert added * each + IMAGES <= LENGTH < (added + 1) * each + IMAGES
    assert packer.batch()["text_mask"].sum() == added * each


def whole(processor, batches) -> list[str]:
    """The texts of all examples in batches, in their order."""
    texts = []
    for batch in batches:
        for ids, segments, mask in zip(
            batch["ids"], batch["segments"], batch["text_mask"], strict=True
        ):
            example = segments[mask] // EXAMPLE
            texts += [str(ids[mask][example == i].tolist()) for i in range(example.max() + 1)]
    return texts


@pytest.mark.parametrize("bad", [(), (3, 8)])
@pytest.mark.parametrize("done", [0, 1, 4])
def test_a_restart_goes_on_with_the_same_bits(done, bad):
    pipeline = Pipeline(
        Numbers(20, bad), number_processor(num_images=4), 2, pack=True, max_bad_share=0.5
    )
    first = iter(pipeline)
    take(first, done)
    state = json.loads(json.dumps(first.get_state()))
    expected, counted = take(first, 12), first.bad
    again = iter(pipeline)
    take(again, 3)  # wherever it stands
    again.set_state(state)
    assert same(take(again, 12), expected)
    assert again.bad == counted
    assert again.get_state() == first.get_state()


def test_packed_batches_use_the_records_of_the_stream():
    processor = number_processor(num_images=4)
    pipeline = Pipeline(Numbers(20), processor, 2, pack=True)
    alone = dataclasses.replace(pipeline, pack=False, batch_size=1)
    single = whole(processor, take(iter(alone), 100))
    batches, got = iter(pipeline), []
    for _ in range(20):
        got += whole(processor, take(batches, 1))
        assert sorted(got) == sorted(single[: len(got)])
        assert batches.bad.seen == len(got)
    assert len(got) > 20 * 3  # of two rows each


def test_what_cannot_be_packed_is_an_error(setup):
    processor, examples, _, _, _ = setup
    packer = Packer(1, processor.tokenizer.image, processor.tokenizer.pad)
    with pytest.raises(ValueError, match=r"cannot pack .*layout"):
        packer.add({**examples[0], "layout": np.zeros(3, np.int32)})
    many = np.full_like(examples[0]["segments"], EXAMPLE)
    with pytest.raises(ValueError, match="1023 independent turns"):
        packer.add({**examples[0], "segments": many})


def test_positions_and_sight_of_a_packed_row_are_those_of_each_example():
    """Of an example with two turns, of a plain one, and of one with padding in it."""
    e = EXAMPLE
    segment = np.array([[0, 0, 1, 1, 2, 2, e, e, e, 2 * e, 2 * e, 2 * e + 7, 2 * e + 7, 2 * e]])
    valid = np.ones_like(segment, bool)
    valid[0, [3, 10, 13]] = False
    tokens = Tokens.sequence(jnp.asarray(valid), segment=jnp.asarray(segment, jnp.int32))
    want = [0, 1, 2, None, 2, 3, 0, 1, 2, 0, None, 1, 2, None]
    got = [p if v else None for p, v in zip(tokens.position[0].tolist(), valid[0], strict=True)]
    assert got == want
    seen = np.asarray(causal(tokens, tokens))[0]
    for i, asking in enumerate(segment[0]):
        for j, given in enumerate(segment[0]):
            same_example = asking // e == given // e
            open_to_all = given % e == 0 or given == asking
            assert seen[i, j] == (same_example and open_to_all and j <= i and valid[0, j])
