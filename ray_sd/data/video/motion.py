"""How much moves in a clip."""

from itertools import pairwise

import cv2
import numpy as np

SIDE = 128
"""Longer side of what the optical flow is computed on, in pixels."""


def motion(frames: np.ndarray, fps: float) -> float:
    """Mean optical flow of a clip, in shares of the frame's longer side a second.

    frames: RGB uint8 [F, H, W, 3]; a single one has no motion. The flow is that of dense inverse search (arXiv:1603.03590).
    """
    cv2.setNumThreads(1)
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [_small_grey(frame) for frame in frames]
    moved = [np.linalg.norm(_flow(search, *pair), axis=-1).mean() for pair in pairwise(grey)]
    return float(np.mean(moved)) / SIDE * fps if moved else 0.0


def _flow(search: cv2.DISOpticalFlow, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Where each pixel of the first goes, float32 [h, w, 2]."""
    return search.calc(first, second, None)  # type: ignore[call-overload]  # None begins without a guess


def _small_grey(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    scale = SIDE / max(height, width)
    # The search wants a dozen pixels at least, also of a narrow clip.
    size = (max(16, round(width * scale)), max(16, round(height * scale)))
    shrink = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), size, interpolation=shrink)
