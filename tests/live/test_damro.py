"""DAMRO on the LLaVA models of transformers: both readings and their contrast, computed there."""

import numpy as np
import pytest

from tests.live import test_llava_family as family
from tests.live.reference import torch
from zoo.agents.damro import Damro
from zoo.generate.autoregressive import Answers, Reader

STEPS = 4
DAMRO = Damro(alpha=1.5, beta=0.05, top_k=3)
ROWS = {
    "llava": [[5, 6, family.whole(seed=1), 8, 9], [5, family.whole(seed=3), 4]],
    "next": [[5, 6, family.tiled((30, 31), seed=1), 7], [5, family.tiled((50, 13), seed=3), 4, 8]],
}


def outlier_tokens(hf, tile):
    """The projected outliers of one tile [H, W, 3], by queries and keys that hooks catch."""
    tower, caught = hf.model.vision_tower, {}
    layer = hf.config.vision_config.num_hidden_layers - 2
    for name, module in tower.named_modules():
        for part in ("q", "k"):
            if name.endswith(f"layers.{layer}.self_attn.{part}_proj"):
                keep = lambda _, __, out, part=part: caught.update({part: out})
                caught[f"{part} hook"] = module.register_forward_hook(keep)
    pixels = torch.tensor(tile.transpose(2, 0, 1)[None])
    features = tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
    for part in ("q", "k"):
        caught[f"{part} hook"].remove()
    logits = caught["q"][0, 0] @ caught["k"][0].T * features.shape[-1] ** -0.5
    index = torch.topk(torch.softmax(logits, -1)[1:], DAMRO.top_k).indices
    return hf.model.multi_modal_projector(features[index])


def negative(hf, row):
    """The logits after a row of which the outliers alone are seen."""
    embed, parts = hf.get_input_embeddings(), []
    for item in row:
        if isinstance(item, family.Picture):
            parts.append(outlier_tokens(hf, item.tiles[0]))
            if hf.config.model_type == "llava_next":
                parts.append(hf.model.image_newline[None])
        else:
            parts.append(embed(torch.tensor([item])))
    whole = torch.cat(parts)[None]
    hidden = hf.model.language_model(inputs_embeds=whole).last_hidden_state
    return hf.lm_head(hidden)[0, -1]


@pytest.mark.parametrize("name", list(ROWS))
def test_contrast_with_the_outliers(name):
    hf, config, params = family.converted(name)
    assembly = family.dataclasses.replace(family.ASSEMBLIES[name], rows=ROWS[name])
    plain = Reader(config.build())
    written = {}
    for reader in (plain, DAMRO(plain)):
        answers = Answers(reader, params, family.ours(assembly), max_new_tokens=STEPS, eos_id=())
        answers.advance(STEPS)
        written[reader] = answers.ids()
    for number, row in enumerate(ROWS[name]):
        row, said = list(row), []
        for _ in range(STEPS):
            with torch.no_grad():
                first, second = family.theirs(hf, row)[-1], negative(hf, row)
            scores = (1 + DAMRO.alpha) * first - DAMRO.alpha * second
            scores[first < np.log(DAMRO.beta) + first.max()] = -torch.inf
            said.append(int(scores.argmax()))
            row.append(said[-1])
        assert written[DAMRO(plain)][number].tolist() == said
    assert (written[plain] != written[DAMRO(plain)]).any()
