"""What the loop makes of the pipeline: mixtures, packed rows, the share of waiting, restarts."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.processors.test_hub import LLAVA, PICTURE, write_checkpoint
from tests.train.tiny import TinyConfig, TinyData, find_here, tiny
from zoo.models.core import codec
from zoo.train.data.chats import Chats
from zoo.train.data.mixture import Mixture
from zoo.train.loop import train
from zoo.train.objectives import NextToken
from zoo.train.optim import OptimConfig


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(codec, "_find", find_here)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("pack", [False, True])
def test_a_mixture_trains_and_continues_exactly(tmp_path, monkeypatch, pack):
    experiment = tiny(
        model=TinyConfig(text_tokens=48),
        data=Mixture((TinyData(bad=3), 1), (TinyData(records=30), 2)),
        optim=OptimConfig(lr=1e-2, warmup=2, schedule="constant"),
        objective=NextToken(),
        max_bad_share=0.1,
        pack=pack,
        steps=8,
        save_every=3,
    )
    train(experiment, tmp_path / "whole", data_dir=tmp_path)
    # As on an accelerator, with batches ahead of the one that the checkpoint stands behind.
    monkeypatch.setattr(jax, "default_backend", lambda: "other")
    train(replace(experiment, steps=5), tmp_path / "parts", data_dir=tmp_path)
    train(experiment, tmp_path / "parts", data_dir=tmp_path)
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    assert [line["step"] for line in parts] == list(range(1, 9))
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]
    assert all(0 <= line["data_wait"] <= 1 for line in [*whole, *parts])


def test_the_words_of_a_checkpoint_have_pictures_at_their_marks(tmp_path):
    source = write_checkpoint(tmp_path / "llava")
    chats = Chats.load(source, replace(LLAVA, text_tokens=96, num_images=2))
    image, mark = chats.image_id, chats.processor.tokenizer

    def places(*questions):
        turns = tuple((question, "yes") for question in questions)
        ids = chats.encode({"image": (PICTURE, PICTURE), "conversations": turns})["ids"]
        return np.flatnonzero(ids == image).tolist(), ids

    first, _ = places("one and two?")
    assert first[1] == first[0] + 1
    spread, ids = places("one <image> and", "two <image>?")
    assert spread[1] > spread[0] + 1
    assert "<image>" not in mark._fast.decode(ids[ids != image].tolist())
