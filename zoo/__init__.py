"""A JAX/Flax model zoo for vision-language models.

The names below are the public interface. They are looked up when first used: importing the package
is instant, and JAX is imported when a model is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.costing import Cost, cost
    from zoo.generate.sampling import Sampling
    from zoo.loading import load
    from zoo.models.core.card import Card
    from zoo.models.core.errors import UsageError, ZooError
    from zoo.models.core.registry import card, config, create, list_models

__version__ = "0.1.0"

__all__ = [
    "Card",
    "Cost",
    "Sampling",
    "UsageError",
    "ZooError",
    "__version__",
    "card",
    "config",
    "cost",
    "create",
    "list_models",
    "load",
]

_HOMES = {
    "Card": "zoo.models.core.card",
    "Cost": "zoo.costing",
    "Sampling": "zoo.generate.sampling",
    "UsageError": "zoo.models.core.errors",
    "ZooError": "zoo.models.core.errors",
    "card": "zoo.models.core.registry",
    "config": "zoo.models.core.registry",
    "cost": "zoo.costing",
    "create": "zoo.models.core.registry",
    "list_models": "zoo.models.core.registry",
    "load": "zoo.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
