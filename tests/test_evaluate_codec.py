"""scripts/evaluate_codec.py, whole: a tiny random model on two small pictures."""

import csv
import json
import math
from importlib import import_module

import numpy as np
import pytest
import torch

from tests.shared import ROOT, SHARED, needs_shared
from vtc.images import load_image, save_image
from vtc.tokenizers.local_vq import LocalVQ


@pytest.fixture
def evaluate_codec(monkeypatch):
    """The script, imported as when it is run: scripts import their neighbours."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return import_module("evaluate_codec")


@pytest.fixture
def run(evaluate_codec, folders):
    """Calls the script on the folders' pictures."""
    return lambda output, *more: evaluate_codec.main([
        "--model", str(folders / "model"), "--images", str(folders / "images"), "--output", str(output), "--quiet",
        *more])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and a folder of two pictures."""
    root = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    LocalVQ(codebook_size=32, dim=4, encoder_widths=(4, 4, 4), encoder_depths=(0, 0, 1), decoder_widths=(4, 4, 4, 4),
            decoder_depths=(0, 0, 0, 1), thin=4).save_pretrained(root / "model")
    (root / "images").mkdir()
    y, x = np.mgrid[:64, :80]
    for i in range(2):
        pixels = np.stack([(x * (i + 1) + c * y) % 256 for c in range(3)], -1).astype(np.uint8)
        save_image(pixels, root / "images" / f"{i}.png")
    return root


def test_what_is_written_agrees_with_the_files(folders, run, tmp_path):
    """JPEG 2000 is the one peer that reaches the few dozen bytes of 20 tokens."""
    assert run(tmp_path, "--compare", "jpeg2000", "webp", "--best_by", "psnr", "--sheet", "1.png",
               "--save_reconstructions") == 0
    report = json.loads((tmp_path / "results.json").read_text())
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ours = [row for row in rows if row["codec"] == "ours"]
    assert [row["image"] for row in ours] == ["0.png", "1.png"]
    for row in ours:
        assert float(row["bpp"]) == 8 * int(row["num_bytes"]) / (64 * 80)
        assert row["ms_ssim"] == ""  # smaller than 161 pixels
        original, decoded = (load_image(path).pixels.astype(float) for path in (
            folders / "images" / row["image"], tmp_path / "reconstructions" / "ours" / row["image"]))
        psnr = 10 * math.log10(255**2 / np.square(original - decoded).mean())
        assert float(row["psnr"]) == pytest.approx(psnr, abs=1e-5)
    budgets = {row["image"]: int(row["num_bytes"]) for row in ours}
    for row in rows:
        assert int(row["num_bytes"]) <= budgets[row["image"]]
    mean = report["means"]["ours"]
    assert mean["psnr"] == pytest.approx(np.mean([float(row["psnr"]) for row in ours]))
    assert mean["ms_ssim"] is None
    assert mean["lattice_ratio"] is None  # NaN: no line holds 256 pixels
    assert report["codebook"]["tokens"] == 2 * 4 * 5
    assert report["model"]["fingerprint"] == LocalVQ.from_pretrained(folders / "model").fingerprint().hex()
    assert report["provenance"]["packages"]["torch"] == torch.__version__
    sheet = load_image(tmp_path / "sheet.png")
    assert sheet.width > 2 * 80 and sheet.height > 64
    text = (tmp_path / "results.md").read_text()
    assert f"| 1.png | 80x64 | {budgets['1.png']} |" in text


@needs_shared("weights", "alexnet_features.safetensors")
def test_lpips_is_measured_with_weights_by_path(run, tmp_path):
    assert run(tmp_path, "--lpips_weights", str(SHARED / "weights"), "--compare", "--limit", "1") == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert [row["codec"] for row in report["rows"]] == ["ours"]
    assert 0 < report["means"]["ours"]["lpips_alex"] < 2
    assert report["settings"]["peers"]["best_by"] == "lpips"


def test_a_bad_picture_does_not_stop_the_others(evaluate_codec, folders, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"no picture")
    (images / "b.png").write_bytes((folders / "images" / "0.png").read_bytes())
    code = evaluate_codec.main(["--model", str(folders / "model"), "--images", str(images), "--output",
                                str(tmp_path / "out"), "--quiet", "--compare"])
    assert code == 1
    assert "a.png" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["image"] for row in report["rows"]] == ["b.png"]
    assert report["settings"]["num_images"] == 1
    assert str(tmp_path) not in json.dumps(report)  # nobody's folders go into a result


@pytest.mark.parametrize(("more", "message"), [
    (("--sheet", "9.png"), "9.png"),
    (("--lpips_weights", "nowhere"), "LPIPS needs"),
    (("--images", "nowhere"), "takes a folder"),
    (("--model", "nowhere"), "nowhere"),
])
def test_mistakes_are_told_in_one_sentence(run, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "out", *more) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
