"""The folder of a run: who may write to it, whether it has room, whose experiment it is.

config.json      the experiment
checkpoints/     see `zoo.train.checkpoint`
processor/       how records and prompts become arrays
model/           the trained model, see `zoo.saving`
metrics.jsonl    one object per logged step
tensorboard/     the same for TensorBoard
train.log        what was said, and a description of all parameters
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.models.core.codec import decode, diff, encode, of_another_version, show_diff
from zoo.models.core.errors import UsageError, ZooError
from zoo.processors.text import Tokenizer
from zoo.processors.vlm import Processor
from zoo.train.checkpoint import OVERHEAD
from zoo.train.config import Experiment, forbidden
from zoo.whole import write_atomically

if TYPE_CHECKING:
    from zoo.train.data.chats import Chats

CONFIG, CHECKPOINTS, PROCESSOR, LOG = "config.json", "checkpoints", "processor", "train.log"


def claim(folder: Path, experiment: Experiment) -> None:
    """Write `config.json`, or see that the folder belongs to this experiment.

    Raises:
      UsageError: it belongs to another one; the message shows how they differ.
      ZooError: there are checkpoints, and the configuration that they belong to is missing or
        damaged.
    """
    file = folder / CONFIG
    new = encode(experiment)
    if not any((folder / CHECKPOINTS).glob("*")):
        # Nothing was learned yet: whoever corrects a first attempt goes on in the same folder.
        shutil.rmtree(folder / PROCESSOR, ignore_errors=True)
    else:
        changes = forbidden(diff(_read(file), new), experiment)
        if fields := of_another_version(changes):
            raise UsageError(
                f"{folder} holds a run of another version, which knows other fields "
                f"({', '.join(fields)}): finish it with that one, or choose another output folder"
            )
        if changes:
            raise UsageError(
                f"{folder} holds a run with another configuration:\n{show_diff(changes)}\n"
                "choose another output folder, or the same configuration to continue"
            )
    write_atomically(file, json.dumps(new, indent=2) + "\n")


def read_experiment(folder: str | Path) -> Experiment:
    """The experiment of a run folder.

    Raises:
      ZooError: its `config.json` is missing, damaged or written by a version with other fields.
    """
    experiment = decode(_read(Path(folder) / CONFIG))
    if not isinstance(experiment, Experiment):
        raise ZooError(f"{Path(folder) / CONFIG} describes no experiment")
    return experiment


def check_room(folder: Path, state_bytes: int, keep: int, frozen_bytes: int = 0) -> None:
    """Raise ZooError unless the checkpoints that a run will need fit on the disk.

    While one more is being written there are `keep` + 1 of them, beside one copy of what is frozen;
    those that are there already count.
    """
    there = sum(f.stat().st_size for f in (folder / CHECKPOINTS).rglob("*") if f.is_file())
    need = (state_bytes + OVERHEAD) * (keep + 1) + frozen_bytes - there
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ZooError(
            f"{folder} has {_mb(free)} left, and {keep + 1} checkpoints of {_mb(state_bytes)} need "
            f"{_mb(need)} more: make room, keep fewer, or choose another output folder"
        )


def processor_of(
    folder: Path, experiment: Experiment, tokenizer: Tokenizer | None = None
) -> "Processor | Chats":
    """The processor of a run: made and saved the first time, read from then on.

    Args:
      folder: of the run.
      experiment: says how it is made.
      tokenizer: that of the model that training starts from, which it then goes on with.
    """
    saved = folder / PROCESSOR
    if saved.exists():
        return experiment.processor.read(saved, experiment.model)
    processor = experiment.processor.build(experiment.model, experiment.data, tokenizer)
    temporary = folder / f".{PROCESSOR}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    processor.save(temporary)
    temporary.rename(saved)
    return processor


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the failure of a write, such as a full disk, into a ZooError that names the folder."""
    try:
        yield
    except OSError as error:
        raise ZooError(
            f"cannot write to {folder}: {error.strerror or error}; make room and run again to "
            "continue from the last checkpoint"
        ) from error


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ZooError(
            f"{file} is missing, and with it what the checkpoints belong to; choose another output "
            "folder"
        ) from None
    except (OSError, ValueError) as error:
        raise ZooError(f"{file} cannot be read: {error}") from error


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
