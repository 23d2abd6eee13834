"""What a run with low-rank adapters leaves: the adapters alone, beside the merged model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoo.convert.adapter import write_adapter
from zoo.loading import architecture
from zoo.models.core.errors import UsageError
from zoo.saving import ADAPTER
from zoo.train.config import Experiment, Start


def export_adapter(
    folder: Path,
    experiment: Experiment,
    params: Any,
    starts: Sequence[Start],
    say: Callable[[str], None],
) -> None:
    """Write `adapter/` in the folder of a run, in the layout of `peft`, where it says all that the
    run has learned about an architecture of the Hugging Face hub; else say why not.

    Args:
      folder: of the run.
      experiment: what was trained.
      params: of the model, with operands.
      starts: where its parameters are from.
      say: is told in a line.
    """
    if any(not part.frozen for part in experiment.parts):
        say(f"no {ADAPTER}/: other parts have trained too, and only model/ has all of them")
        return
    try:
        sources = [start.source for start in starts]
        home = architecture(experiment.model, {"start": sources})
        write_adapter(folder / ADAPTER, params, home, experiment.model, sources[0])
    except UsageError as error:
        say(f"no {ADAPTER}/: {error}")
