"""MQT-LLaVA 7B: any number of vision tokens up to 256, on the data of LLaVA-1.5.

Follows: arXiv:2405.19315. All 256 tokens in the first stage; in the second, of two epochs, every
step draws an even number of them.
"""

from zoo.configs._llava import two_stages
from zoo.models.connectors.mqt import VARIANTS, training_budgets
from zoo.train.config import Recipe
from zoo.train.objectives import NextToken


def config() -> Recipe:
    """The recipe. One program masks tokens: one for each number would be compiled 128 times."""
    model = VARIANTS["mqt_llava_7b"]
    budgets = NextToken(training_budgets(model.connector.num_queries), masked=True)
    return two_stages("mqt_llava", model, objective=budgets, epochs=2)
