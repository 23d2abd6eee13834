"""The PyTorch originals: import `torch`, `transformers` and `timm` from here, never directly.

torchvision's own operators are not in its wheel for the CPU build of PyTorch; those that it
registers a shape rule for when it is imported must be declared first.
"""

import numpy as np
import torch

_OPERATORS = torch.library.Library("torchvision", "DEF")
_OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
import transformers  # noqa: E402

__all__ = ["close", "redraw", "state_of", "timm", "torch", "transformers"]

torch.set_num_threads(1)  # the tests run in parallel processes


def redraw(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """`module` in float32 and eval mode, every parameter drawn anew, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    module = module.float().eval()
    with torch.no_grad():
        for name, leaf in module.named_parameters():
            noise = torch.randn(leaf.shape, generator=generator)
            is_norm = leaf.ndim == 1 and name.endswith("weight")
            fan_in = leaf[0].numel() if leaf.ndim > 1 else 16
            leaf.copy_(1 + 0.1 * noise if is_norm else noise / fan_in**0.5)
    return module


def state_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict of `module` as NumPy arrays."""
    return {name: leaf.detach().numpy() for name, leaf in module.state_dict().items()}


def close(ours, theirs, tolerance: float = 1e-4, what: str = "") -> None:
    """Assert that the largest error is at most `tolerance` of the largest reference value."""
    theirs = theirs.detach().float().numpy() if isinstance(theirs, torch.Tensor) else theirs
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, f"{what}: ours {ours.shape}, theirs {theirs.shape}"
    error, scale = np.abs(ours - theirs).max(), max(np.abs(theirs).max(), 1e-12)
    assert error <= tolerance * scale, f"{what}: error {error:.3g} at a scale of {scale:.3g}"
