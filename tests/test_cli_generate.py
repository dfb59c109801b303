"""vtc-generate and scripts/calibrate_kv.py: what they draw, say and measure, how they fail. Tiny random models."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.shared import ROOT, needs_shared
from tests.tiny_generators import TINY_GENERATORS, tiny_var
from vtc import hub
from vtc.cli import generate, import_checkpoint
from vtc.codecs.token_codec import TokenCodec
from vtc.generators.kv_cache.calibration import Calibration
from vtc.generators.kv_cache.specs import POLICIES
from vtc.images import load_image, to_uint8
from vtc.models import load_generator

Say = Callable[..., SimpleNamespace]
calibrate_kv = import_module("scripts.calibrate_kv")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of generators: var, infinity, llamagen, and other, another var. The first is the bundled one."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in TINY_GENERATORS.items():
        make().save(folder / name)
    tiny_var(1).save(folder / "other")
    tiny_var().save(folder / "bundled" / "var-d6-128")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "BUNDLED", folder / "bundled")
        yield folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(models: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Say:
    """Run the command in this process: run("var", "-n", "2", ...) -> code, out (bytes), err (text)."""

    def call(model: str, *argv: str | Path) -> SimpleNamespace:
        try:
            code = generate.main(["--model", str(models / model), *(str(a) for a in argv)])
        except SystemExit as stop:  # argparse
            assert stop.code in (0, 2)
            code = stop.code
        out, err = capfdbinary.readouterr()
        assert b"Traceback" not in err and b"Warning" not in err
        return SimpleNamespace(code=code, out=out, err=err.decode(), lines=err.decode().splitlines())

    return call


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def pixels(path: str | Path) -> np.ndarray:
    return np.array(Image.open(path))


def test_classes_seeds_sheet_and_report(here: Path, run: Say) -> None:
    said = run("var", "--class", "golf ball", "3", "-n", "3", "-o", "out", "--sheet", "out/sheet.png", "--json",
               "--seed", "7", "--batch_size", "2", "--kv", "h2o:0.5")
    assert said.code == 0
    facts = json.loads(said.out)
    assert [(p["output"], p["class"], p["class_name"], p["seed"]) for p in facts["pictures"]] == [
        ("out/000_golf_ball.png", 2, "golf ball", 7), ("out/001_church.png", 3, "church", 8),
        ("out/002_golf_ball.png", 2, "golf ball", 9)]
    assert tree(here / "out") == ["000_golf_ball.png", "001_church.png", "002_golf_ball.png", "sheet.png"]
    assert facts["kv"] == "h2o:0.5" and len(facts["scale_seconds"]) == 5
    assert 0 < sum(facts["scale_seconds"]) <= facts["seconds"]
    # 15 of 30 stored tokens, 3 layers, 4 heads of 8 numbers, keys and values, two halves of guidance, two pictures
    assert facts["cache_bytes"] == 15 * 3 * 4 * 8 * 2 * 4 * 2 * 2
    assert facts["cache_peak_bytes"] > facts["cache_bytes"] and facts["process_peak_bytes"] > 2**20
    assert facts["gpu_peak_bytes"] is None
    sheet = pixels("out/sheet.png")
    assert sheet.shape == (12 + 2 + 12, 12 + 2 + 12, 3)
    assert np.array_equal(sheet[:12, 14:], pixels("out/001_church.png"))
    assert (sheet[14:, 14:] == 255).all()
    # One at a time, from another seed on: the same pictures.
    assert run("var", "--class", "3", "-o", "one.png", "--seed", "8", "--kv", "h2o:0.5", "--quiet").err == ""
    assert np.array_equal(pixels("one.png"), pixels("out/001_church.png"))


def test_the_default_is_the_bundled_model_and_a_picture_of_each_class(here: Path,
                                                                      capfd: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["-o", "out", "--quiet"]) == 0
    assert tree(here / "out") == [f"00{i}_{name}.png" for i, name in enumerate(
        ("tench", "parachute", "golf_ball", "church", "Gas_Pump"))]
    assert capfd.readouterr().err == ""


def test_pictures_are_those_of_the_model(here: Path, models: Path, run: Say) -> None:
    from vtc.generators.kv_cache.cache import KVCache
    from vtc.generators.sampling import Guidance, Sampling, seeded

    how = ("--class", "1", "-n", "2", "--cfg", "2.5", "--cfg_schedule", "constant", "--top_k", "5", "--top_p", "0.9",
           "--temperature", "0.8")
    said = run("var", *how, "-o", "out", "--format", "webp")
    assert said.code == 0 and said.lines[-1].startswith("vtc-generate: 2 pictures -> out, ")
    generator = load_generator(models / "var")
    _, images = generator.generate(torch.tensor([1, 1]), KVCache(generator.schedule()), Sampling(0.8, 5, 0.9),
                                   Guidance(2.5), seeded([0, 1]))
    assert tree(here / "out") == ["000_parachute.webp", "001_parachute.webp"]
    run("var", *how, "-o", "png")
    assert np.abs(pixels("png/001_parachute.png").astype(int) - to_uint8(images[1])).max() <= 1


def test_previews_of_scales_and_rows(here: Path, run: Say) -> None:
    assert run("var", "-n", "1", "-o", "a.png", "--previews").code == 0
    assert tree(here) == ["a.png", *(f"a.stage{i}.png" for i in range(1, 5))]
    assert not np.array_equal(pixels("a.stage1.png"), pixels("a.png"))
    said = run("llamagen", "-n", "1", "-o", "b", "--previews", "--json")
    assert tree(here / "b") == ["000_class0.png", *(f"000_class0.stage{i}.png" for i in range(1, 4))]
    assert len(json.loads(said.out)["row_seconds"]) == 4
    rows = pixels("b/000_class0.stage3.png").astype(int)
    assert (rows[48:] == 128).all() and rows.shape == (64, 64, 3)
    # The decoder looks less far than two rows of tokens, so the first stays as it is when the fourth is drawn.
    assert np.abs(rows[:16] - pixels("b/000_class0.png")[:16]).max() <= 1


def test_stdout(here: Path, run: Say) -> None:
    said = run("var", "--class", "0", "-o", "-", "--json", "--quiet")
    assert np.array(Image.open(io.BytesIO(said.out))).shape == (12, 12, 3)
    assert json.loads(said.err)["pictures"][0]["output"] == "-"


@pytest.mark.parametrize("spec", ["sliding:2", "streaming:0.4+int4", "heatkv:0.6+mixed", "adakv:0.7,window=4"])
def test_policies(spec: str, here: Path, run: Say) -> None:
    said = run("var", "--class", "0", "-o", "a.png", "--kv", spec, "--json", "--quiet")
    assert (said.code, json.loads(said.out)["kv"]) == (0, spec)


def test_storage_and_bfloat16(here: Path, run: Say) -> None:
    size = {name: json.loads(run("var", "--class", "0", "-o", "a.png", "--json", "--quiet", *more).out)["cache_bytes"]
            for name, more in {"plain": (), "int8": ("--kv_storage", "int8"), "bf16": ("--dtype", "bfloat16")}.items()}
    assert size["bf16"] * 2 == size["plain"]
    assert size["int8"] * 32 == size["plain"] * (8 + 2)


# ---- calibration


def test_a_calibration_is_made_kept_found_and_refused(here: Path, models: Path, run: Say) -> None:
    arguments = ("--class", "0", "-n", "2", "--kv", "hack:0.6", "-o")
    made_now = run("var", *arguments, "a")
    assert made_now.code == 0 and "needs a calibration: 8 pictures are drawn" in made_now.err
    assert calibrate_kv.main(["--model", str(models / "var"), "--samples", "8", "--output", "kv.safetensors",
                              "--quiet"]) == 0
    kept = run("var", *arguments, "b", "--calibration", "kv.safetensors")
    assert kept.code == 0 and "needs a calibration" not in kept.err
    assert all(np.array_equal(pixels(f"a/{n}"), pixels(f"b/{n}")) for n in tree(here / "a"))
    wrong = run("other", *arguments, "c", "--calibration", "kv.safetensors")
    assert wrong.code == 1 and "was measured on another model" in wrong.err and not (here / "c").exists()
    missing = run("var", *arguments, "c", "--calibration", "none")
    assert (missing.code, missing.err) == (1, "vtc-generate: There is no file none.\n")
    (models / "other" / "kv.safetensors").write_bytes(b"no")
    assert "cannot be read as a calibration" in run("other", *arguments, "c").err
    (models / "other" / "kv.safetensors").unlink()


def test_a_long_calibration_is_not_made_unasked(here: Path, run: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtc.generators import calibrate

    monkeypatch.setitem(calibrate.AFFORDABLE, "cpu", 1.0)
    said = run("var", "-n", "1", "--kv", "heatkv:0.6", "-o", "a.png")
    assert said.code == 1 and "would take long here: make one by scripts/calibrate_kv.py" in said.err


def test_calibrating_on_real_pictures(here: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, name in enumerate(("golf ball", "church", "golf ball")):
        (here / "data" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 30, 3), 80 * i, np.uint8)).save(here / "data" / name / f"{i}.png")
    assert calibrate_kv.main(["--model", str(models / "var"), "--samples", "3", "--batch_size", "2", "--images", "data",
                              "--output", "kv.safetensors", "--quiet"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["layers"], facts["heads"], facts["scales"]) == (3, 3, 4, 5)
    generator = load_generator(models / "var")
    found = Calibration.load("kv.safetensors", generator.model)
    # A picture of a class, its tokens read: the mean over the three, whatever the batches.
    parts = []
    for path, label in (("data/church/1.png", 3), ("data/golf ball/0.png", 2), ("data/golf ball/2.png", 2)):
        image = torch.from_numpy(pixels(path)[4:16, 9:21].copy()).permute(2, 0, 1)[None].float() / 255
        words = generator.encode(image).indices
        from vtc.generators.calibrate import calibrate

        parts.append(calibrate(generator, [torch.tensor([label])], given=[words]).attention)
    torch.testing.assert_close(found.attention, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-5)


def test_calibration_failures_are_sentences(here: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, why in ((["--model", str(models / "llamagen")], "a raster model has none"),
                           (["--model", str(models / "var"), "--samples", "0"], "at least 1"),
                           (["--model", str(here / "none")], "No model"),
                           (["--model", str(models / "var"), "--classes", "9"], "There is no class 9"),
                           (["--model", str(models / "infinity")], "say what by --prompt")):
        assert calibrate_kv.main([*arguments, "--output", "kv.safetensors", "--quiet"]) == 1
        assert why in capsys.readouterr().err
    assert tree(here) == []


def test_an_estimate_draws_nothing_and_says_what_it_leaves_out(here: Path, run: Say,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.torch.load_file", pytest.fail)  # no weights are read
    said = run("var", "-n", "9", "--batch_size", "4", "--kv", "hack:0.6+int8", "--estimate", "--json")
    facts = json.loads(said.out)
    assert (said.code, facts["batch_size"], facts["kv"]) == (0, 4, "hack:0.6+int8")
    assert facts["total_bytes"] == facts["weights_bytes"] + facts["cache_peak_bytes"] + facts["activations_bytes"]
    assert said.lines == ["hack needs a calibration; made on the way, that takes more memory than this."]
    plain = run("var", "--class", "1", "--estimate")
    assert plain.err == "" and re.fullmatch(rb".*, 1 at a time, full: weights [0-9.]+ MiB, cache .* MiB\n", plain.out)
    assert tree(here) == []


# ---- given tokens


def inpainting(here: Path) -> None:
    """A picture, in.png; and mask.png, white on its lower half."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save("in.png")
    mask = np.zeros((12, 12), np.uint8)
    mask[6:] = 255
    Image.fromarray(mask).save("mask.png")


def drawn_tokens(models: Path, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Where each batch's tokens are put when the command draws them."""
    from vtc.generators.pretrained import LoadedGenerator

    heard: list[torch.Tensor] = []
    whole = LoadedGenerator.generate

    def listening(self: LoadedGenerator, *args: Any, **more: Any) -> Any:
        tokens, images = whole(self, *args, **more)
        heard.append(tokens.indices)
        return tokens, images

    monkeypatch.setattr(LoadedGenerator, "generate", listening)
    return heard


def test_inpainting_keeps_what_is_black_in_the_mask(here: Path, models: Path, run: Say,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    inpainting(here)
    heard = drawn_tokens(models, monkeypatch)
    assert run("var", "--class", "0", "-n", "2", "-o", "a", "--image", "in.png", "--mask", "mask.png").code == 0
    generator = load_generator(models / "var")
    words = generator.encode(load_image("in.png").tensor()[None]).indices
    upper = torch.cat([(torch.arange(s * s) // s + 0.5 < s / 2) for s in (1, 2, 3, 4, 6)])
    assert torch.equal(heard[0][:, upper], words[:, upper].expand(2, -1, -1))
    assert (heard[0][:, ~upper] != words[:, ~upper]).any()
    assert run("var", "--class", "0", "-o", "b.png", "--image", "in.png", "--keep", "3").code == 0
    assert torch.equal(heard[1][:, :14], words[:, :14]) and not torch.equal(heard[1], words)
    Image.open("in.png").resize((30, 24)).save("large.png")
    said = run("var", "--class", "0", "-o", "c.png", "--image", "large.png", "--mask", "mask.png")
    assert "large.png: resized from 30x24 to 12x12, its middle" in said.err


def test_a_stream_gives_its_tokens_and_what_it_lost_is_drawn(here: Path, models: Path, run: Say,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    heard = drawn_tokens(models, monkeypatch)
    for kind, label in (("var", "0"), ("llamagen", "1")):
        generator = load_generator(models / kind)
        _, height, width = generator.layout()
        image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        words = generator.encode(image).indices
        codec = TokenCodec(generator.tokenizer)
        Path("a.vtc").write_bytes(codec.compress(image)[0])
        assert "All tokens of a.vtc are given" in run(kind, "--class", label, "-o", "a.png", "--given", "a.vtc").err
        assert run(kind, "--class", label, "-o", "a.png", "--given", "a.vtc", "--keep", "2").code == 0
        kept = 5 if kind == "var" else 8
        assert torch.equal(heard[-1][:, :kept], words[:, :kept]) and not torch.equal(heard[-1], words)
    stream = bytearray(codec.compress(image, resilience=4)[0])
    stream[len(stream) // 2] ^= 0xFF
    received = codec.receive(bytes(stream))
    assert 0 < received.share_lost < 1
    Path("b.vtc").write_bytes(stream)
    assert run("llamagen", "--class", "1", "-o", "a.png", "--given", "b.vtc").code == 0
    assert torch.equal(heard[-1][~received.lost], words[~received.lost])
    said = run("var", "-n", "1", "-o", "a.png", "--given", "b.vtc")
    assert "b.vtc: The stream was made with other weights" in said.err


# ---- texts


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 encoder of sixteen dimensions that knows three words."""
    from vtc.torchvision_guard import ensure_torchvision_imports

    ensure_torchvision_imports()
    transformers = pytest.importorskip("transformers")
    words = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=8, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    tokenizer = words.Tokenizer(words.models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "red": 3, "fox": 4}, "<unk>"))
    tokenizer.pre_tokenizer = words.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


def test_prompts_are_read_by_t5(encoder: Path, here: Path, run: Say) -> None:
    said = run("infinity", "--prompt", "a red fox", "fox", "--text_encoder", encoder, "-o", "out", "--json")
    assert said.code == 0, said.err
    assert [p["prompt"] for p in json.loads(said.out)["pictures"]] == ["a red fox", "fox"]
    # The second alone is as it was beside a longer one: padding is not read.
    assert run("infinity", "--prompt", "fox", "--text_encoder", encoder, "-o", "one.png", "--seed", "1").code == 0
    assert np.abs(pixels("one.png").astype(int) - pixels("out/001.png")).max() <= 1
    said = run("infinity", "--prompt", "fox", "--text_encoder", here / "none", "-o", "out")
    assert said.code == 1 and "cannot be loaded" in said.err
    assert "at least one word" in run("infinity", "--prompt", " ", "--text_encoder", encoder, "-o", "out").err


def test_prompts_without_transformers(here: Path, run: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return found(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    said = run("infinity", "--prompt", "fox", "-o", "out")
    assert said.code == 1 and "pip install 'vtc[text]'" in said.err


def test_features_from_a_file(here: Path, run: Say) -> None:
    torch.manual_seed(0)
    save_file({"features": torch.randn(2, 3, 16), "mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}, "text.safetensors")
    assert run("infinity", "--features", "text.safetensors", "-n", "3", "-o", "out", "--aspect", "2.0").code == 0
    assert pixels("out/002.png").shape == (44, 22, 3)
    for tensors, why in (({"features": torch.randn(3, 5)}, "has features of shape"),
                         ({"x": torch.ones(1)}, "takes `features`"),
                         ({"features": torch.randn(1, 3, 16), "mask": torch.zeros(1, 3)}, "at least one token")):
        save_file(tensors, "bad.safetensors")
        assert why in run("infinity", "--features", "bad.safetensors", "-o", "out").err
    Path("bad.safetensors").write_bytes(b"no")
    assert "cannot be read as safetensors" in run("infinity", "--features", "bad.safetensors", "-o", "out").err
    assert "There is no file none" in run("infinity", "--features", "none", "-o", "out").err


# ---- speculative decoding


def test_speculative_decoding_draws_one_picture_a_seed(here: Path, run: Say) -> None:
    said = run("llamagen", "-n", "2", "-o", "out", "--speculative", "3", "--json")
    facts = json.loads(said.out)
    assert said.code == 0 and 1 <= facts["tokens_per_pass"] <= 4 and 0 <= facts["accepted"] <= facts["proposed"]
    assert run("llamagen", "--class", "1", "-o", "a.png", "--speculative", "3", "--seed", "1").code == 0
    assert np.array_equal(pixels("a.png"), pixels("out/001_class1.png"))
    assert "has no draft/" in run("var", "-n", "1", "-o", "out", "--speculative", "3").err


# ---- mistakes


@pytest.mark.parametrize(("arguments", "why"), [
    (["-o", "out", "--kv", "lru:0.3"], "there are full, sliding, streaming, h2o"),
    (["-o", "out", "--kv", "h2o"], "h2o:0.3"),
    (["-o", "out", "--kv_storage", "int3"], "stored as one of"), (["-o", "out", "-n", "0"], "no whole number"),
    (["-o", "out", "--kv", "full+int8", "--kv_storage", "int4"], "say it once"), ([], "say where the pictures go"),
    (["-o", "out", "--class", "1", "--prompt", "x"], "not allowed with"), (["-o", "out", "--seed", "-1"], "no seed"),
    (["-o", "a.png", "-n", "2"], "holds one picture"), (["-o", "a.png"], "holds one picture"),
    (["-o", "a.png", "--class", "1", "2"], "holds one picture"),
    (["-o", "a.png", "-n", "1", "--format", "jpeg"], "contradict"), (["-o", "out", "--mask", "m.png"], "say of what"),
    (["-o", "-", "-n", "1", "--previews"], "cannot all go to stdout"),
    (["-o", "out", "--sheet", "a.jpg"], "end in .png"), (["-o", "out", "--device", "tpu"], "tpu"),
    (["-o", "out", "--speculative", "3", "--kv", "h2o:0.3"], "goes with neither"),
    (["--sheet", "a.png", "--previews"], "say where by -o"), (["-o", "out", "--text_encoder", "x"], "there is none"),
    (["-o", "out", "--dtype", "int8"], "invalid choice"), (["-o", "out", "--cfg", "nan"], "'nan' is no number"),
    (["-o", "out", "--temperature", "inf"], "'inf' is no number"), (["-o", "out", "--cfg_layer", "1"], "no block"),
    (["-o", "out", "--cfg", "1", "2", "--cfg_schedule", "ramp"], "is a schedule already"),
    (["-o", "a.png", "-n", "1", "--sheet", "./a.png"], "are the same file")])
def test_usage_errors_are_told_before_torch_is_needed(arguments: list[str], why: str, here: Path, run: Say,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtc.models.load_generator", pytest.fail)
    said = run("var", *arguments)
    assert said.code == 2 and why in " ".join(said.err.split()) and tree(here) == []


@pytest.mark.parametrize(("model", "arguments", "why"), [
    ("none", ["-o", "out"], "No model"), ("var", ["-o", "out", "--class", "9"], "There is no class 9"),
    ("var", ["-o", "out", "--class", "trout"], "the classes are tench, parachute"),
    ("var", ["-o", "out", "--prompt", "a fox"], "draws classes and reads no texts"),
    ("infinity", ["-o", "out", "--class", "1"], "has no classes"), ("infinity", ["-o", "out"], "say what by --prompt"),
    ("var", ["-o", "out", "--size", "1M"], "takes neither --size nor --aspect"),
    ("var", ["-o", "no/where/out"], "does not exist; create it first"),
    ("var", ["-o", "no/a.png", "-n", "1"], "create it"),
    ("var", ["-o", "out", "--sheet", "no/a.png"], "create it first"),
    ("var", ["-o", "out", "--top_p", "2"], "top_p from 0 to 1"),
    ("var", ["-o", "out", "--temperature", "0"], "above 0"),
    ("var", ["-o", "out", "--kv", "h2o:0.001,recent=3"], "shares from 0 to 1"),
    ("var", ["-o", "out", "--kv", "snapkv:3t"], "too small"),
    ("var", ["-o", "out", "--kv", "streaming:0.5,sinks=-3"], "sinks from 0 up"),
    ("var", ["-o", "out", "--kv", "h2o:0.5,interval=4"], "draws whole scales at once"),
    ("llamagen", ["-o", "out", "--kv", "h2o:0.5,interval=40"], "An interval is from 1 token up to the budget"),
    ("var", ["-o", "out", "--cfg", "1", "2"], "2 weights of guidance do not fit 5 steps"),
    ("var", ["-o", "out", "--cfg_layer", "-1"], "Guidance at a block is Infinity's"),
    ("var", ["--estimate", "--kv", "hack:0.5", "--calibration", "none"], "There is no file none"),
    ("var", ["--estimate", "--speculative", "3"], "has no draft/"),
    ("llamagen", ["-o", "out", "--kv", "hack:0.3"], "a raster model has none: take streaming"),
    ("llamagen", ["-o", "out", "--kv", "sliding:2"], "take StreamingLLM"),
    ("var", ["-o", "out", "--image", "in.png", "--mask", "text.png"], "text.png is not a picture"),
    ("var", ["-o", "out", "--image", "none.png", "--mask", "in.png"], "none.png cannot be read"),
    ("var", ["-o", "out", "--image", "in.png", "--keep", "5"], "keep fewer than that"),
    ("var", ["-o", "out", "--given", "a.vtc"], "a.vtc"),
    ("var", ["-o", "out", "--device", "cuda:77"], "device cuda:77 is not available")])
def test_failures_are_one_sentence_and_leave_nothing(model: str, arguments: list[str], why: str, here: Path,
                                                     run: Say) -> None:
    inpainting(here)
    Path("text.png").write_text("no picture")
    Path("a.vtc").write_bytes(b"vtc?")
    before = tree(here)
    said = run(model, *arguments, "--quiet")
    assert said.code == 1 and why in said.err and len(said.lines) == 1 and tree(here) == before


@pytest.mark.parametrize("how", [[], ["--top_k", "1", "--kv", "h2o:0.5"]])
def test_a_model_of_damaged_weights_draws_nothing(how: list[str], here: Path, run: Say) -> None:
    damaged = tiny_var()
    with torch.no_grad():
        damaged.model.head.weight[0, 0] = float("nan")
    damaged.save(here / "damaged")
    before = tree(here)
    said = run(str(here / "damaged"), "-o", "out", *how, "--quiet")
    assert said.code == 1 and "logits are not numbers" in said.err and len(said.lines) == 1 and tree(here) == before


def test_a_weight_of_guidance_for_each_scale(here: Path, run: Say) -> None:
    assert run("var", "--class", "1", "-o", "a.png", "--cfg", "1", "1.5", "2", "2.5", "3", "--quiet").code == 0
    assert run("var", "--class", "1", "-o", "b.png", "--cfg", "3", "--cfg_schedule", "ramp", "--quiet").code == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert run("var", "--class", "1", "-o", "c.png", "--cfg", "3", "--cfg_schedule", "constant", "--quiet").code == 0
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))


def test_an_estimate_counts_the_features_of_a_file(here: Path, run: Say) -> None:
    save_file({"features": torch.randn(4, 6, 16)}, "text.safetensors")
    arguments = ("--features", "text.safetensors", "--json", "--quiet")
    facts = [json.loads(run("infinity", *arguments, "--estimate", *more).out) for more in ((), ("-n", "1"))]
    assert [f["batch_size"] for f in facts] == [4, 1]
    assert facts[0]["cache_peak_bytes"] == 4 * facts[1]["cache_peak_bytes"]
    drawn = json.loads(run("infinity", *arguments, "-o", "out").out)
    assert drawn["cache_peak_bytes"] == facts[0]["cache_peak_bytes"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_a_stopped_run_leaves_whole_files_only(stop: Any, here: Path, run: Say,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    synced = os.fsync
    calls = []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise stop
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    said = run("var", "-n", "3", "-o", "out", "--sheet", "out/sheet.png", "--quiet")
    assert said.code == 1 and tree(here) == ["out/000_tench.png"]
    assert said.lines == ["vtc-generate: stopped; no partial file is left." if stop is KeyboardInterrupt else
                          "vtc-generate: out/001_parachute.png cannot be written: no space left on device."]


def test_help_and_usage_errors_import_no_torch() -> None:
    code = ("import sys; from vtc.cli.generate import main\n"
            "for a in (['--help'], ['-o', 'x', '--kv', 'y']):\n"
            "    try: main(a)\n    except SystemExit: pass\n"
            "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in POLICIES)


# ---- import


@needs_shared("fixtures", "llamagen_tiny.safetensors")
def test_a_published_checkpoint_becomes_a_folder_that_draws(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.fixtures import Fixture

    torch.save({"model": Fixture("llamagen_tiny").weights("model.")}, "c2i.pt")
    from vtc.tokenizers.local_vq import LocalVQ

    torch.manual_seed(0)
    LocalVQ(64, 8, (8, 8, 8), (1, 1, 1), (8, 8, 8, 8), (1, 1, 1, 1), thin=4).save_pretrained("vq")
    assert import_checkpoint.main(["c2i.pt", "imported", "--tokenizer", "vq", "--set", "heads=4", "--set", "side=4",
                                   "--json", "-q"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["class"], facts["tokenizer"], facts["downsample"]) == ("LlamaGen", "LocalVQ", 16)
    assert generate.main(["--model", "imported", "--class", "1", "-o", "a.png", "--quiet"]) == 0
    assert pixels("a.png").shape == (64, 64, 3)
    capsys.readouterr()
    LocalVQ(32, 8, (8, 8, 8), (1, 1, 1), (8, 8, 8, 8), (1, 1, 1, 1), thin=4).save_pretrained("small")
    for tokenizer, why in (("small", "This generator draws"), ("none", "No model 'none'"),
                           ("c2i.pt", "none of the known")):
        assert import_checkpoint.main(["c2i.pt", "bad", "--tokenizer", tokenizer, "--set", "heads=4", "--set",
                                       "side=4"]) == 1
        assert why in capsys.readouterr().err
        assert not (here / "bad").exists()
