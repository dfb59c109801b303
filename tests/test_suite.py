"""vtc-eval and the suite behind it: pairs, codecs, cache, processes, bad input, intervals, marks."""

import csv
import gc
import io
import json
import math
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.shared import ROOT, SHARED, needs_shared
from vtc.cli.eval import main
from vtc.errors import ConfigError, FileError
from vtc.eval.bootstrap import bootstrap_interval
from vtc.eval.cache import Record, RecordCache
from vtc.eval.engines.base import EngineInfo, FaceEngine, TextEngine
from vtc.eval.fidelity_measures import FaceMeasure, TextMeasure
from vtc.eval.measures import build, parse_names
from vtc.eval.names import MEASURES
from vtc.eval.pairs import find_items, match
from vtc.eval.psnr import PeakSignalNoiseRatio
from vtc.eval.results import differences, from_json, marks, table
from vtc.eval.suite import Files, Method, Reconstruction, Suite
from vtc.images import load_image, save_image, to_tensor
from vtc.tokenizers.local_vq import LocalVQ

SIZES = ((180, 200), (170, 164), (176, 190))


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """Smooth, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """ref/: three PNGs, one in a folder below; rec/: the same as JPEG; model/: a tiny random LocalVQ."""
    root = tmp_path_factory.mktemp("suite")
    for number, (height, width) in enumerate(SIZES):
        place = f"{'below/' if number == 2 else ''}{number}"
        for kind, suffix in (("ref", ".png"), ("rec", ".jpg")):
            path = root / kind / f"{place}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(number, height, width)).save(path, quality=30 - 5 * number)
    torch.manual_seed(0)
    LocalVQ(codebook_size=32, dim=4, encoder_widths=(4, 4, 4), encoder_depths=(0, 0, 1), decoder_widths=(4, 4, 4, 4),
            decoder_depths=(0, 0, 0, 1), thin=4).save_pretrained(root / "model")
    return root


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Calls the command with a cache of its own; .code, .out, .err, and .data for --json."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "nothing"))  # no weights unless they are given
    for name in ("VTC_LPIPS_WEIGHTS", "VTC_FID_WEIGHTS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def call(*argv, cache: Path | None = None) -> SimpleNamespace:
        code: Any
        try:
            code = main([*map(str, argv), "--cache", str(cache or tmp_path / "cache"), "-q"])
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        data = json.loads(captured.out) if "--json" in argv and captured.out else None
        return SimpleNamespace(code=code, out=captured.out, err=captured.err, data=data)

    return call


def values(result: dict) -> dict[str, float]:
    return {name: entry["value"] for name, entry in result["results"].items()}


def own_psnr(a: Path, b: Path) -> float:
    """By numpy alone."""
    x, y = (np.asarray(Image.open(path).convert("RGB"), dtype=np.float64) for path in (a, b))
    return 10 * math.log10(255**2 / np.square(x - y).mean())


def test_pairs_of_folders_by_name_without_suffix(folders, run, tmp_path):
    done = run(folders / "ref", folders / "rec", "--metrics", "bpp,bpp_pooled,psnr,psnr_pooled,ms_ssim", "--json",
               "--csv", tmp_path / "all.csv")
    assert done.code == 0, done.err
    (method,) = done.data["methods"]
    expected = [own_psnr(folders / "ref" / f"{n}.png", folders / "rec" / f"{n}.jpg") for n in ("0", "1", "below/2")]
    found = values(method)
    assert found["peak_signal_noise_ratio"] == pytest.approx(np.mean(expected), abs=1e-5)
    pooled = -10 * np.log10(np.mean(10 ** (-np.array(expected) / 10)))
    assert found["peak_signal_noise_ratio_pooled"] == pytest.approx(pooled, abs=1e-5)
    sizes = [(folders / "rec" / f"{n}.jpg").stat().st_size for n in ("0", "1", "below/2")]
    pixels = [height * width for height, width in SIZES]
    assert found["bits_per_pixel"] == pytest.approx(np.mean([8 * b / p for b, p in zip(sizes, pixels, strict=True)]))
    assert found["bits_per_pixel_pooled"] == pytest.approx(8 * sum(sizes) / sum(pixels))
    assert {entry["n"] for entry in method["results"].values()} == {3}
    low, high = method["results"]["peak_signal_noise_ratio"]["confidence_interval"]
    assert min(expected) - 1e-5 <= low < found["peak_signal_noise_ratio"] < high <= max(expected) + 1e-5
    with open(tmp_path / "all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["0", "1", "below/2"]
    assert [float(row["peak_signal_noise_ratio"]) for row in rows] == pytest.approx(expected, abs=1e-5)
    assert [int(row["num_bytes"]) for row in rows] == sizes


def test_two_files_of_any_name_are_a_pair(folders, run):
    done = run(folders / "ref" / "0.png", folders / "rec" / "0.jpg", "--metrics", "psnr", "--json")
    assert done.code == 0
    (method,) = done.data["methods"]
    assert method["results"]["peak_signal_noise_ratio"]["confidence_interval"] is None  # of one image
    assert method["results"]["peak_signal_noise_ratio"]["n"] == 1


def test_identical_pictures_are_infinite_in_decibels_and_valid_json(folders, run):
    done = run(folders / "ref", folders / "ref", "--metrics", "psnr,ssim", "--json")
    assert done.code == 0
    assert "Infinity" not in done.out
    psnr = done.data["methods"][0]["results"]["peak_signal_noise_ratio"]
    assert psnr["value"] is None and "infinite" in psnr["note"]
    assert values(done.data["methods"][0])["structural_similarity"] == pytest.approx(1)
    assert "| ref | 3 | inf |" in run(folders / "ref", folders / "ref", "--metrics", "psnr").out


def test_what_cannot_be_measured_is_listed_and_the_rest_is_measured(folders, run, tmp_path):
    ref, rec = tmp_path / "ref", tmp_path / "rec"
    for folder in (ref, rec):
        folder.mkdir()
    for name in ("good", "alone", "wrong_size", "broken", "nan", "twice"):
        save_image(picture(1, 40, 50), ref / f"{name}.png")
    save_image(picture(2, 40, 50), rec / "good.png")
    save_image(picture(2, 40, 48), rec / "wrong_size.png")
    (rec / "broken.png").write_bytes(b"no picture")
    Image.fromarray(np.full((40, 50), np.nan, dtype=np.float32)).save(rec / "nan.tiff")
    save_image(picture(2, 40, 50), rec / "twice.png")
    save_image(picture(2, 40, 50), rec / "twice.jpg")
    save_image(picture(2, 40, 50), rec / "stranger.png")
    done = run(ref, rec, "--metrics", "psnr", "--json")
    assert done.code == 1
    (method,) = done.data["methods"]
    assert method["results"]["peak_signal_noise_ratio"]["n"] == 1
    lines = done.err.splitlines()
    assert lines[0] == "vtc-eval: 6 things were not measured:"
    for words in (("alone", "no reconstruction"), ("wrong_size", "50x40", "48x40"), ("broken", "not a picture"),
                  ("nan", "not finite"), ("twice.jpg and twice.png", "keep one"), ("stranger", "no original")):
        assert sum(all(word in line for word in words) for line in lines[1:]) == 1, words
    assert len(lines) == 7 and all(line.endswith(".") for line in lines[1:])
    assert len(done.data["problems"]) == 6
    assert str(tmp_path) not in done.out  # nobody's folders go into a result


@pytest.mark.parametrize(("argv", "words"), [
    (("{empty}", "{rec}"), "holds no pictures"),
    (("{ref}", "{empty}"), "holds no pictures"),
    (("{ref}", "nowhere"), "no file or folder nowhere"),
    (("--codec", "nowhere", "--data", "{ref}"), "nowhere"),
    (("--codec", "compressai:factorised:x", "--data", "{ref}"), "factorised"),
    (("--codec", "compressai:bmshj2018-factorized", "--data", "{ref}"), "ARCHITECTURE:WEIGHTS"),
    (("{ref}", "{rec}", "--protocol", "wetok"), "--size"),
    (("{ref}", "{rec}", "--add", "{ref}/0.png"), "not a results file"),
    (("{ref}", "{rec}", "--report", "{ref}/0.png/report"), "report's folder"),
    (("{ref}", "{rec}", "--reference", "nowhere.npz", "--metrics", "psnr"), "no such file"),
    (("{ref}", "{rec}", "--engines", "rapidocr", "--metrics", "psnr"), "--annotations"),
    (("{ref}", "{rec}", "--best-by", "lpips", "--metrics", "fid"), "weights-inception-2015-12-05-6726825d.pth"),
])
def test_mistakes_are_one_sentence_and_code_1(folders, run, tmp_path, monkeypatch, argv, words):
    if any("compressai" in word for word in argv):
        pytest.importorskip("compressai")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    done = run(*(word.format(ref=folders / "ref", rec=folders / "rec", empty=tmp_path / "empty") for word in argv))
    assert done.code == 1 and words in done.err and "Traceback" not in done.err
    assert len([line for line in done.err.splitlines() if line.endswith(".")]) >= 1


def test_every_reason_is_told_where_nothing_is_left(folders, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ref").mkdir()
    for name in ("0.png", "double.png", "double.jpg"):
        save_image(picture(0, 32, 32), tmp_path / "ref" / name)
    done = run("--codec", "nowhere", "--data", "ref")
    assert done.code == 1 and "double stands for" in done.err and "nowhere" in done.err.splitlines()[-1]
    done = run("ref", "ref", "--metrics", "fid,lpips")
    assert done.code == 1 and "fid: FID needs" in done.err and "lpips_alex: LPIPS needs" in done.err


@pytest.mark.parametrize("argv", [
    (), ("a",), ("a", "b", "--codec", "c"), ("--codec", "c"), ("--data", "d"), ("a", "b", "--metrics", "psnrr"),
    ("a", "b", "--json", "--csv", "-"), ("--peers", "gif", "--data", "."),
    ("--peers", "jpeg", "--data", "d", "--rates", "0"),
])
def test_contradictions_are_code_2(run, argv):
    assert run(*argv).code == 2


def test_what_was_measured_is_shown_where_a_table_cannot_be_written(folders, run, tmp_path):
    done = run(folders / "ref", folders / "rec", "--metrics", "psnr", "--csv", tmp_path / "nosuch" / "x.csv")
    assert done.code == 1 and "PSNR dB" in done.out and "does not exist; create it first" in done.err


def test_help_answers_without_torch():
    code = ("import sys; sys.argv = ['vtc-eval', '--help']\ntry:\n import vtc.cli.eval as e; e.main()\n"
            "except SystemExit: pass\nprint('torch' in sys.modules, 'numpy' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    assert "ms_ssim" in done.stdout


def test_a_metric_without_weights_stops_only_itself(folders, run):
    done = run(folders / "ref", folders / "rec", "--metrics", "psnr,lpips", "--json")
    assert done.code == 1 and "lpips_alex: LPIPS needs" in done.err
    assert "peak_signal_noise_ratio" in values(done.data["methods"][0])
    done = run(folders / "ref", folders / "rec", "--json")  # nobody asked for LPIPS by name: a remark
    assert done.code == 0 and "lpips_alex is not measured" in done.err


def test_metric_names():
    assert parse_names("ms-ssim, psnr,LPIPS") == ["psnr", "ms_ssim", "lpips_alex"]
    assert parse_names("all") == list(MEASURES)
    with pytest.raises(ConfigError, match="no metric psnrr"):
        parse_names("psnrr")


def test_small_pictures_have_no_ms_ssim_and_say_so(run, tmp_path):
    for name, side in (("small", 100), ("large", 170)):
        for kind in ("ref", "rec"):
            (tmp_path / kind).mkdir(exist_ok=True)
            save_image(picture(len(kind + name) + (kind == "ref"), side, side), tmp_path / kind / f"{name}.png")
    done = run(tmp_path / "ref", tmp_path / "rec", "--metrics", "psnr,ms_ssim", "--json")
    assert done.code == 0
    (method,) = done.data["methods"]
    assert method["results"]["multiscale_structural_similarity"]["n"] == 1
    assert method["extra"]["skipped"]["ms_ssim"]["images"] == 1
    assert "161" in method["extra"]["skipped"]["ms_ssim"]["first"]
    assert "(n=1" in run(tmp_path / "ref", tmp_path / "rec", "--metrics", "psnr,ms_ssim").out


# Codecs, tokenizers, peers


def test_a_codec_next_to_peers_with_its_bytes_and_at_rates(folders, run, tmp_path):
    done = run("--codec", folders / "model", "--peers", "j2k,webp", "--rates", "match", "0.5", "--downsample", "1,2",
               "--best-by", "psnr", "--data", folders / "ref", "--metrics", "bpp,psnr,codebook,seconds", "--json",
               "--csv", tmp_path / "all.csv")
    assert done.code == 0, done.err
    methods = {m["name"]: m for m in done.data["methods"]}
    assert list(methods) == ["model", "jpeg2000 at model's bytes", "jpeg2000 at 0.5 bpp", "webp at model's bytes",
                             "webp at 0.5 bpp"]
    tokenizer = LocalVQ.from_pretrained(folders / "model")
    assert methods["model"]["description"]["fingerprint"] == tokenizer.fingerprint().hex()
    assert values(methods["model"])["codebook_tokens"] == sum(math.ceil(h / 16) * math.ceil(w / 16) for h, w in SIZES)
    with open(tmp_path / "all.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ours = {row["image"]: int(row["num_bytes"]) for row in rows if row["method"] == "model"}
    assert len(ours) == 3
    for row in rows:
        if "bytes" in row["method"]:
            assert int(row["num_bytes"]) <= ours[row["image"]]
        elif "0.5 bpp" in row["method"]:
            assert float(row["bits_per_pixel"]) <= 0.5
            assert float(row["downsample"]) in (1, 2)
    assert methods["webp at 0.5 bpp"]["conditions"]["n"] == 3
    assert "encode_seconds" in values(methods["model"])


def test_a_peer_that_cannot_be_so_small_has_fewer_images_and_a_mark(folders, run):
    """JPEG's header alone is larger than 0.1 bits for each of these pixels; at 16 bits everything fits."""
    done = run("--codec", folders / "model", "--peers", "jpeg", "--rates", "0.1", "4", "--downsample", "1", "--best-by",
               "psnr", "--data", folders / "ref", "--metrics", "psnr,bpp")
    assert done.code == 0
    assert "| jpeg at 4 bpp | 3 |" in done.out and "| jpeg at 0.1 bpp [a] | 0 | - |" in done.out


def test_a_tokenizer_has_a_nominal_rate(folders, run):
    done = run("--tokenizer", folders / "model", "--data", folders / "ref", "--metrics", "bpp,psnr", "--json")
    (method,) = done.data["methods"]
    expected = np.mean([5 * math.ceil(h / 16) * math.ceil(w / 16) / (h * w) for h, w in SIZES])  # 32 words
    assert values(method)["nominal_bits_per_pixel"] == pytest.approx(expected)
    assert "bits_per_pixel" not in values(method)


def test_tokens_are_measured_as_a_language(folders, run):
    """Of a codec and of a tokenizer, which have the same tokens: the statistics are those of the grids, row by row."""
    from vtc.eval.token_statistics import TokenStatistics, token_statistics

    done = run("--codec", folders / "model", "--tokenizer", folders / "model", "--data", folders / "ref", "--metrics",
               "codebook", "--json")
    assert done.code == 0, done.err
    tokenizer = LocalVQ.from_pretrained(folders / "model")
    paths = [folders / "ref" / f"{name}.png" for name in ("0", "1", "below/2")]
    grids = [tokenizer.encode(load_image(path).tensor()[None]).grids()[-1][0, :, :, 0].numpy() for path in paths]
    expected = token_statistics(grids, 32)
    for method in done.data["methods"]:
        assert TokenStatistics.from_json(method["extra"]["token_statistics"]) == expected
        assert expected.tokens == values(method)["codebook_tokens"] and expected.above_and_left is not None
    with pytest.raises(ConfigError, match="not what token_statistics"):
        TokenStatistics.from_json({"tokens": 3})


def test_no_more_tokens_are_kept_than_statistics_take(monkeypatch):
    from vtc.eval import measures

    monkeypatch.setattr(measures, "MOST_TOKENS", 10)
    words = measures.build("codebook").collector({"vocab": [4, 8]})
    for seed in range(4):  # two scales, 1x1 and 2x3, and two groups
        tokens = np.random.default_rng(seed).integers(4, size=(7, 2)).astype(np.int32)
        words.add({"tokens": tokens, "grid": np.array([2, 3])})
        assert np.array_equal(words.documents[min(seed, 1)], tokens[1:, 0].reshape(2, 3)) or seed > 1
    found = words.results()
    assert found["codebook_tokens"] == 28
    assert found["token_statistics"]["tokens"] == 12 and found["token_statistics"]["documents"] == 2


def test_samples_for_adm_and_the_networks_stride(folders, run, tmp_path):
    done = run("--codec", folders / "model", "--data", folders / "ref", "--protocol", "adm", "--size", "64",
               "--metrics", "psnr,lattice", "--samples", tmp_path / "samples.npz", "--json")
    assert done.code == 0, done.err
    samples = np.load(tmp_path / "samples.npz")["arr_0"]
    assert samples.shape == (3, 64, 64, 3) and samples.dtype == np.uint8
    conditions = done.data["methods"][0]["conditions"]
    assert conditions["metrics"]["lattice"] == {"period": 16}
    done = run("--codec", folders / "model", "--data", folders / "ref", "--metrics", "psnr", "--samples",
               tmp_path / "samples.npz")
    assert done.code == 1 and "take a protocol that crops" in done.err and "Traceback" not in done.err


def test_compressai_by_name_and_weights(folders, run, tmp_path):
    compressai = pytest.importorskip("compressai.models")
    torch.manual_seed(0)
    model = compressai.FactorizedPrior(8, 8)
    model.update()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "tiny.pth.tar")
    done = run("--codec", f"compressai:bmshj2018-factorized:{tmp_path / 'tiny.pth.tar'}", "--data", folders / "ref",
               "--metrics", "bpp,psnr", "--json", "--csv", tmp_path / "all.csv")
    assert done.code == 0, done.err
    (method,) = done.data["methods"]
    assert method["name"] == "bmshj2018-factorized:tiny" and len(method["description"]["weights_sha256"]) == 64
    image = load_image(folders / "ref" / "0.png").tensor()[None]
    padded = torch.nn.functional.pad(image, (0, 56, 0, 12), mode="replicate")
    expected = len(model.eval().compress(padded)["strings"][0][0]) + 12
    with open(tmp_path / "all.csv", newline="") as file:
        assert int(next(csv.DictReader(file))["num_bytes"]) == expected


# The suite itself


class Halved(Method):
    """Half of the brightness; counts its calls and the pictures that are alive."""

    name = family = "halved"
    kind = "codec"

    def __init__(self, factor: float = 0.5) -> None:
        self.description = {"factor": factor, "vocab": [4]}
        self.factor, self.calls, self.most = factor, 0, 0
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def reconstruct(self, item, image):
        self.calls += 1
        self.alive.add(image)
        self.most = max(self.most, len(self.alive))
        return Reconstruction(image[0] * self.factor, 100, torch.arange(3).numpy()[:, None])


def suite(methods, names="psnr,bpp,codebook", **more) -> Suite:
    return Suite(methods, [build(name) for name in parse_names(names)], **more)


def test_what_was_measured_is_remembered(folders, tmp_path):
    items, _ = find_items(folders / "ref")
    cache = RecordCache(tmp_path)
    first, _ = suite([method := Halved()], cache=cache).run(items)
    assert method.calls == 3
    again, _ = suite([method := Halved()], cache=cache).run(items)
    assert method.calls == 0 and again[0].results == first[0].results and again[0].extra == first[0].extra
    more, _ = suite([method := Halved()], "psnr,ssim,bpp,codebook", cache=cache).run(items)
    assert method.calls == 3
    assert more[0].results["peak_signal_noise_ratio"] == first[0].results["peak_signal_noise_ratio"]
    assert "structural_similarity" in more[0].results
    suite([method := Halved()], cache=cache, fresh=True).run(items)
    assert method.calls == 3
    suite([method := Halved(0.4)], cache=cache).run(items)  # another method
    assert method.calls == 3
    (one := next(path for path in tmp_path.rglob("*.json"))).write_text('{"facts": ')
    methods = [Halved(), Halved(0.4)]
    methods[1].name = "darker"
    suite(methods, cache=cache).run(items)
    assert sum(method.calls for method in methods) == 1 and Record.from_json(one.read_text()).facts  # mended


def test_a_changed_file_is_measured_again(folders, tmp_path, run):
    rec = tmp_path / "rec.png"
    save_image(picture(5, *SIZES[0]), rec)
    first = run(folders / "ref/0.png", rec, "--metrics", "psnr", "--json")
    save_image(picture(6, *SIZES[0]), rec)
    second = run(folders / "ref/0.png", rec, "--metrics", "psnr", "--json")
    assert values(first.data["methods"][0]) != values(second.data["methods"][0])


def test_jobs_do_not_change_a_bit(folders):
    items, _ = find_items(folders / "ref")
    one, three = (suite([Halved()], "psnr,ms_ssim,bands,lattice,codebook", jobs=jobs).run(items)[0][0]
                  for jobs in (1, 3))
    assert one.results == three.results and one.extra == three.extra and one.images == three.images


def test_memory_holds_a_few_pictures_whatever_their_number(folders, tmp_path):
    """Of 40 pictures no more are alive at a time than there are jobs and results that wait: 3 * 2."""
    for number in range(40):
        save_image(picture(number, 24, 24), tmp_path / f"{number}.png")
    items, _ = find_items(tmp_path)
    method = Halved()
    gc.collect()
    results, _ = suite([method], "psnr", jobs=2).run(items)
    assert method.calls == 40 and results[0].results["peak_signal_noise_ratio"].n == 40
    assert method.most <= 6


def test_two_processes_give_the_numbers_of_one(folders, tmp_path):
    """`accelerate launch`, bit for bit; the picture that fails is told once."""
    broken = tmp_path / "ref"
    broken.mkdir()
    for n in ("0", "1"):
        (broken / f"{n}.png").write_bytes((folders / "ref" / f"{n}.png").read_bytes())
    save_image(picture(7, 165, 165), broken / "4.png")
    (broken / "2.png").write_bytes(b"no picture")
    argv = ["--codec", str(folders / "model"), "--data", str(broken), "--metrics", "bpp,psnr,ms_ssim,codebook,bands",
            "--json", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "--num_machines",
              "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    found = []
    for start in ([sys.executable], launch):
        done = subprocess.run([*start, "-m", "vtc.cli.eval", *argv, "--no-cache"], cwd=ROOT, capture_output=True,
                              text=True, env=environment, timeout=300, check=False)
        assert done.stdout, done.stderr
        data = json.loads(done.stdout)
        found.append((data["methods"], data["problems"]))
        assert done.stderr.count("2.png is not a picture") == 1
    assert found[0] == found[1]
    assert found[0][0][0]["conditions"]["n"] == 3


@needs_shared("weights", "alexnet_features.safetensors")
def test_lpips_and_frechet_distance_equal_their_own_classes(folders):
    from vtc.eval.features import PooledFeatures
    from vtc.eval.frechet import FrechetDistance
    from vtc.eval.lpips import LearnedPerceptualImagePatchSimilarity
    from vtc.eval.measures import Options

    weights = str(SHARED / "weights")
    items, _ = find_items(folders / "ref")
    measures = [build(name, Options(lpips_weights=weights)) for name in ("lpips_alex", "fd_alexnet", "psnr_pooled")]
    (result,), problems = Suite([Halved()], measures).run(items)
    assert problems == []
    lpips, distance = (LearnedPerceptualImagePatchSimilarity("alex", weights),
                       FrechetDistance(PooledFeatures("alex", weights)))
    pooled = PeakSignalNoiseRatio(aggregation="pooled")
    for item in items:
        target = load_image(item.path).tensor()[None]
        preds = (target * 0.5 * 255).round() / 255
        lpips.update(preds, target)
        pooled.update(preds, target)
        distance.update(target, real=True)
        distance.update(preds, real=False)
    value = {name: entry.value for name, entry in result.results.items()}
    assert value["learned_perceptual_image_patch_similarity_alex"] == pytest.approx(lpips.compute().item(), abs=1e-6)
    assert value["peak_signal_noise_ratio_pooled"] == pytest.approx(pooled.compute().item(), abs=1e-9)
    assert value["frechet_distance_alexnet_features_pool"] == pytest.approx(distance.compute().item(), rel=1e-4)


def test_values_that_are_not_finite_are_told(folders):
    class Broken(Halved):
        def reconstruct(self, item, image):
            return Reconstruction(image[0] * (math.nan if item.name == "0" else 1.0))

    items, _ = find_items(folders / "ref")
    (result,), problems = suite([Broken()], "psnr").run(items)
    assert [p.image for p in problems] == ["0"] and "not finite" in problems[0].sentence
    assert result.images == ["1", "below/2"]


def test_a_bug_in_a_method_is_a_sentence(folders):
    class Broken(Halved):
        def reconstruct(self, item, image):
            raise KeyError("oh")

    results, problems = suite([Broken()], "psnr").run(find_items(folders / "ref")[0])
    assert results == [] and len(problems) == 3
    assert all("unexpected KeyError" in problem.sentence for problem in problems)


def test_protocols_prepare_and_round(folders):
    """WeTok's: shorter side to 64, centre crop, reconstruction truncated."""
    from vtc.eval.protocols import protocol

    class Same(Halved):
        def reconstruct(self, item, image):
            assert image.shape == (1, 3, 64, 64)
            return Reconstruction((image[0] + 0.9 / 255).clamp(0, 1))  # truncation takes it back

    (result,), _ = suite([Same()], "ssim", protocol=protocol("wetok"), size=64).run(find_items(folders / "ref")[0])
    assert result.results["structural_similarity"].value == pytest.approx(1)
    assert result.conditions["protocol"]["crop"] == "centre" and result.conditions["size"] == 64


# Engines


class Reader(TextEngine):
    """Reads every second word, in bright pictures only."""

    info = EngineInfo("reader", "1", "none")

    def read(self, crops, truths=None):
        return ["ab" if crop.mean() > 100 and not n % 2 else "a" for n, crop in enumerate(crops)]


class Looker(FaceEngine):
    """A face is the whole picture, and a person their mean colour."""

    info = EngineInfo("looker", "1", "none")
    measure, match_threshold = "distance", 50.0

    def detect(self, pixels):
        return [(0.0, 0.0, float(pixels.shape[1]), float(pixels.shape[0]))]

    def align(self, original, face):
        return None

    def embed(self, pixels, alignment):
        return pixels.reshape(-1, 3).mean(0)


def test_engines_judge_words_and_faces(tmp_path):
    for name, level in (("a", 240), ("b", 150)):
        save_image(np.full((100, 100, 3), level, dtype=np.uint8), tmp_path / f"{name}.png")
    box = {"polygon": [10, 10, 50, 10, 50, 30, 10, 30], "text": "ab", "ignore": False}
    lines = [json.dumps({"image": f"{name}.png", "words": [box, box, {**box, "ignore": True}]}) for name in "ab"]
    (tmp_path / "annotations.jsonl").write_text("\n".join(lines))
    items, _ = find_items(tmp_path)
    measures = [TextMeasure(Reader(), tmp_path / "annotations.jsonl", 256), FaceMeasure(Looker(), 256)]
    (result,), problems = Suite([Halved()], measures).run(items)
    assert problems == []
    value = {name: entry.value for name, entry in result.results.items()}
    # Halved, a is bright enough and b is not: of four words, the first is read, and the others' half.
    assert value["text_accuracy_reader"] == 0.25 and value["text_edit_similarity_reader"] == pytest.approx(0.625)
    distances = [math.sqrt(3) * level for level in (120, 75)]
    assert value["face_distance_looker"] == pytest.approx(np.mean(distances)) and value["face_match_rate_looker"] == 0
    described = result.extra["text_fidelity_reader"]
    assert described["engine"]["version"] == "1" and described["t_acc"]["large"]["few"]
    assert result.conditions["metrics"]["text_reader"]["engine"]["name"] == "reader"


def test_an_absent_engine_stops_only_itself(folders, run):
    done = run(folders / "ref", folders / "rec", "--metrics", "psnr", "--engines", "antelopev2:nowhere", "--json")
    assert done.code == 1 and "antelopev2" in done.err
    assert "peak_signal_noise_ratio" in values(done.data["methods"][0])


# Marks


def test_results_made_differently_carry_a_mark(folders, run, tmp_path):
    ref, rec = folders / "ref", folders / "rec"
    earlier = tmp_path / "earlier.json"
    earlier.write_text(run(ref, rec, "--metrics", "psnr", "--limit", "2", "--json").out)
    same = tmp_path / "same.json"
    same.write_text(run(ref, rec, "--metrics", "psnr", "--json").out)
    done = run(ref, rec, "--metrics", "psnr", "--add", earlier, "--add", same)
    assert done.code == 0, done.err
    rows = [line for line in done.out.splitlines() if line.startswith("| rec")]
    assert len(rows) == 3
    assert [re.match(r"\| rec( \[a\])? \|", row).group(1) for row in rows] == [None, " [a]", None]
    assert "[a] Made differently from the first row: other pictures (2 of ref against 3 of ref)." in done.out


def test_differences_in_words():
    base = {"images_sha256": "1", "n": 3, "reference_set": "x", "size": None, "device": "cpu",
            "protocol": {"name": "native", "crop": "none"}, "packages": {"torch": "2.1", "tqdm": "1"},
            "metrics": {"lpips_alex": {"tensors_sha256": "a"}, "psnr": {}}}
    assert differences(base, base) == []
    assert differences(base, {**base, "packages": {"torch": "2.2", "tqdm": "2"}}) == ["torch 2.2 against 2.1"]
    assert differences(base, {**base, "metrics": {"lpips_alex": {"tensors_sha256": "b"}}}) == [
        "other settings or weights of lpips_alex"]
    assert differences(base, {**base, "metrics": {"ssim": {}}}) == []
    assert differences(base, {**base, "protocol": {"name": "wetok", "crop": "centre"}}) == [
        "another protocol: name wetok against native, crop centre against none"]
    assert "device cuda" in differences(base, {**base, "device": "cuda"})[0]


def test_a_results_file_comes_back(folders, run, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(run(folders / "ref", folders / "rec", "--json", "--metrics", "psnr,ssim").out)
    (method,) = from_json(path)
    assert method.origin == "results.json" and method.conditions["n"] == 3
    assert method.results["peak_signal_noise_ratio"].interval is not None
    assert marks([method, method]) == (["", ""], [])
    assert "| rec | 3 |" in table([method])
    with pytest.raises(FileError, match="not a results file"):
        from_json(folders / "model" / "config.json")


def test_an_interval_of_normal_numbers_is_the_textbooks():
    """1.96 standard errors on either side, to 8 % of the width with 2,000 resamples."""
    x = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap_interval([x])
    error = x.std(ddof=1) / 20
    assert low == pytest.approx(x.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(x.mean() + 1.96 * error, abs=0.3 * error)
    ratio = bootstrap_interval([3 * x, x], lambda a, b: a / b)  # drawn together: no spread at all
    assert ratio == pytest.approx((3, 3))


def test_matching_a_file_with_a_folder(folders):
    items, _ = find_items(folders / "ref" / "0.png")
    files, problems = match(items, folders / "rec", "rec")
    assert list(files) == ["0"]
    assert {problem.image for problem in problems} == {"1", "below/2"}
    result, _ = Suite([Files("rec", files, rate=True)], [build("bpp")]).run(items)
    assert result[0].results["bits_per_pixel"].n == 1


def test_a_record_keeps_every_bit():
    record = Record({"height": 3}, {"a": {"x": 0.1 + 0.2, "y": math.inf}},
                    {"a": {"f": np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)}}, {"b": "no"})
    back = Record.from_json(record.to_json())
    assert back.facts == record.facts and back.columns == record.columns and back.skipped == record.skipped
    assert np.array_equal(back.parts["a"]["f"], record.parts["a"]["f"]) and back.parts["a"]["f"].dtype == np.float32


def test_a_table_on_stdout_is_text(folders, run):
    out = run(folders / "ref", folders / "rec", "--metrics", "psnr,bpp", "--csv", "-").out
    rows = list(csv.reader(io.StringIO(out)))
    assert rows[0][:2] == ["image", "method"] and len(rows) == 4
    assert to_tensor(picture(0, 8, 8)).shape == (3, 8, 8)
