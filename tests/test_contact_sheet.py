"""scripts/contact_sheet.py: which pictures, which files, and what stands where on the sheet."""

from __future__ import annotations

import json
from importlib import import_module

import numpy as np
import pytest
import torch

from tests.shared import ROOT
from vtc.codecs.classical import available_codecs
from vtc.images import load_image, save_image
from vtc.models import load_codec
from vtc.tokenizers.local_vq import LocalVQ

#: Pillow's builds differ in what they can write
PEER = next(p for p in ("jpeg2000", "avif") if p in available_codecs())


@pytest.fixture
def script(monkeypatch):
    """Imported as when it is run: scripts import their neighbours."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("contact_sheet")


@pytest.fixture
def folders(tmp_path):
    torch.manual_seed(0)
    LocalVQ(codebook_size=8, dim=4, encoder_widths=(4, 4, 4), encoder_depths=(0, 0, 1), decoder_widths=(4, 4, 4, 4),
            decoder_depths=(0, 0, 0, 1), thin=4).save_pretrained(tmp_path / "model")
    y, x = np.mgrid[:96, :128]
    for folder, count in (("a", 5), ("b", 2)):
        (tmp_path / folder).mkdir()
        for n in range(count):
            pixels = np.stack([(x * (n + 1) + c * y) % 256 for c in range(3)], -1).astype(np.uint8)
            save_image(pixels, tmp_path / folder / f"{folder}{n}.png")
    return tmp_path


def test_pictures_by_name_or_evenly_out_of_each_folder(script, folders):
    both = [folders / "a", folders / "b"]
    assert [f.name for f in script.chosen(both, None, 2)] == ["a1.png", "a3.png", "b0.png", "b1.png"]
    assert [f.name for f in script.chosen(both, None, 9)] == [*(f"a{n}.png" for n in range(5)), "b0.png", "b1.png"]
    assert [f.name for f in script.chosen(both, ["b1.png", "a0.png"], 1)] == ["b1.png", "a0.png"]


def test_a_sheet_and_its_scores(script, folders):
    assert script.main(["--model", str(folders / "model"), "--images", str(folders / "a"), "--per_folder", "1",
                        "--rates", "0.5", "0.001", "--peers", PEER, "--crop", "60", "--quiet", "-o",
                        str(folders / "sheet.png"), "--scores", str(folders / "scores.json")]) == 0
    rows = json.loads((folders / "scores.json").read_text())
    ours = next(row for row in rows if row["codec"] == "ours, -q 1")
    pixels = load_image(folders / "a/a2.png")
    (data,) = load_codec(folders / "model").compress(pixels.tensor()[None])
    assert ours["image"] == "a2.png" and ours["num_bytes"] == len(data) and ours["bpp"] == 8 * len(data) / (96 * 128)
    assert {row["codec"] for row in rows} <= {"ours, -q 1", PEER}  # at 0.001 bpp there is no file
    assert all(row["num_bytes"] <= len(data) for row in rows)
    sheet = load_image(folders / "sheet.png").pixels
    assert sheet.shape[1] == 3 * (60 + 8) + 8
    assert (sheet[8:68, 8:68] == pixels.pixels[18:78, 34:94]).all()  # the original's middle comes first
    second = sheet.shape[0] // 2 + 4  # the two rows are alike; in the lower one of 0.5 bpp a picture of ours
    assert (sheet[8:68, 76:136] == 255).all() and not (sheet[second : second + 60, 76:136] == 255).all()


def test_mistakes_are_told_in_a_sentence(script, folders, capsys):
    common = ["--model", str(folders / "model"), "--images", str(folders / "a"), "--peers", PEER, "--quiet", "-o"]
    assert script.main([*common, str(folders / "sheet.bmp")]) == 1
    assert "The sheet is one of .png" in capsys.readouterr().err
    assert script.main([*common, str(folders / "s.png"), "--pick", "no.png"]) == 1
    assert "--pick names no.png" in capsys.readouterr().err
