"""BERT, with the heads that its checkpoint has. Follows: arXiv:1810.04805."""

from zoo.models.core.hf import Fields
from zoo.models.core.keytable import Row, Table, flat, linear
from zoo.models.core.registry import Base, register_base
from zoo.models.parts.text.bert import BertConfig, encoder_table, lm_head_rows
from zoo.models.parts.text.hub import read_bert, with_heads


def read(fields: Fields) -> BertConfig:
    """The configuration that a `config.json` of BERT describes."""
    # In Google's own files, read by no code of the original.
    unread = ("fc_size", "num_attention_heads", "num_fc_layers", "size_per_head", "type")
    fields.ignore("directionality", *(f"pooler_{name}" for name in unread))
    return read_bert(fields, vocab_size=30_522, default="ForPreTraining")


def table(config: BertConfig) -> Table:
    """Keys of Hugging Face checkpoints of BERT with heads; `BertModel` leaves out the prefix."""
    found = encoder_table(config).under(theirs="bert.")
    rows = []
    if config.lm_head:
        head, words = "cls.predictions", "bert.embeddings.word_embeddings.weight"
        dense, norm = f"{head}.transform.dense", f"{head}.transform.LayerNorm"
        rows += lm_head_rows(dense, norm, head, words)
    if config.match_head:
        rows += [
            Row("match_head/kernel", "cls.seq_relationship.weight", linear()),
            Row("match_head/bias", "cls.seq_relationship.bias", flat),
        ]
    return found + Table(tuple(rows))


# Sizes: config.json of google-bert/bert-{base,large}-uncased.
VARIANTS = {
    "bert_base_uncased": BertConfig(),
    "bert_large_uncased": BertConfig(
        width=1024, depth=24, num_heads=16, mlp_dim=4096, context_width=1024
    ),
    "bert_tiny": BertConfig(
        vocab_size=64,
        max_length=16,
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
        slug="bert",
        title="BERT: a bidirectional encoder of texts",
        paper="arXiv:1810.04805",
        variants=VARIANTS,
        table=table,
        hf={"bert": read},
        fit=with_heads,
        renames=(
            (r"^(embeddings|encoder|pooler)\.", r"bert.\1."),
            (r"LayerNorm\.gamma$", "LayerNorm.weight"),
            (r"LayerNorm\.beta$", "LayerNorm.bias"),
        ),
    )
)
