"""RoBERTa and XLM-RoBERTa: BERT with positions that skip padding. Follows: arXiv:1907.11692,
arXiv:1911.02116.
"""

from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Table
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.text.bert import BertConfig, encoder_table, lm_head_rows
from zoo.models.parts.text.hub import read_bert, with_heads


def read(fields: Fields) -> BertConfig:
    """The configuration that a `config.json` of RoBERTa describes."""
    padding_id, model = fields.take("pad_token_id", 1), fields.model_type
    vocab_size = 50_265 if model == "roberta" else 30_522  # defaults of the two classes
    return read_bert(fields, vocab_size=vocab_size, default="ForMaskedLM", padding_id=padding_id)


def table(config: BertConfig) -> Table:
    """Keys of Hugging Face checkpoints with a head; `RobertaModel` leaves out the prefix."""
    rows = []
    if config.lm_head:
        words = "roberta.embeddings.word_embeddings.weight"
        rows = lm_head_rows("lm_head.dense", "lm_head.layer_norm", "lm_head", words)
    return encoder_table(config).under(theirs="roberta.") + Table(tuple(rows))


def _size(**sizes: int) -> BertConfig:
    fixed = {"num_types": 1, "padding_id": 1, "pooler": False, "match_head": False}
    return BertConfig(**{"max_length": 514, "norm_eps": 1e-5} | fixed | sizes)


_LARGE = {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096, "context_width": 1024}

# Sizes: config.json of FacebookAI/{roberta,xlm-roberta}-{base,large}.
VARIANTS = {
    "roberta_base": _size(vocab_size=50_265),
    "roberta_large": _size(vocab_size=50_265, **_LARGE),
    "xlm_roberta_base": _size(vocab_size=250_002),
    "xlm_roberta_large": _size(vocab_size=250_002, **_LARGE),
    "roberta_tiny": _size(
        vocab_size=64,
        max_length=18,
        width=32,
        depth=2,
        num_heads=2,
        mlp_dim=48,
        context_width=32,
        text_tokens=8,
    ),
}

register_base(
    Base(
        slug="roberta",
        title="RoBERTa: BERT, trained longer, with positions that skip padding",
        paper="arXiv:1907.11692",
        variants=VARIANTS,
        table=table,
        hf={"roberta": read, "xlm-roberta": read},
        fit=with_heads,
        renames=((r"^(embeddings|encoder|pooler)\.", r"roberta.\1."),),
    )
)
