"""Vision tokens in the places of their placeholders, where images differ in number and size."""

import jax.numpy as jnp
import numpy as np
import pytest

from zoo.models.core.types import IGNORE, TokenSet
from zoo.models.parts.assemblies.splice import splice

IDS = jnp.array(
    [[7, 9, 5, 9, 6], [9, 4, 8, 9, 0]]
)  # row 1: one image, its other one in the padding
MASK = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
SIZES = jnp.array([[2, 3], [1, 0]])
VISION = 100.0 + jnp.arange(12.0).reshape(2, 2, 3, 1)  # row 1 starts with 106


def run(**options):
    embedded = IDS[..., None].astype(jnp.float32)
    facts = {"image_id": 9, "text_mask": MASK, "labels": IDS, **options}
    return splice(IDS, embedded, TokenSet(VISION), **facts)


def check(stream, hidden, cell, valid):
    hidden, cell, valid = np.array(hidden), np.array(cell), np.array(valid, bool)
    np.testing.assert_array_equal(stream.tokens.valid, valid)
    np.testing.assert_array_equal(np.asarray(stream.hidden[..., 0])[valid], hidden[valid])
    np.testing.assert_array_equal(stream.tokens.tags["cell"], cell)
    assert (np.asarray(stream.tokens.modality).sum(-1) == stream.slots).all()
    want = np.maximum(np.cumsum(valid, -1) - 1, 0)
    np.testing.assert_array_equal(stream.tokens.position, want)


def test_images_of_different_sizes():
    """All tokens in order: what no image takes stands at the end."""
    stream = run(sizes=SIZES)
    assert stream.slots == 6
    check(
        stream,
        [[7, 100, 101, 5, 102, 103, 104, 6, 0], [106, 4, 8, 0, 0, 0, 0, 0, 0]],
        [[-1, 0, 1, -1, 2, 3, 4, -1, -1], [0, -1, -1, -1, -1, -1, -1, -1, -1]],
        [[1, 1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0, 0, 0]],
    )
    label = np.full((2, 9), IGNORE)
    label[0, 2], label[0, 6], label[1, 0], label[1, 1] = 5, 6, 4, 8
    np.testing.assert_array_equal(stream.tokens.tags["label"], label)


def test_a_layout_with_a_newline():
    """Any order, tokens more than once, one that the model adds; surplus slots say anything."""
    layout = jnp.array([[5, 6, 0, 0, 6, 3], [2, -1, 0, 0, 0, 99]])
    stream = run(sizes=SIZES, layout=layout, extra=jnp.array([[50.0]]))
    check(
        stream,
        [[7, 105, 50, 5, 100, 100, 50, 6, 0], [108, 4, 8, 0, 0, 0, 0, 0, 0]],
        [[-1, 5, 6, -1, 0, 0, 6, -1, -1], [2, -1, -1, -1, -1, -1, -1, -1, -1]],
        [[1, 1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0, 0, 0]],
    )


def test_blended_tokens():
    layout = jnp.zeros((2, 5, 4), jnp.int32).at[0, 0].set(jnp.array([0, 1, 2, 3]))
    blend = jnp.zeros((2, 5, 4)).at[:, :, 0].set(1.0).at[0, 0].set(jnp.array([0.5, 0.25, 0.25, 0]))
    stream = run(sizes=SIZES, layout=layout, blend=blend)
    assert stream.slots == 5 and stream.hidden.shape == (2, 8, 1)
    check(
        stream,
        [[7, 100.75, 100, 5, 100, 100, 100, 6], [106, 4, 8, 0, 0, 0, 0, 0]],
        [[-1, 0, 1, -1, 2, 3, 4, -1], [0, -1, -1, -1, -1, -1, -1, -1]],
        [[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0]],
    )


def test_more_room_than_any_row_needs():
    """S and T may exceed what a batch needs, so that its shape is one of a few."""
    layout = jnp.tile(jnp.arange(6), (2, 2))
    stream = run(sizes=SIZES, layout=layout)
    assert stream.slots == 12 and stream.hidden.shape == (2, 15, 1)
    np.testing.assert_array_equal(stream.tokens.valid.sum(-1), [8, 3])


def test_a_layout_needs_sizes():
    with pytest.raises(ValueError, match="needs sizes"):
        run(layout=jnp.zeros((2, 6), jnp.int32))
