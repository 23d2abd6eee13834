"""Typed configurations: that of a model knows its module and its inputs."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import flax.linen as nn

    from zoo.models.core.types import Batch

C = TypeVar("C")


@dataclass(frozen=True)
class SystemConfig:
    """Base of every configuration that `zoo.create` builds from: of a model, or of a system of
    another form, such as a tool, an evaluator or an agent. Frozen, hashable, of plain values.
    """

    def build(self) -> Any:
        """What this configuration describes; what it is called with is for its class to say."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")


@dataclass(frozen=True)
class ModelConfig(SystemConfig):
    """Base of every configuration of a model."""

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
    return with_field(config, "dtype", dtype)


def with_field(config: C, name: str, value: Any) -> C:
    """The same configuration with `value` in every field called `name`, however deep."""

    def change(item: Any) -> Any:
        if isinstance(item, tuple):
            return tuple(change(each) for each in item)
        if not dataclasses.is_dataclass(item) or isinstance(item, type):
            return item
        fields = {f.name: getattr(item, f.name) for f in dataclasses.fields(item) if f.init}
        new = {n: value if n == name else change(old) for n, old in fields.items()}
        return dataclasses.replace(item, **{n: v for n, v in new.items() if v is not fields[n]})

    return change(config)
