"""Recipes: trainings that follow one another, each from where the one before has arrived.

    Recipe("llava", stages=(align, instruct))       # two `Experiment`s, called "align", "instruct"

The folder of a recipe holds a folder of a run for each stage, see `zoo.train.folder`:

    config.json              the recipe
    1_align/, 2_instruct/    the stages
    model/                   a link to the model of the last stage, once that is complete
"""

import contextlib
import json
from pathlib import Path

from zoo.models.core.codec import encode
from zoo.models.core.errors import UsageError
from zoo.saving import MODEL, saved_about
from zoo.train.config import Experiment, Recipe
from zoo.train.folder import CHECKPOINTS, CONFIG, claim, writing
from zoo.train.launch import first, is_first, locked_together
from zoo.train.loop import OnEval, Result, train
from zoo.train.progress import Bar
from zoo.whole import write_atomically


def train_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    data_dir: str | Path | None = None,
    progress: Bar | None = None,
    on_eval: OnEval | None = None,
) -> Result:
    """Train stage after stage, from where this recipe stands, until all are done or a signal comes.

    Args:
      recipe: the stages.
      out: the folder of the recipe.
      data_dir: where data sets are prepared; a folder in the user's cache by default.
      progress: a bar that the caller has entered; by default the recipe has one of its own.
      on_eval: as in `zoo.train.loop.train`.

    Returns:
      What has become of the last stage that ran.

    Raises:
      UsageError, ZooError: as `zoo.train.loop.train`.
    """
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(Bar(quiet=not is_first())) if progress is None else progress
        folder = stack.enter_context(locked_together(out))
        first(lambda: _claim(folder, recipe))
        folders = [folder / name for name in recipe.folders]

        def run(number: int, before: Path | None) -> Result:
            bar.say(f"stage {number + 1} of {len(folders)}: {folders[number]}")
            return train(
                recipe.stages[number],
                folders[number],
                data_dir=data_dir,
                progress=bar,
                on_eval=on_eval,
                before=before,
            )

        *earlier, last = range(len(folders))
        before: Path | None = None
        for number in earlier:
            if not first(lambda n=number: _finished(folders[n], recipe.stages[n])):
                result = run(number, before)
                if result.stopped or not result.complete:
                    return result
                del result  # its parameters make room for those of the next stage
            before = folders[number]
        result = run(last, before)
        if result.complete:
            first(lambda: _link(folder, folders[last]))
        return result


def _claim(folder: Path, recipe: Recipe) -> None:
    """Write `config.json`, or see that the folder is of a recipe with the same stages."""
    begun = sorted(path.parent.name for path in folder.glob(f"*/{CHECKPOINTS}"))
    if others := [name for name in begun if name not in recipe.folders]:
        raise UsageError(
            f"{folder} holds {', '.join(others)} of another recipe, whose stages are not "
            f"{', '.join(recipe.folders)}: choose another output folder"
        )
    with writing(folder):
        write_atomically(folder / CONFIG, json.dumps(encode(recipe), indent=2) + "\n")


def _finished(folder: Path, stage: Experiment) -> bool:
    """Whether there is nothing left to do in a stage; raises UsageError if it was another one."""
    if not folder.is_dir():
        return False
    claim(folder, stage)
    return (saved_about(folder / MODEL) or {}).get("step") == stage.steps


def _link(folder: Path, last: Path) -> None:
    """Make the model of the last stage that of the recipe."""
    new = folder / f".{MODEL}.new"
    with writing(folder):
        new.unlink(missing_ok=True)
        new.symlink_to(Path(last.name) / MODEL, target_is_directory=True)
        new.replace(folder / MODEL)
