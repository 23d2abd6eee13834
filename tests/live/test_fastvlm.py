"""FastVLM against transformers, which has timm's encoder in it; and folding against timm's."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.live.reference import close, redraw, state_of, timm, torch, transformers
from tests.live.test_vision import drawn, variables_of
from zoo.models.parts.assemblies.classifier import ClassifierConfig
from zoo.models.parts.assemblies.llava import LlavaConfig
from zoo.models.parts.decoders.gqa import DecoderConfig
from zoo.models.parts.layers.rope import RopeConfig
from zoo.models.parts.towers.fastvit import FastViTConfig, fuse
from zoo.models.vlm import fastvlm

SIZES = {
    "layers": (1, 1, 2, 1, 1),
    "embed_dims": (8, 8, 16, 32, 32),
    "mlp_ratios": (2, 2, 2, 2, 2),
}
TOWER = {
    "image_size": 128,
    "depths": (1, 1, 2, 1, 1),
    "widths": (8, 8, 16, 32, 32),
    "mlp_ratios": (2, 2, 2, 2, 2),
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IMAGE = 60


def test_the_same_as_transformers():
    """Logits of a question about a picture of four tokens."""
    config = transformers.FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "hidden_size": 64,
            "model_args": {"inference_mode": True, **SIZES},
        },
        text_config={"model_type": "qwen2", **TEXT},
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    theirs = transformers.FastVlmForConditionalGeneration(config)
    drawn(redraw(theirs))
    ours = LlavaConfig(
        tower=FastViTConfig(**TOWER, form="folded"),
        decoder=DecoderConfig(
            vocab_size=64,
            width=24,
            depth=2,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=32,
            rope=RopeConfig(config.text_config.rope_parameters["rope_theta"]),
            norm_eps=config.text_config.rms_norm_eps,
            qkv_bias=True,
        ),
        vision_layer=None,
        image_id=IMAGE,
        text_tokens=6,
    )
    state = {key: leaf for key, leaf in state_of(theirs).items() if ".head.fc." not in key}
    params = fastvlm.hub_table(ours).load(state, variables_of(ours))
    rng = np.random.default_rng(0)
    pixels = rng.random((1, 1, 128, 128, 3)).astype(np.float32)
    ids = np.asarray([[5, IMAGE, 7, 8, 9, 10]])
    spread = np.asarray([[5, *[IMAGE] * 4, 7, 8, 9, 10]])
    with torch.no_grad():
        want = theirs(
            input_ids=torch.from_numpy(spread),
            pixel_values=torch.from_numpy(pixels[0].transpose(0, 3, 1, 2).copy()),
            attention_mask=torch.ones(spread.shape, dtype=torch.long),
        ).logits
    model = ours.build()

    @jax.jit
    def run(params):
        out = model.apply({"params": params}, {"pixels": pixels, "ids": jnp.asarray(ids)})
        return model.apply({"params": params}, out.hidden, method="head")

    close(run(params), want, what="logits")


def test_folding_is_timms():
    """Every tensor, as timm's `reparameterize` leaves it."""
    theirs = timm.create_model("fastvit_mci3", num_classes=5, pretrained=False, **SIZES)
    branches = ClassifierConfig(FastViTConfig(**TOWER, form="branches"), "mean", num_classes=5)
    table = fastvlm.timm_table(branches)
    loaded = table.load(state_of(drawn(theirs)), variables_of(branches))
    found = fuse(loaded)
    for module in theirs.modules():
        if hasattr(module, "reparameterize"):
            module.reparameterize()
    one = ClassifierConfig(FastViTConfig(**TOWER), "mean", num_classes=5)
    ours = fastvlm.timm_table(one).save(found)
    want = {k: v for k, v in state_of(theirs).items() if not k.endswith("num_batches_tracked")}
    assert set(ours) == set(want)
    for key, leaf in ours.items():
        close(leaf, want[key], 1e-5, what=key)
