"""dlib's face recognition network, 128 numbers a face; its weights come in a package, so it works offline. The default.

Its cosine means nothing (a face and plain grey have one of 0.85), the Euclidean distance does: different people are
0.5 to 0.8 apart, and below 0.6 two pictures are usually called the same person. So it never gives TokBench's F-Sim.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from vtc.errors import ConfigError, ModelError
from vtc.eval.engines.base import (
    EngineInfo,
    FaceEngine,
    check_pixels,
    hashes,
    package_folder,
    required,
    version_of,
    weights_file,
)
from vtc.eval.tokbench import Box, Face

INSTALL = "pip install 'vtc[face]'"
NETWORK = "dlib_face_recognition_resnet_model_v1.dat"
LANDMARKS = "shape_predictor_5_face_landmarks.dat"
DETECTOR = "mmod_human_face_detector.dat"
#: side of dlib's box over the distance of the eyes, or of eyes and mouth, median of some frontal faces
BOX_OVER_EYES = 2.35


class DlibEngine(FaceEngine):
    """Landmarks are found once, in the original; the reconstruction is cut out by the same ones.

    weights: a folder with the three .dat files instead of the package face_recognition_models.
    Detection: histograms of gradients on the picture at twice its size, and where they find nobody, dlib's network.
    """

    measure = "distance"
    match_threshold = 0.6

    def __init__(self, weights: str | os.PathLike[str] | None = None) -> None:
        folder = (Path(weights) if weights is not None else
                  package_folder("face_recognition_models", "dlib", INSTALL) / "models")
        how = f"the package face_recognition_models brings it along ({INSTALL})."
        network, landmarks, self._detector_file = (weights_file(folder / name, "dlib", name, how)
                                                   for name in (NETWORK, LANDMARKS, DETECTOR))
        self._dlib = dlib = required("dlib", "dlib", INSTALL)
        try:
            self._landmarks = dlib.shape_predictor(str(landmarks))
            self._network = dlib.face_recognition_model_v1(str(network))
        except RuntimeError as error:
            raise ModelError(f"dlib cannot read its weights in {folder}: {error}") from error
        self._gradients = dlib.get_frontal_face_detector()
        self._cnn: Any = None
        self.info = EngineInfo("dlib", version_of("dlib-bin", "dlib"), Path(NETWORK).stem,
                               hashes(network, landmarks, self._detector_file),
                               {"dimensions": 128, "alignment": "5 landmarks of the original", "jitter": 0,
                                "padding": 0.25, "match_threshold": self.match_threshold})

    def detect(self, pixels: np.ndarray) -> list[Box]:
        pixels = check_pixels(pixels)
        found = list(self._gradients(pixels, 1))
        if not found:
            if self._cnn is None:
                self._cnn = self._dlib.cnn_face_detection_model_v1(str(self._detector_file))
            found = [detection.rect for detection in self._cnn(pixels, 0)]
        boxes = [(float(r.left()), float(r.top()), float(r.right() + 1), float(r.bottom() + 1)) for r in found]
        return sorted(boxes, key=lambda b: (b[0] - b[2]) * (b[3] - b[1]))

    def align(self, original: np.ndarray, face: Face) -> Any:
        if face.keypoints is not None:
            box = box_from_keypoints(face)
        elif face.box is not None:
            box = face.box
        else:
            raise ConfigError("A face is given by its box or its keypoints, and this one has neither.")
        left, top, right, bottom = (round(v) for v in box)
        return self._landmarks(check_pixels(original), self._dlib.rectangle(left, top, right - 1, bottom - 1))

    def embed(self, pixels: np.ndarray, alignment: Any) -> np.ndarray:
        return np.array(self._network.compute_face_descriptor(check_pixels(pixels), alignment), dtype=np.float64)


def box_from_keypoints(face: Face) -> Box:
    """The square that dlib's landmarks expect, around five keypoints as TokBench has them."""
    assert face.keypoints is not None
    left_eye, right_eye, nose, left_mouth, right_mouth = np.array(face.keypoints)
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    side = BOX_OVER_EYES * max(np.linalg.norm(right_eye - left_eye), np.linalg.norm(mouth - eyes))
    x, y = (eyes + nose) / 2
    return float(x - side / 2), float(y - side / 2), float(x + side / 2), float(y + side / 2)
