"""scripts/bench_architectures.py: its counts by hand, and its tables."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

from vtc.tokenizers.local_vq import LocalVQ


@pytest.fixture
def script():
    return import_module("scripts.bench_architectures")


def test_the_operations_of_the_bundled_architecture_are_those_counted_by_hand(script):
    facts = script.counted(script.CANDIDATES["base"])
    widths, depths, thin, places = (40, 80, 160, 320), (2, 2, 2, 4), 16, 512 * 768
    work = 32 * 320 * places // 256  # the entry
    for n, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        here = places // 4 ** (n + 1)
        work += depth * (9 + 1) * width**2 * here  # blocks
        work += width * 4 * ((thin, *widths)[n]) * here  # the way up
    work += 9 * thin * 3 * places  # the exit
    assert facts["decode"] == 2 * work
    model = LocalVQ()
    assert facts["encoder"] == sum(p.numel() for p in model.encoder.parameters())
    assert facts["decoder"] == sum(p.numel() for p in model.decoder.parameters())


def test_the_file_has_the_size_that_is_counted(script, tmp_path):
    """But for its header, some ten kilobytes of names."""
    LocalVQ().save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 0 < size - script.counted(script.CANDIDATES["base"])["float16"] < 20_000


def test_a_core_adds_its_own_work(script):
    base, core = (script.counted(script.CANDIDATES[name]) for name in ("base", "core32"))
    here, width = 512 * 768 // 1024, 448
    work = 4 * 320 * width * here + 3 * 10 * width**2 * here + width * 4 * 320 * here
    assert core["decode"] - base["decode"] == 2 * work and core["encode"] == base["encode"]


def test_the_tables_name_every_candidate_and_vocabulary(script, capsys):
    assert script.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"| {name} |" in text for name in script.CANDIDATES)
    assert re.search(r"\| 4,096 \| 12\.00 \| 0\.0469 \|", text)
