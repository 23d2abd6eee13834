from dataclasses import replace

import numpy as np
import pytest

import zoo
from tests.models.draw import draw
from tests.processors.test_hub import LLAVA, PICTURE, write_checkpoint
from tests.train.tiny import tiny
from zoo.convert.place import abstract_params
from zoo.models.core.errors import UsageError, ZooError
from zoo.processors.hf import HubProcessor
from zoo.saving import save_model
from zoo.train.config import ProcessorConfig
from zoo.train.data.chats import Chats
from zoo.train.data.packing import Packer
from zoo.train.folder import processor_of

TURNS = (("what <image>?", "a boat"), ("and </s>?", " two "))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("hub") / "llava")


@pytest.fixture(scope="module")
def chats(source):
    return Chats.load(source, replace(LLAVA, text_tokens=96))


def text(chats, ids):
    return chats.processor.tokenizer._fast.decode([int(i) for i in ids], skip_special_tokens=False)


def test_answers_and_their_ends_are_learned(chats):
    example = chats.encode({"image": PICTURE, "conversations": TURNS})
    shapes = {name: leaf.shape[1:] for name, leaf in chats.config.inputs(1).items()}
    assert {name: array.shape for name, array in example.items()} == shapes
    ids = example["ids"][example["text_mask"]]
    # The template writes no end of an answer: it is added. What a user writes is no control token.
    assert text(chats, ids) == (
        "<s><turn>user:<image> what <image>?<turn>assistant: a boat</s>"
        "<turn>user: and </s>?<turn>assistant: two</s>"
    )
    assert list(ids).count(chats.processor.vision.image_id) == 1
    assert list(ids).count(chats.processor.stop_ids[0]) == 2
    learned = example["labels"] != -100
    np.testing.assert_array_equal(example["labels"][learned], example["ids"][learned])
    assert not learned[len(ids) :].any()
    # The template calls the model "model" where it opens its turn, and "assistant" where it spoke.
    assert text(chats, example["labels"][learned]) == "assistant: a boat</s>assistant: two</s>"


def test_short_conversations_share_a_row(chats):
    packer = Packer(1, chats.image_id, chats.pad_id)
    example = chats.encode({"image": None, "conversations": (("a?", "b"),)})
    assert packer.add(example)
    assert packer.add(example)
    assert chats.processor.pad == chats.pad_id


def test_the_template_may_end_answers_itself(source, tmp_path):
    template = (source / "chat_template.jinja").read_text()
    ended = template.replace("{% endfor %}{% if add", "</s>\n{% endfor %}{% if add")
    ended = ended.replace("<turn>model:", "<turn>assistant:")
    folder = write_checkpoint(tmp_path / "ended", template=ended)
    chats = Chats.load(folder, replace(LLAVA, text_tokens=96))
    example = chats.encode({"image": PICTURE, "conversations": TURNS})
    labels = example["labels"][example["labels"] != -100]
    assert text(chats, labels) == " a boat</s> two</s>"


def test_text_alone_has_a_masked_placeholder(chats):
    example = chats.encode({"image": None, "conversations": TURNS})
    assert not example["pixels"].any()
    (place,) = np.flatnonzero(example["ids"] == 259)
    assert not example["text_mask"][place]
    assert example["text_mask"][place - 1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": PICTURE, "conversations": (("what?", " "),)}, "answer to 'what\\?' is empty"),
        ({"image": PICTURE, "conversations": (("what?", "a" * 90),)}, "the model takes 96"),
        ({"image": (PICTURE, PICTURE), "conversations": TURNS}, "2 pictures .* takes 1"),
    ],
)
def test_what_does_not_fit_is_refused(chats, record, message):
    with pytest.raises(ZooError, match=message):
        chats.encode(record)


def test_a_checkpoint_without_a_template_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "plain", template=None)
    with pytest.raises(UsageError, match="no chat template"):
        Chats.load(folder, LLAVA)


def test_pictures_are_padded_where_it_is_asked_for_and_a_run_keeps_that(source, tmp_path):
    config = replace(LLAVA, text_tokens=96)
    wide = np.full((20, 60, 3), 255, np.uint8)
    record = {"image": wide, "conversations": (("what <image>?", "a boat"),)}
    cropped = Chats.load(source, config).encode(record)["pixels"][0]
    assert (cropped == cropped[0, 0]).all()  # the white middle
    setting = ProcessorConfig(source=str(source), pad=True)
    padded = setting.build(config, None)
    seen = padded.encode(record)["pixels"][0]
    third = len(seen) // 3
    np.testing.assert_allclose(seen[: third - 1], 0, atol=0.02)  # of the mean colour
    np.testing.assert_allclose(seen[third + 2], np.broadcast_to(cropped[0, 0], seen[0].shape), 0.1)
    padded.save(tmp_path)
    kept = Chats.load(tmp_path, config)  # without being asked again
    np.testing.assert_array_equal(kept.encode(record)["pixels"][0], seen)


def test_a_run_keeps_it_and_its_model_is_asked_in_the_same_words(source, tmp_path):
    config = replace(LLAVA, text_tokens=96)
    experiment = tiny(model=config, processor=ProcessorConfig(source=str(source)))
    made = processor_of(tmp_path, experiment)
    moved = replace(experiment, processor=ProcessorConfig(source="gone"))
    kept = processor_of(tmp_path, moved)
    record = {"image": PICTURE, "conversations": TURNS}
    for name, array in made.encode(record).items():
        np.testing.assert_array_equal(array, kept.encode(record)[name])
    assert made.vocab_size == kept.vocab_size <= 300
    save_model(tmp_path / "model", config, draw(abstract_params(config)), kept, {})
    assert isinstance(zoo.load(tmp_path).processor, HubProcessor)
