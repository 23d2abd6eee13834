"""The coupled towers against timm's ConvNeXt and transformers' CLIP, joined by plain PyTorch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.live.reference import close, redraw, state_of, timm, torch, transformers
from zoo.models.parts.towers.convnext import ConvNeXtConfig
from zoo.models.parts.towers.coupled import CoupledConfig, coupled_table
from zoo.models.parts.towers.vit import ViTConfig

F = torch.nn.functional
CONFIG = CoupledConfig(
    image_size=128,
    slow=ConvNeXtConfig(image_size=64, depths=(1, 1, 1, 1), widths=(4, 8, 12, 20)),
    fast=ViTConfig(
        image_size=12,
        patch_size=4,
        width=16,
        depth=4,
        num_heads=2,
        mlp_dim=24,
        position_resize="bicubic_antialias",
    ),
)


class Originals(torch.nn.Module):
    """Modules with the names that checkpoints have, run as the paper describes."""

    def __init__(self):
        super().__init__()
        slow, fast = CONFIG.slow, CONFIG.fast
        d, c = fast.width, slow.width
        tower = transformers.CLIPVisionConfig(
            hidden_size=d,
            intermediate_size=fast.mlp_dim,
            num_hidden_layers=fast.depth,
            num_attention_heads=fast.num_heads,
            image_size=fast.image_size,
            patch_size=fast.patch_size,
            attn_implementation="eager",
        )
        self.convnext = timm.models.ConvNeXt(depths=slow.depths, dims=slow.widths, num_classes=0)
        self.clip = transformers.CLIPVisionModel(tower)
        linear, conv = torch.nn.Linear, torch.nn.Conv2d
        self.align_stages_latent = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {
                    "slow_conv": conv(c, c, 1),
                    "slow_proj": conv(c, d, 1),
                    "fast_conv": conv(d, d, 7, padding=3, groups=d),
                    "fast_proj": conv(d, d, 1),
                    "gate": torch.nn.Sequential(
                        linear(2 * d, d // 2), torch.nn.GELU(), linear(d // 2, 1)
                    ),
                }
            )
            for _ in range(3)
        )
        self.align_stages = torch.nn.ModuleList(
            [torch.nn.ModuleDict({"fast_proj": linear(d, d), "slow_proj": linear(c, d)})]
        )

    def state(self):
        """With the prefixes of the towers, and the gain's key of the original."""
        prefixes = {
            "convnext.": "slow_vision_tower.vision_tower.",
            "clip.": "fast_vision_tower.vision_tower.",
        }
        out = {}
        for key, array in state_of(self).items():
            for old, new in prefixes.items():
                key = key.replace(old, new, 1) if key.startswith(old) else key
            if key.startswith("fast_vision") and ".vision_model." not in key:
                key = key.replace(
                    "vision_tower.vision_tower.", "vision_tower.vision_tower.vision_model."
                )
            if ".head." not in key and not key.endswith("position_ids"):
                out[key.replace(".gamma", ".weight")] = array
        return out

    def forward(self, pixels):
        """Pixels [B, 3, H, W] to [B, h w, D]."""
        slow = self.convnext.forward_features(pixels)
        side = CONFIG.fast.patch_size * CONFIG.grid[0]
        small = F.interpolate(pixels, (side, side), mode="bilinear", align_corners=True)
        clip = getattr(self.clip, "vision_model", self.clip)
        table = clip.embeddings.position_embedding.weight[1:]
        table = table.T.reshape(1, -1, *CONFIG.fast.grid)
        table = F.interpolate(table, CONFIG.grid, mode="bicubic", antialias=True)
        y = clip.embeddings.patch_embedding(small) + table
        y = clip.pre_layrnorm(y.flatten(2).transpose(1, 2))
        quarter = CONFIG.fast.depth // 4
        for number, layer in enumerate(clip.encoder.layers, 1):
            y = layer(y, None)
            y = y[0] if isinstance(y, tuple) else y
            if number % quarter == 0 and number < CONFIG.fast.depth:
                y = self.adapted(self.align_stages_latent[number // quarter - 1], y, slow)
        out = self.align_stages[0]
        return out["fast_proj"](y) + out["slow_proj"](slow.flatten(2).transpose(1, 2))

    @staticmethod
    def adapted(adapter, fast, slow):
        """After a quarter of the transformer."""
        slow = adapter["slow_proj"](F.gelu(adapter["slow_conv"](slow)))
        grid = fast.transpose(1, 2).reshape(slow.shape)
        grid = grid + adapter["fast_proj"](F.gelu(adapter["fast_conv"](grid)))
        means = torch.cat([grid, slow], 1).mean((2, 3))
        gate = torch.tanh(adapter["gate"](means))[..., None, None]
        return (grid + gate * slow).flatten(2).transpose(1, 2)


def shapes(config):
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
    return nn.unbox(jax.eval_shape(config.build().init, jax.random.key(0), pixels)["params"])


def test_the_towers_give_the_same():
    theirs = redraw(Originals())
    table, state = coupled_table(CONFIG), theirs.state()
    params = table.load(state, shapes(CONFIG))
    pixels = np.random.default_rng(0).normal(size=(2, 128, 128, 3)).astype(np.float32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    features = jax.jit(CONFIG.build().apply)({"params": params}, pixels[:, None])
    assert features.grid == CONFIG.grid == (4, 4)
    close(features.tokens[:, 0], want)
    for key, array in table.save(params).items():
        np.testing.assert_array_equal(array, state[key])


def test_full_size():
    config = CoupledConfig()
    assert config.grid == (32, 32) and config.width == 1024
    params = shapes(config)
    assert params["fast"]["stack"]["layers"]["adapter"]["slow_up"]["kernel"].shape[0] == 3
    assert coupled_table(config).shapes(params)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"image_size": 100}, "image_size = 100: want a multiple of the stride 32"),
        ({"fast": ViTConfig(depth=6)}, "depth = 6 of the transformer: want a multiple of 4"),
        ({"fast": ViTConfig()}, "give it a position_resize"),
        ({"fast": ViTConfig(class_token=False)}, "has a class token"),
    ],
)
def test_wrong_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        CoupledConfig(**sizes)


def test_hidden_states_are_refused():
    with pytest.raises(ValueError, match="want vision_layer=None"):
        CONFIG.build().apply({}, jnp.zeros((1, 128, 128, 3)), taps=(1,))
