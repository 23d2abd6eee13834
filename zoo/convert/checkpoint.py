"""A Hugging Face checkpoint as a model of this zoo, before any of its weights is read."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn

from zoo.convert.folder import CONFIG, read_config, read_weights
from zoo.convert.layout import Layout, lay_out
from zoo.convert.place import abstract_variables
from zoo.models.core.config import ModelConfig
from zoo.models.core.errors import UsageError, ZooError
from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Piece, Table
from zoo.models.core.registry import Base, base_of, read_hf


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose configuration and headers have been read.

    Attributes:
      folder: where it is.
      model_type: the architecture's name there.
      base: the architecture here.
      config: of the model.
      layout: its tensors under the names of the key table.
      boxed: shapes of the parameters, with the logical names of their axes, and below `stats` those
        of running statistics.
    """

    folder: Path
    model_type: str
    base: Base
    config: ModelConfig
    layout: Layout
    boxed: Any

    @property
    def table(self) -> Table:
        """Ties its tensors to the parameters."""
        return self.base.table(self.config)

    def pieces(self) -> Iterator[Piece]:
        """The parameters and running statistics, see `Table.stream`.

        Raises:
          ZooError: the weights do not fit the model.
        """
        try:
            return self.table.stream(self.layout.tensors, nn.unbox(self.boxed))
        except ZooError as error:
            raise ZooError(f"{self.folder}: {error}") from error


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read all of a checkpoint but its weights.

    Raises:
      UsageError: an unknown architecture, or a setting that changes the numbers and is not
        understood.
      ZooError: its configuration or a file of its weights cannot be used.
    """
    fields = read_config(folder)
    model_type = fields["model_type"]
    base = base_of(model_type)
    with _meant(folder):
        config = read_hf(Fields(model_type, fields))
    found = read_weights(folder)
    if base.fit is not None:
        config = base.fit(config, found)
    with _meant(folder):
        boxed = abstract_variables(config)
        table = base.table(config)
        wanted = frozenset(table.shapes(nn.unbox(boxed)))
    layout = lay_out(found, base.renames, wanted, table.ignored)
    return Checkpoint(folder, model_type, base, config, layout, boxed)


@contextlib.contextmanager
def _meant(folder: Path) -> Iterator[None]:
    """Turn what values of no sense lead to, in a reader or a module, into an error that names the
    file that they are in.
    """
    try:
        yield
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        why = (str(error).splitlines() or [""])[0][:300]
        raise UsageError(
            f"{folder / CONFIG} describes no model: {type(error).__name__}: {why}"
        ) from error
