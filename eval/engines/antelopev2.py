"""insightface's antelopev2, its recogniser alone: TokBench's own, 512 numbers a face. The weights are a download.

insightface itself is not needed: the face is warped onto the five points of ArcFace's template and given to ONNX
Runtime, which is all that its recogniser does.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from vtc.errors import ConfigError, ModelError
from vtc.eval.engines.base import EngineInfo, FaceEngine, check_pixels, hashes, required, version_of, weights_file
from vtc.eval.tokbench import Box, Face

WEIGHTS = "glintr100.onnx"
HOW = (f"fetch antelopev2.zip once from insightface's release v0.7 (https://github.com/deepinsight/insightface/releases"
       f"/download/v0.7/antelopev2.zip), unpack it, and give the path of its {WEIGHTS} or of the folder.")
INSTALL = "pip install onnxruntime opencv-python-headless"
SIDE = 112
#: eyes, nose, corners of the mouth in a picture of 112x112 (ArcFace, Deng et al., 1801.07698)
TEMPLATE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
                     [70.7299, 92.2041]])


class AntelopeV2Engine(FaceEngine):
    """Cosines of its vectors are TokBench's F-Sim. It needs annotated keypoints: no detector is used."""

    measure = "f_sim"

    def __init__(self, weights: str | os.PathLike[str] | None = None) -> None:
        path = weights_file(weights, "antelopev2", WEIGHTS, HOW)
        self._cv2 = required("cv2", "antelopev2", INSTALL)
        onnxruntime = required("onnxruntime", "antelopev2", INSTALL)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            (self._input,), (self._output,) = self._session.get_inputs(), self._session.get_outputs()
        except Exception as error:  # ONNX Runtime's own exception classes, or more than one input or output
            raise ModelError(f"{path} is not antelopev2's recogniser in ONNX ({type(error).__name__}); {HOW}"
                             ) from error
        if list(self._input.shape[2:]) != [SIDE, SIDE]:
            raise ModelError(f"{path} takes pictures of {self._input.shape}, not {SIDE}x{SIDE}: it is not antelopev2's "
                             f"recogniser; {HOW}")
        self.info = EngineInfo("antelopev2", version_of("onnxruntime"), path.stem, hashes(path),
                               {"alignment": "annotated keypoints, ArcFace's template", "input": f"{SIDE}x{SIDE}",
                                "opencv": self._cv2.__version__})

    def detect(self, pixels: np.ndarray) -> list[Box]:
        raise ModelError("antelopev2 is used with annotated keypoints only, as in TokBench; it searches for no faces. "
                         "Give annotations, or use the engine 'dlib'.")

    def align(self, original: np.ndarray, face: Face) -> Any:
        if face.keypoints is None:
            raise ConfigError("antelopev2 needs the five keypoints of each face, as TokBench's annotations have them.")
        return similarity(np.array(face.keypoints), TEMPLATE)

    def embed(self, pixels: np.ndarray, alignment: Any) -> np.ndarray:
        crop = self._cv2.warpAffine(check_pixels(pixels), alignment, (SIDE, SIDE), borderValue=0.0)
        planes = (crop.transpose(2, 0, 1)[None].astype(np.float32) - 127.5) / 127.5
        (vector,) = self._session.run([self._output.name], {self._input.name: planes})
        return vector.reshape(-1).astype(np.float64)


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Scale, rotation and shift (2, 3) that bring `source` (N, 2) nearest to `target`, by least squares.

    In complex numbers it is a regression, w = a z + b (Umeyama 1991 without reflections).
    """
    z, w = (points[:, 0] + 1j * points[:, 1] for points in (source, target))
    z_mean, w_mean = z.mean(), w.mean()
    spread = np.vdot(z - z_mean, z - z_mean).real
    if spread == 0:
        raise ConfigError("The keypoints of a face lie all in one place.")
    a = np.vdot(z - z_mean, w - w_mean) / spread
    b = w_mean - a * z_mean
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
