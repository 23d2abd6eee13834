"""The typed configuration of a model, which knows its module and its inputs."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import flax.linen as nn

    from zoo.models.core.types import Batch

C = TypeVar("C")


@dataclass(frozen=True)
class ModelConfig:
    """Base of every configuration that `zoo.create` builds a model from.

    Frozen, hashable, of plain values.
    """

    def build(self) -> "nn.Module":
        """The Flax module of this configuration."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")

    def inputs(self, batch_size: int) -> "Batch":
        """A batch of `jax.ShapeDtypeStruct`: the shapes for tests, cost and planning."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it takes")


def with_dtype(config: C, dtype: str) -> C:
    """The same configuration, computing in `dtype`: every field of that name, however deep.

    Args:
      config: a frozen dataclass.
      dtype: a name that NumPy knows with ml_dtypes, such as "float32" or "bfloat16".
    """

    def change(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(change(item) for item in value)
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return value
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        new = {n: dtype if n == "dtype" else change(old) for n, old in fields.items()}
        return dataclasses.replace(value, **{n: v for n, v in new.items() if v is not fields[n]})

    return change(config)
