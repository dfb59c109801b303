"""Judging generated pictures: neighbours, the classifier, the scripts from a folder to a table."""

from __future__ import annotations

import io
import json
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

from tests.shared import ROOT, SHARED, needs_shared
from vtc.generators.llamagen import LlamaGen
from vtc.generators.pretrained import GenerationConfig, LoadedGenerator
from vtc.generators.sampling import Guidance, Sampling
from vtc.generators.var import VAR
from vtc.tokenizers.lpips import LPIPS
from vtc.tokenizers.pyramid_vq import PyramidVQ
from vtc.training.sources import pack_pictures

WEIGHTS = SHARED / "weights"


@pytest.fixture
def script(monkeypatch):
    """Import of a script that imports its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield import_module
    for name in ("generator_quality", "evaluate_generator", "bench_speculative"):
        sys.modules.pop(name, None)


@pytest.fixture
def pack(tmp_path):
    """Reddish pictures of class 0 and bluish ones of class 1, with coarse noise: 12 to train, 8 held out."""
    rng, splits = np.random.default_rng(0), {}
    for split, count in (("train", 12), ("val", 8)):
        items = []
        for n in range(count):
            pixels = rng.integers(0, 120, (4, 4, 3), dtype=np.uint8)
            pixels[..., 0 if n % 2 == 0 else 2] += 135
            stream = io.BytesIO()
            Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(stream, "PNG")
            items.append((stream.getvalue(), n % 2))
        splits[split] = items
    pack_pictures(tmp_path / "pack.npz", splits, ("red", "blue"))
    return tmp_path / "pack.npz"


def tokenizer(sides) -> PyramidVQ:
    torch.manual_seed(0)
    model = PyramidVQ(16, 4, (8, 8), (1, 1), (8, 8, 8), (1, 1, 1), 4, sides).eval()
    with torch.no_grad():
        model.quantizer.codebook.normal_()
    return model


@needs_shared("weights")
def test_neighbours_classes_and_clouds(script, pack):
    judge = script("generator_quality").GeneratorJudge(pack, WEIGHTS, 64)
    assert judge.held_out_accuracy == 1.0  # colours are easy
    assert judge.accuracy(judge.train_facts, 1 - judge.train_labels) == 0.0
    found = judge.frechet(judge.train_facts.pooled)
    assert found["fd_alexnet_to_train"] == pytest.approx(0, abs=1e-6) and found["fd_alexnet_to_held_out"] > 1e-3
    distances, numbers = judge.nearest(judge.train.flip(-1)[:5], candidates=3)  # mirrored, they find themselves
    assert numbers.tolist() == [0, 1, 2, 3, 4] and distances.abs().max() < 1e-6
    far, which = judge.nearest(judge.held_out[:3], candidates=12)
    lpips = LPIPS("alex", WEIGHTS)
    for i in range(3):  # every training picture and its mirror image, one by one
        picture = judge.held_out[i : i + 1].float() / 255
        all_of_them = torch.stack([torch.stack([lpips(x, t[None].float() / 255)[0] for t in judge.train])
                                   for x in (picture, picture.flip(-1))])
        assert far[i].item() == pytest.approx(all_of_them.min().item(), abs=1e-6)
        assert which[i] == all_of_them.min(0).values.argmin()


@needs_shared("weights")
def test_a_table_and_sheets_come_out(script, pack, tmp_path):
    evaluate_generator = script("evaluate_generator")
    torch.manual_seed(0)
    model = VAR(1, 16, 2, classes=2, codebook_size=16, code_dim=4, sides=(1, 2, 8)).eval()
    LoadedGenerator(model, tokenizer((1, 2, 8)), GenerationConfig(sampling=Sampling(), guidance=Guidance(1.5))
                    ).save(tmp_path / "model")
    evaluate_generator.main(["--model", str(tmp_path / "model"), "--images", str(pack), "--weights", str(WEIGHTS),
                             "--samples", "6", "--batch_size", "4", "--neighbours", "4", "--output",
                             str(tmp_path / "out"), "--private_dir", str(tmp_path / "private")])
    result = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert result["rows"]["samples"]["count"] == 6 and result["nearest"]["samples"]["count"] == 4
    assert result["facts"]["guidance"]["weight"] == 1.5
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "| held-out pictures | 8 |" in text and "nearest 1 %" in text
    assert Image.open(tmp_path / "out" / "samples.jpg").size == (3 * 64, 2 * 64)
    kept = np.load(tmp_path / "private" / "samples.npz")
    assert kept["images"].shape == (6, 3, 64, 64) and kept["labels"].tolist() == [0, 1, 0, 1, 0, 1]


def test_the_speculative_benchmark_of_a_model_that_is_its_own_draft_keeps_everything(script, tmp_path):
    bench = script("bench_speculative")
    torch.manual_seed(0)
    model = LlamaGen(1, 16, 2, 16, classes=2, codebook_size=16, side=4).eval()
    LoadedGenerator(model, tokenizer((4,)), GenerationConfig(sampling=Sampling(), guidance=Guidance(1.5)),
                    draft=model).save(tmp_path / "model")
    bench.main(["--model", str(tmp_path / "model"), "--images", "2", "--ahead", "3", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "speculative.json").read_text())
    (row,) = result["rows"]
    assert row["kept"] == 1 and row["tokens_a_pass"] == 4  # three proposals and the one after them: 16 tokens in 4
    assert result["overlap"] == pytest.approx(1, abs=1e-5)
    assert "| 3 | 1.000 |" in (tmp_path / "speculative.md").read_text()
