"""How fast pictures and texts become batches: `python benchmarks/input.py [--out FILE]`.

A folder of generated JPEGs and a file in LLaVA's form go through the pipeline of `zoo train`:
decoded, padded, resized and normalised by threads of one process, and by worker processes. Then
batches are asked for as by a run whose steps take given times on devices of their own, and the
meter of training says which share of the time it waited. Reading keeps up with every step that
takes longer than `seconds_per_batch`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import PIL
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.timing import machine, report
from zoo.processors import ImageProcessor, Processor, Tokenizer
from zoo.train.data.feed import Feed
from zoo.train.data.pipeline import Pipeline
from zoo.train.data.sources import LlavaJson
from zoo.train.loop import BATCHES_AHEAD
from zoo.train.meter import Meter

SIDES = ((640, 480), (480, 640), (500, 375))
"""Width and height of the pictures, in turn, as those of COCO are."""

SIDE, TOKENS = 336, 128
"""What a model of LLaVA's sort sees: the side of its pictures, the slots of its texts."""


def write_pictures(folder: Path, number: int) -> LlavaJson:
    """JPEGs with as much detail as photographs have, and a question and an answer about each."""
    rng = np.random.default_rng(0)
    entries = []
    (folder / "pictures").mkdir()
    for i in range(number):
        width, height = SIDES[i % len(SIDES)]
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / "pictures" / f"{i}.jpg", quality=90)
        said = [
            {"from": "human", "value": f"<image> What is shown in picture {i}?"},
            {"from": "gpt", "value": "Nothing that has a name, in many colours. " * 3},
        ]
        entries.append({"id": str(i), "image": f"{i}.jpg", "conversations": said})
    (folder / "conversations.json").write_text(json.dumps(entries), "utf-8")
    return LlavaJson(str(folder / "conversations.json"), str(folder / "pictures"), validation=0.0)


@contextmanager
def feed(data: LlavaJson, batch_size: int, workers: int) -> Iterator[Feed]:
    """The batches of a training run on devices of their own; what reading ahead has is used up."""
    processor = Processor(ImageProcessor(SIDE), Tokenizer.train(data.texts(), 512), TOKENS)
    cores = len(os.sched_getaffinity(0))
    pipeline = Pipeline(data, processor, batch_size, workers=workers, num_threads=cores, keep_mib=0)
    batches = Feed(iter(pipeline), lambda batch: batch, BATCHES_AHEAD)
    for _ in range(2 * BATCHES_AHEAD):
        next(batches)
    try:
        yield batches
    finally:
        batches.close()


def throughput(batches: Feed, number: int) -> float:
    """Seconds per batch when nothing else is done."""
    start = time.perf_counter()
    for _ in range(number):
        next(batches)
    return (time.perf_counter() - start) / number


def data_wait(batches: Feed, batch_size: int, number: int, step_seconds: float) -> float:
    """The share of its time that a run waits for data whose steps take so long."""
    meter = Meter(batch_size, None, lambda: batches.waited, lambda _: 0, None, ())
    for i in range(-BATCHES_AHEAD, number):
        if i == 0:
            meter.reset()  # from here on as many are ahead as steps of this length let there be
        next(batches)
        time.sleep(step_seconds)
        meter.step(None)
    return meter.read()["data_wait"]


def main(args: Sequence[str] | None = None) -> None:
    """Run it and write what came out, with machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="pictures of a batch")
    parser.add_argument("--batches", type=int, default=32, help="that are timed")
    parser.add_argument("--workers", type=int, default=cores, help="processes that read; 0: none")
    parser.add_argument(
        "--steps", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0], help="seconds of a step"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(args)
    found: dict[str, Any] = {
        **machine(jax, grain, np, PIL),
        "pictures": f"JPEG, {', '.join(f'{w} x {h}' for w, h in SIDES)}, to {SIDE} x {SIDE}",
        "batch": options.batch,
        "readers": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        data = write_pictures(Path(scratch), options.pictures)
        readers = {"threads": 0}
        if options.workers:
            readers[f"{options.workers} processes"] = options.workers
        for name, workers in readers.items():
            with feed(data, options.batch, workers) as batches:
                seconds = throughput(batches, options.batches)
                found["readers"][name] = {
                    "seconds_per_batch": seconds,
                    "images_per_second": round(options.batch / seconds, 1),
                }
        with feed(data, options.batch, options.workers) as batches:
            found["data_wait_of_a_step"] = {
                f"{step:g} s": round(
                    data_wait(batches, options.batch, max(4, options.batches // 4), step), 4
                )
                for step in options.steps
            }
    report(found, options.out)


if __name__ == "__main__":
    main()
