"""RapidOCR: PaddleOCR's recogniser in ONNX; its weights come in the wheel, so it works offline. The default."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from vtc.errors import ModelError
from vtc.eval.engines.base import (
    EngineInfo,
    TextEngine,
    check_pixels,
    hashes,
    package_folder,
    required,
    version_of,
    weights_file,
)

INSTALL = "pip install 'vtc[ocr]'"
MODEL = "PP-OCRv6_rec_small.onnx"
#: the recogniser knows Chinese, and writes ASCII now and then in its full-width forms, U+FF01 to U+FF5E
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


class RapidOCREngine(TextEngine):
    """One crop a call: in a batch all crops are padded to the widest, and their answers change with their neighbours.

    weights: another recogniser in ONNX with its characters inside, instead of the wheel's.
    """

    def __init__(self, weights: str | os.PathLike[str] | None = None) -> None:
        bundled = package_folder("rapidocr", "rapidocr", INSTALL) / "models" / MODEL
        path = weights_file(weights or bundled, "rapidocr", MODEL,
                            "rapidocr from 3.10 on has it in its wheel; another recogniser may be given by path.")
        required("onnxruntime", "rapidocr", INSTALL)
        rapidocr = required("rapidocr", "rapidocr", INSTALL)
        try:
            # With a path for its model, RapidOCR downloads nothing.
            self._engine = rapidocr.RapidOCR(params={
                "Global.use_det": False, "Global.use_cls": False, "Global.use_preprocess_img": False,
                "Global.log_level": "critical", "Rec.model_path": str(path),
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1})
            self._engine(np.zeros((8, 8, 3), np.uint8))  # the model is loaded with the first picture
        except Exception as error:  # whatever RapidOCR and ONNX Runtime raise for a file that is no recogniser
            raise ModelError(f"RapidOCR cannot use {path} as its recogniser: {' '.join(str(error).split())[:200]}"
                             ) from error
        self.info = EngineInfo("rapidocr", version_of("rapidocr"), path.stem, hashes(path),
                               {"onnxruntime": version_of("onnxruntime"), "batch": 1,
                                "answers": "spaces removed, full-width ASCII to ASCII"})

    def read(self, crops: Sequence[np.ndarray], truths: Sequence[str] | None = None) -> list[str]:
        return [self._read(check_pixels(crop)) for crop in crops]

    def _read(self, crop: np.ndarray) -> str:
        blue_first = np.ascontiguousarray(crop[:, :, ::-1])  # RapidOCR takes arrays as OpenCV has them
        lines = self._engine(blue_first).txts or ("",)
        return "".join(lines[0].translate(FULL_WIDTH).split())
