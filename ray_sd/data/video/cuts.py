"""Where one scene ends and another begins."""

import cv2
import numpy as np
from scenedetect import ContentDetector, FrameTimecode

SIDE = 128
"""Longer side of what the detector looks at, in pixels."""


class CutDetector:
    """Looks at the frames of a video, one after the other. PySceneDetect's `ContentDetector` compares neighbours."""

    def __init__(self, threshold: float) -> None:
        cv2.setNumThreads(1)
        self._detector = ContentDetector(threshold=threshold, min_scene_len=0)
        self._number = 0

    def begins_scene(self, frame: np.ndarray) -> bool:
        """Whether a frame, RGB uint8 [h, w, 3], belongs to another scene than the one before it."""
        # The detector wants a rate, by which nothing is measured here.
        timecode = FrameTimecode(self._number, fps=1.0)
        self._number += 1
        return bool(self._detector.process_frame(timecode, np.ascontiguousarray(frame[:, :, ::-1])))
