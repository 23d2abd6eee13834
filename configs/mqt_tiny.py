"""Two minutes on a CPU: a dense model whose connector becomes one for any number of tokens."""

from dataclasses import replace

from zoo.configs._tiny import DENSE, two_stages
from zoo.models.connectors.mqt import MQT, training_budgets
from zoo.train.config import Recipe
from zoo.train.objectives import NextToken


def config() -> Recipe:
    """The recipe."""
    connector = MQT(num_queries=16, num_heads=4)
    budgets = NextToken(training_budgets(connector.num_queries), masked=True)
    return two_stages(
        "mqt_tiny", replace(DENSE, connector=connector), fresh=("connector/.*",), objective=budgets
    )
