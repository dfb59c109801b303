"""Tesseract, as a program: `apt install tesseract-ocr`. One process reads a whole list of crops."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vtc.errors import ModelError
from vtc.eval.engines.base import EngineInfo, TextEngine, check_pixels, hashes

INSTALL = "install it, on Debian and Ubuntu with: apt install tesseract-ocr"
LANGUAGE = "eng"
#: smaller crops are enlarged to this height: Tesseract was trained on letters of some thirty pixels
MIN_HEIGHT = 48


class TesseractEngine(TextEngine):
    """Page segmentation mode 8, a single word, in English.

    weights: a folder with eng.traineddata instead of the program's own.
    """

    def __init__(self, weights: str | os.PathLike[str] | None = None) -> None:
        program = shutil.which("tesseract")
        if program is None:
            raise ModelError(f"The engine 'tesseract' needs the program tesseract; {INSTALL}.")
        folder = [] if weights is None else ["--tessdata-dir", str(weights)]
        self._command = [program, *folder]
        listing = self._run("--list-langs")
        where = re.search(r'in "([^"]+)"', listing)
        if LANGUAGE not in listing.splitlines():
            raise ModelError(f"Tesseract has no data for the language {LANGUAGE!r}"
                             f"{f' in {weights}' if weights else ''}; {INSTALL}.")
        data = Path(where[1]) / f"{LANGUAGE}.traineddata" if where else None
        version = self._run("--version").split("\n")[0].strip()
        self.info = EngineInfo("tesseract", version, f"{LANGUAGE}.traineddata",
                               hashes(data) if data and data.is_file() else {},
                               {"psm": 8, "min_height": MIN_HEIGHT, "answers": "spaces removed"})

    def read(self, crops: Sequence[np.ndarray], truths: Sequence[str] | None = None) -> list[str]:
        if not crops:
            return []
        with tempfile.TemporaryDirectory(prefix="vtc-tesseract-") as folder:
            names = []
            for number, crop in enumerate(crops):
                names.append(f"{folder}/{number}.ppm")
                _prepared(check_pixels(crop)).save(names[-1])
            listing = Path(folder) / "crops.txt"
            listing.write_text("\n".join(names) + "\n")
            table = self._run(str(listing), "stdout", "-l", LANGUAGE, "--psm", "8", "-c", "tessedit_create_tsv=1")
        return _answers(table, len(crops))

    def _run(self, *arguments: str) -> str:
        # Without the limit its threads spin, which is slower for single words.
        environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
        try:
            done = subprocess.run([*self._command, *arguments], capture_output=True, env=environment, check=False)
        except OSError as error:
            raise ModelError(f"Tesseract cannot be started: {error}; {INSTALL}.") from error
        if done.returncode:
            message = " ".join(done.stderr.decode(errors="replace").split())[:200]
            raise ModelError(f"Tesseract failed: {message}")
        return done.stdout.decode(errors="replace")


def _answers(table: str, count: int) -> list[str]:
    """Column 2 of Tesseract's TSV is the page, from 1 on, column 12 the text; each page has rows, with text or without.

    Plain text would not do: whether its form feeds stand between pages or after each has changed with versions.
    """
    answers: dict[int, str] = {}
    for row in table.splitlines()[1:]:
        columns = row.split("\t", 11)
        page = int(columns[1])
        answers[page] = answers.get(page, "") + "".join(columns[11].split() if len(columns) == 12 else ())
    if sorted(answers) != list(range(1, count + 1)):
        raise ModelError(f"Tesseract answered {len(answers)} crops of {count}.")
    return [answers[page] for page in range(1, count + 1)]


def _prepared(crop: np.ndarray) -> Image.Image:
    """Enlarged to MIN_HEIGHT. No margin: mode 8 takes the crop's height for the line's, and misreads what is framed."""
    image = Image.fromarray(crop)
    if image.height >= MIN_HEIGHT:
        return image
    width = max(1, round(image.width * MIN_HEIGHT / image.height))
    return image.resize((width, MIN_HEIGHT), Image.Resampling.BICUBIC)
