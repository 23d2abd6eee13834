"""From sound to spectrograms."""

import numpy as np


def log_mel(wave: np.ndarray, rate: int = 16_000, bins: int = 128) -> np.ndarray:
    """The logarithm of the energy in mel bands, float32 [frames, bins]: a frame of 25 ms every 10
    ms, under a Hann window.

    Mel bands are triangles, evenly spaced from 20 Hz to half of `rate` on the scale 1127 log(1 + f
    / 700). The mean of the whole wave, and then of each frame, is taken away, and frames are
    pre-emphasised by 0.97.

    Args:
      wave: [samples].
      rate: samples per second.
      bins: mel bands.

    Raises:
      ValueError: less than one frame.
    """
    length, hop = rate * 25 // 1000, rate // 100
    wave = np.asarray(wave, np.float64)
    if wave.ndim != 1 or wave.size < length:
        raise ValueError(f"wave: got {wave.shape}, want one channel of {length} samples or more")
    wave = wave - wave.mean()
    frames = np.lib.stride_tricks.sliding_window_view(wave, length)[::hop]
    frames = frames - frames.mean(1, keepdims=True)
    before = np.concatenate([frames[:, :1], frames[:, :-1]], 1)
    size = 1 << (length - 1).bit_length()
    power = np.abs(np.fft.rfft((frames - 0.97 * before) * np.hanning(length), size)) ** 2
    energy = power[:, :-1] @ _triangles(bins, size, rate).T
    return np.log(np.maximum(energy, np.finfo(np.float32).eps)).astype(np.float32)


def _triangles(bins: int, size: int, rate: int) -> np.ndarray:
    """Weights of the frequencies in each band, [bins, size / 2]."""
    edges = np.linspace(_mel(20.0), _mel(rate / 2), bins + 2)
    at = _mel(np.arange(size // 2) * rate / size)
    low, centre, high = (edges[i : i + bins, None] for i in range(3))
    return np.maximum(0, np.minimum((at - low) / (centre - low), (high - at) / (high - centre)))


def _mel(frequency: np.ndarray | float) -> np.ndarray:
    return 1127 * np.log1p(np.asarray(frequency) / 700)
