"""docTR's PARSeq: TokBench's own reader. The weights are a download, given by path."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.errors import ModelError
from vtc.eval.engines.base import EngineInfo, TextEngine, check_pixels, hashes, required, version_of, weights_file
from vtc.torchvision_guard import ensure_torchvision_imports

WEIGHTS = "parseq-56125471.pt"
HOW = (f"fetch {WEIGHTS} once from docTR's release v0.7.0 (https://doctr-static.mindee.com/models?id=v0.7.0/{WEIGHTS}"
       "&src=0) and give its path.")
INSTALL = "pip install python-doctr"
HEIGHT, WIDTH = 32, 128
MEAN, STD = (0.694, 0.695, 0.693), (0.299, 0.296, 0.301)
#: TokBench's batch; under `truths` it changes answers, else only the speed
BATCH = 64


class PARSeqEngine(TextEngine):
    """Crops are scaled to fit 32x128 and padded with black on the right and below; the vocabulary is "french".

    TokBench runs the model with the true words, which bounds all answers of a batch of 64 to one character more than
    its longest true word: `read` does the same where it is given `truths`, and else bounds them only by the 32
    characters that the model was built for.
    """

    def __init__(self, weights: str | os.PathLike[str] | None = None) -> None:
        path = weights_file(weights, "parseq", WEIGHTS, HOW)
        ensure_torchvision_imports()
        recognition = required("doctr.models.recognition", "parseq", INSTALL)
        vocabularies = required("doctr.datasets", "parseq", INSTALL).VOCABS
        self._model = recognition.parseq(pretrained=False, input_shape=(3, HEIGHT, WIDTH),
                                         vocab=vocabularies["french"]).eval()
        try:
            self._model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # no file of torch's, other keys, other shapes: all mean the same to the user
            raise ModelError(f"{path} does not hold the weights of docTR's PARSeq with the vocabulary 'french' "
                             f"({type(error).__name__}); {HOW}") from error
        self.info = EngineInfo("parseq", version_of("python-doctr"), path.stem, hashes(path),
                               {"vocabulary": "french", "input": f"{HEIGHT}x{WIDTH}", "batch": BATCH,
                                "torch": torch.__version__})

    @torch.inference_mode()
    def read(self, crops: Sequence[np.ndarray], truths: Sequence[str] | None = None) -> list[str]:
        words: list[str] = []
        for start in range(0, len(crops), BATCH):
            batch = torch.stack([_prepared(crop) for crop in crops[start : start + BATCH]])
            if truths is None:
                output = self._model(batch, return_preds=True)
            else:
                # The model wants them for their length only; characters outside its vocabulary would be refused.
                stand_ins = ["a" * max(1, len(truth)) for truth in truths[start : start + BATCH]]
                output = self._model(batch, stand_ins, return_preds=True)
            words.extend(word for word, _ in output["preds"])
        return words


def _prepared(crop: np.ndarray) -> Tensor:
    """uint8 (h, w, 3) to float32 (3, 32, 128), as docTR's Resize with the aspect ratio kept and its Normalize."""
    image = torch.from_numpy(check_pixels(crop)).permute(2, 0, 1).float() / 255
    height, width = image.shape[1:]
    ratio = height / width  # in docTR's order of operations, so that sizes are cut off alike
    size = (HEIGHT, max(1, int(HEIGHT / ratio))) if ratio > HEIGHT / WIDTH else (max(1, int(WIDTH * ratio)), WIDTH)
    image = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    image = F.pad(image, (0, WIDTH - size[1], 0, HEIGHT - size[0]))
    return (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
