"""Verdicts of the benchmark scripts: a missed bar, or a row that failed, is a failure. What they measure is no test."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vtc.codecs.entropy import StaticTables
from vtc.torchvision_guard import ensure_torchvision_imports

bench_quantizers = import_module("scripts.bench_quantizers")
bench_clustering = import_module("scripts.bench_clustering")


def row(case: str, implementation: str, milliseconds: float, megabytes: float) -> dict[str, Any]:
    return {"case": case, "implementation": implementation, "milliseconds": milliseconds, "megabytes": megabytes}


def verdicts(*rows: dict[str, Any], agreements: tuple[dict[str, Any], ...] = ()) -> list[bool]:
    return [met for _, met in bench_quantizers.bars({(r["case"], r["implementation"]): r for r in rows},
                                                    list(agreements))]


def test_bars_of_the_quantizers():
    mine = row("lfq-32", "vtc", 1.0, 1.0)
    assert verdicts(mine, row("lfq-32", "plain", 6.0, 4.0)) == [True, True]
    assert verdicts(mine, row("lfq-32", "plain", 4.9, 4.0)) == [False, True]
    assert verdicts(row("lfq-64", "vtc", 1.0, 1.0), row("lfq-64", "lucidrains", 11.0, 9.0)) == [False]
    assert verdicts(row("lfq-16-flat", "vtc", 51.0, 99.0)) == [False, True]
    agreement = {"case": "lfq-32", "agreement": {"vtc - plain": [1e-7, 2e-5]}}
    assert verdicts(agreements=(agreement,)) == [True, False]


def test_a_row_that_failed_is_a_failure():
    failed = {"case": "lfq-32", "implementation": "plain", "error": "out of memory"}
    assert verdicts(row("lfq-32", "vtc", 1.0, 1.0), failed) == [False]
    assert verdicts(row("fsq", "vtc", 1.0, 1.0), agreements=(failed,)) == [False]


def test_the_script_fails_where_a_row_fails(monkeypatch, capsys, tmp_path):
    def crashing(args: Any, case: str, what: str) -> dict[str, Any]:
        if what == "lucidrains":
            return {"case": case, "implementation": what, "error": "no such module"}
        return row(case, what, 1.0, 1.0)

    monkeypatch.setattr(bench_quantizers, "in_own_process", crashing)
    monkeypatch.setattr(bench_quantizers.importlib.util, "find_spec", lambda name: True)
    for only, code in (("bsq", 0), ("fsq", 1)):
        monkeypatch.setattr(sys, "argv", ["bench_quantizers.py", "--only", only, "--json", str(tmp_path / "q.json")])
        assert bench_quantizers.main() == code
        assert json.loads((tmp_path / "q.json").read_text())["rows"]
    assert "NOT MET fsq, lucidrains" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bench_quantizers.py", "--only", "nothing"])
    with pytest.raises(SystemExit) as stopped:
        bench_quantizers.main()
    assert stopped.value.code == 2


def test_bars_of_clustering():
    assert bench_clustering.missed_bars("row", 3.0, 1.0049) == []
    assert len(bench_clustering.missed_bars("row", 2.9, 1.0)) == 1
    assert len(bench_clustering.missed_bars("row", 2.9, 0.99)) == 2


def test_the_coders_of_the_codec_benchmark_give_back_what_they_got():
    ensure_torchvision_imports()
    pytest.importorskip("compressai")
    bench_codec = import_module("scripts.bench_codec")
    rng = np.random.default_rng(0)
    frequencies = np.ones((1, 300), dtype=np.int64)
    frequencies[0, 7] = 2**12 - 299
    p = frequencies[0] / 2**12
    prior = SimpleNamespace(encode=lambda s, g, w: s.astype("<u2").tobytes(),
                            decode=lambda d, g, w: np.frombuffer(d, "<u2").astype(np.int64))
    symbols = rng.choice(300, 2000, p=p)
    measured = {coder.name: bench_codec.one_coder(coder, [(symbols, (40, 50))], 1) for coder in bench_codec.coders(
        SimpleNamespace(tables=StaticTables(frequencies), prior=prior), 300)}
    ideal = -np.log2(p[symbols]).mean()
    for name in ("vtc, static tables (ANS)", "CompressAI, static tables (rANS)"):
        assert measured[name]["bits"] == pytest.approx(ideal, rel=0.05)  # 244 bytes, and a coder's state
    assert measured["vtc, packed"]["bits"] == pytest.approx(np.log2(300), rel=0.01)
    assert measured["vtc, learned prior"]["bits"] == 16  # the one that stands in for it
    lines = bench_codec.coder_table(list(measured.values())).splitlines()
    assert len(lines) == 2 + 8 and lines[2].startswith("| vtc, static tables (ANS) | ")
    with pytest.raises(RuntimeError, match="did not give the symbols back"):
        bench_codec.one_coder(bench_codec.Coder("bad", lambda s, g: b"", lambda d, g: symbols + 1),
                              [(symbols, (40, 50))], 1)


def test_bars_of_the_frechet_distance():
    bench = import_module("scripts.bench_frechet")
    assert bench.missed(10.1, 1e-5, 57.0) == []
    assert len(bench.missed(9.9, 1e-5, 57.0)) == 1
    assert len(bench.missed(9.9, float("nan"), 57.0)) == 2


def test_bars_of_the_glcm_score():
    bench = import_module("scripts.bench_glcm")
    photograph = {"picture": "photograph astronaut, tiled", "wall_ratio": 4.5, "difference": 1e-12}
    assert len(bench.missed([photograph, {**photograph, "picture": "noise"}])) == 1
    assert bench.missed([{**photograph, "wall_ratio": 5.0}]) == []
    assert len(bench.missed([{**photograph, "difference": 2e-9, "wall_ratio": 9.0}])) == 1
