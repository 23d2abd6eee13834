"""LLMC+: the methods for fewer vision tokens that its toolkit has and no other file of the zoo, so
that all can be compared: `zoo bench tokens`.

Before the decoder act `random`, `uniform`, `divprune`, `tome`, `visionzip`, `vispruner` and
`mustdrop`; within it `fastv`, `dart` and `sparsevlm`. Nothing is learned. The selections of its
methods for videos (DyCoke, PruneVid, FastVID, HoliTom) are functions, in `video`.

Follows: arXiv:2508.09981 and the papers that the methods name.
"""

from dataclasses import replace

from zoo.models.base import llava
from zoo.models.core.card import Card
from zoo.models.core.registry import register
from zoo.models.parts.assemblies.llava_hub import hub_table
from zoo.models.reduction.llmc_plus.baselines import DivPrune, Random, Uniform
from zoo.models.reduction.llmc_plus.decoder import DART, FastV
from zoo.models.reduction.llmc_plus.sparsevlm import SparseVLM
from zoo.models.reduction.llmc_plus.tower import MustDrop, ToMe, VisionZip, VisPruner

CARD = Card(
    slug="llmc_plus",
    paper="arXiv:2508.09981",
    code="https://github.com/ModelTC/LightCompress",
    differs=(
        "Every method keeps the number of tokens that it is given, merged ones and pivots among "
        "them, or fewer; the toolkit rounds each in its own way.",
        "Of equal scores the first token is taken; the toolkit adds noise, or leaves it to torch.",
        "ToMe merges at the tower's output by the keys of its last layer that is read, not within "
        "every layer, and its tokens stand where the first of their patches was.",
        "VisionZip does not keep the class token, which has no place among the patches.",
        "VisPruner takes lists of odd length; the toolkit fails there.",
        "DART compares hidden states without the final norm's gains, and visits its pivots in "
        "their order, those of the picture first.",
        "SparseVLM takes batches and any budget; its means stand where the centres of their "
        "clusters were.",
        "Pictures in tiles are reduced tile by tile before the decoder, and together within it.",
        "The methods for videos select on arrays and are no parts of a model.",
    ),
)

_LLAVA, _TINY = llava.VARIANTS["llava_1_5_7b"], llava.VARIANTS["llava_tiny"]

VARIANTS = {
    "llmc_plus_fastv_7b": replace(_LLAVA, policies=(FastV(),)),
    "llmc_plus_dart_7b": replace(_LLAVA, policies=(DART(),)),
    "llmc_plus_sparsevlm_7b": replace(_LLAVA, policies=(SparseVLM(),)),
    "llmc_plus_visionzip_7b": replace(_LLAVA, reducer=VisionZip()),
    "llmc_plus_divprune_7b": replace(_LLAVA, reducer=DivPrune()),
    "llmc_plus_tiny": replace(_TINY, policies=(FastV(0.5),)),
}

register(
    CARD,
    VARIANTS,
    table=hub_table,
    reducers={
        "random": Random,
        "uniform": Uniform,
        "divprune": DivPrune,
        "tome": ToMe,
        "visionzip": VisionZip,
        "vispruner": VisPruner,
        "mustdrop": MustDrop,
        "fastv": FastV,
        "dart": DART,
        "sparsevlm": SparseVLM,
    },
)
