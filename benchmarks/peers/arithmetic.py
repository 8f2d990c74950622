"""What every peer does with a batch."""

from __future__ import annotations

import base64

import numpy as np

CHANNELS = 64
_MEAN, _VAR = np.zeros(CHANNELS, np.float32), np.ones(CHANNELS, np.float32)
_WEIGHT, _BIAS = np.ones(CHANNELS, np.float32), np.zeros(CHANNELS, np.float32)


def normalize(data: bytes) -> bytes:
    """Batch normalization in eval mode, (N, 64) float32 in and out."""
    x = np.frombuffer(data, np.float32).reshape(-1, CHANNELS)
    return ((x - _MEAN) / np.sqrt(_VAR + np.float32(1e-5)) * _WEIGHT + _BIAS).tobytes()


def normalize_text(text: str) -> str:
    """The same in base64, for servers whose bodies are JSON."""
    return base64.b64encode(normalize(base64.b64decode(text))).decode()
