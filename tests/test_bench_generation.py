"""The plain form that ours is timed against draws the same pictures; tables of policies add up. No times are tested."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_generators import tiny_var
from vtc.errors import FileError
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.kv_cache.specs import parse_policy
from vtc.generators.sampling import Guidance, Sampling
from vtc.generators.var import VAR
from vtc.tokenizers.layers import MultiScaleTokenizer

bench = import_module("scripts.bench_generation")
LABELS = torch.tensor([1, 3])


@pytest.mark.parametrize("sampling", [Sampling(top_k=1), Sampling(top_k=6, top_p=0.8), Sampling(top_p=0.9)])
def test_the_plain_form_draws_the_same_pictures_and_stores_all(sampling: Sampling) -> None:
    made = tiny_var()
    model, guidance = made.model, Guidance(2.0, ramp=True)
    assert isinstance(model, VAR) and isinstance(made.tokenizer, MultiScaleTokenizer)
    words, images, nbytes = bench.PlainVAR(model).generate(LABELS, made.tokenizer, sampling, guidance,
                                                           torch.Generator().manual_seed(1))
    cache = KVCache(model.schedule())
    tokens, ours = model.generate(LABELS, made.tokenizer, sampling, guidance, cache, torch.Generator().manual_seed(1))
    assert torch.equal(words, tokens.indices[..., 0])
    torch.testing.assert_close(images, ours, rtol=1e-5, atol=1e-5)
    assert nbytes == model.schedule().kv_bytes(66, 4, 4)
    assert cache.nbytes() == model.schedule().kv_bytes(30, 4, 4)


def test_bytes_of_the_published_shapes_are_the_papers() -> None:
    two, eight = bench.shape("Infinity-2B 1024"), bench.shape("Infinity-8B 1024")
    assert two.kv_bytes(two.stored_tokens, 2, 3) / 2**20 == pytest.approx(4819, abs=0.5)
    assert eight.kv_bytes(eight.stored_tokens, 2, 3) / 2**20 == pytest.approx(10541, abs=0.5)
    small = bench.shape("VAR-d16 256")
    assert [small.kv_bytes(t, 2, b) / 2**20 for t, b in ((680, 4), (424, 4), (424, 2))] == [170, 106, 53]
    text, missed = bench.bytes_part(SimpleNamespace())
    assert not missed
    assert "| Infinity-8B 1024 | 10521 / 6425 | 17,261 | 10,541 | 7,027 | 2.46 |" in text


def test_a_policy_that_is_timed_chooses_the_same() -> None:
    made = tiny_var()
    assert isinstance(made.model, VAR)
    schedule, model = made.model.schedule(), made.model
    calibration = bench.random_calibration(model)
    for word in ("h2o:0.5", "hack:0.5", "full"):
        policy, storage = parse_policy(word).build(schedule, calibration)
        cache, choices, everything = bench.timed_cache(schedule, policy, storage)
        run = bench.ours(model, made.tokenizer, LABELS, Sampling(top_k=1), cache)
        other = bench.ours(model, made.tokenizer, LABELS, Sampling(top_k=1), KVCache(schedule, policy, storage))
        assert torch.equal(run.indices, other.indices)
        assert run.nbytes == other.nbytes
        assert ("select" in choices.seconds) == (word != "full")
        assert everything.seconds["attend"] >= choices.seconds.get("select", 0)


def test_a_missed_bar_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                   tmp_path: Path) -> None:
    assert bench.verdict("x", 1.06, 1.05) == []
    assert bench.verdict("x", 1.04, 1.05) == ["x: 1.04 times as fast, not 1.05"]
    assert bench.main(["--parts", "bytes", "--output", str(tmp_path / "out.md")]) == 0
    assert "Infinity-8B" in (tmp_path / "out.md").read_text()
    monkeypatch.setattr(bench, "bytes_part", lambda args: ("", ["slow"]))
    assert bench.main(["--parts", "bytes"]) == 1
    assert "NOT MET slow" in capsys.readouterr().err


# ---- evaluate_kv


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    return import_module("scripts.evaluate_kv")


class Judge:
    """Stands for the judge: features are means of pixels, every picture is of its class, LPIPS a difference."""

    held_out_accuracy = 1.0

    def look(self, images: torch.Tensor) -> Any:
        return SimpleNamespace(pooled=images.float().mean((2, 3)), parts=images)

    def probabilities(self, facts: Any) -> torch.Tensor:
        return torch.eye(5)[torch.arange(len(facts.pooled)) % 5]

    def lpips(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean((1, 2, 3))

    def frechet(self, pooled: torch.Tensor) -> dict[str, float]:
        return {"fd_alexnet_to_train": 1.0, "fd_alexnet_to_held_out": 2.0}


def test_settings_are_drawn_batch_by_batch_and_reported(evaluate: Any, monkeypatch: pytest.MonkeyPatch,
                                                       tmp_path: Path) -> None:
    made = tiny_var()
    monkeypatch.setattr(evaluate, "load_generator", lambda name: made)
    monkeypatch.setattr(evaluate, "RememberingJudge", lambda *args: Judge())
    work = tmp_path / "work"
    common = ["--model", "x", "--images", "x", "--work_dir", str(work), "--output", str(tmp_path / "out"),
              "--samples", "6", "--batch_size", "2", "--calibration_samples", "4", "--device", "cpu"]
    settings = ["--settings", "full", "hack:0.5", "streaming:0.5,sinks=0", "streaming:0.5"]
    with pytest.raises(FileError, match="begin --settings with full"):
        evaluate.main(["draw", *common, "--settings", "h2o:0.5"])
    for share in ("0/2", "1/2"):
        evaluate.main(["draw", *common, *settings, "--share", share])
    lines = evaluate.lines_of(work, "hack:0.5")
    assert [line["batch"] for line in lines] == [0, 1, 2]
    assert isinstance(made.model, VAR)
    schedule = made.model.schedule()
    assert evaluate.lines_of(work, "full")[0]["bytes"] == schedule.kv_bytes(30, 2, 4)
    assert lines[0]["bytes"] <= schedule.kv_bytes(15, 2, 4)
    assert len(lines[0]["seconds"]) == schedule.steps + 1
    assert evaluate.lines_of(work, "full")[0]["forced_divergence"] == pytest.approx(0, abs=1e-6)
    before = (work / "full.jsonl").read_text()
    evaluate.main(["draw", *common, *settings])  # nothing is left to do
    assert (work / "full.jsonl").read_text() == before
    with (work / "full.jsonl").open("a") as file:
        file.write('{"batch": 7, "cou')  # a process that was killed
    evaluate.main(["report", *common, *settings])
    result = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert result["rows"]["full"]["count"] == 6
    assert 0 < result["rows"]["streaming:0.5"]["same"] < 1
    full = np.concatenate([np.load(evaluate.at(work, "full", b))["indices"] for b in range(3)])
    other = np.concatenate([np.load(evaluate.at(work, "streaming:0.5", b))["indices"] for b in range(3)])
    assert result["rows"]["streaming:0.5"]["same"] == pytest.approx((full == other).mean())
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "| window:0.5 | 6 |" in text
    ours, theirs = (np.concatenate([np.load(evaluate.at(work, setting, b))["lpips"] for b in range(3)])
                    for setting in ("hack:0.5", "streaming:0.5"))
    gain = (theirs - ours).mean() / ((theirs - ours).std() / 6**0.5)
    claim = next(line for line in text.splitlines() if line.startswith("| hack:0.5 | streaming:0.5 | 6 |"))
    assert f"{ours.mean():.4f}, {theirs.mean():.4f} ({gain:+.1f} s.e.)" in claim
    assert (tmp_path / "out" / "plot.svg").is_file()
    assert (tmp_path / "out" / "sheet.jpg").is_file()


def test_nothing_is_lost_without_the_last_scale_or_at_a_budget_of_everything(evaluate: Any, tmp_path: Path,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_var()
    monkeypatch.setattr(evaluate, "load_generator", lambda name: made)
    evaluate.main(["checks", "--model", "x", "--work_dir", str(tmp_path), "--samples", "4", "--device", "cpu",
                   "--calibration_samples", "4"])
    found = json.loads((tmp_path / "checks.json").read_text())
    assert found["stores_all_same"] == 1
    assert found["plain_same"] == 1
    assert found["stores_all_bytes"] / found["stored_bytes"] == pytest.approx(66 / 30)
    assert set(found["budget_of_everything_same"]) == {"streaming", "h2o", "snapkv", "pyramidkv", "adakv", "hack",
                                                       "scalekv", "heatkv"}
    # HeatKV's heads attend one by one, so that rounding may change a draw.
    assert found["budget_of_everything_same"].pop("heatkv") > 0.95
    assert min(found["budget_of_everything_same"].values()) == 1
