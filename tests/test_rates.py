"""Families of tokenizers in one file, and the choice of a member by quality, bits per pixel or bytes."""

import hashlib
import json
import sys
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.shared import ROOT, SHARED, needs_shared
from vtc import hub
from vtc.cli import decode, encode
from vtc.codecs.rates import RateControl
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import ConfigError, FileError, ImageError, ModelError
from vtc.images import load_image
from vtc.models import DEFAULT_MODEL, FINGERPRINTS, MEMBERS, MODEL_IDS, family_of, load_tokenizer, size_of
from vtc.tokenizers.codebook_clustering import cluster_codebook, with_codebook
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.tokenizer_family import FAMILY, FORMAT, FamilyMembers, TokenizerFamily

SIZES = (2, 8, 32)


def tiny(words: int = 64, seed: int = 0) -> LocalVQ:
    torch.manual_seed(seed)
    return LocalVQ(codebook_size=words, dim=4, encoder_widths=(4, 4, 4), encoder_depths=(1, 1, 1),
                   decoder_widths=(4, 4, 4, 4), decoder_depths=(1, 1, 1, 1), thin=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder with a family of three members, each with its own decoder entry."""
    path = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(path)
    base = LocalVQ.from_pretrained(path)
    clustered = cluster_codebook(base.quantizer.codebook, SIZES)
    members = {}
    for size in SIZES:
        members[size] = with_codebook(base, clustered.codebooks[size], clustered.maps[size])
        with torch.no_grad():
            members[size].decoder.stem.bias.add_(size / 64)
    TokenizerFamily.of(base, members).save(path / FAMILY)
    return path


def picture(height: int = 96, width: int = 112, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


# ---- the file -------------------------------------------------------------------------------------------------------

def test_a_member_is_the_base_but_for_what_is_its_own(folder):
    base, family = LocalVQ.from_pretrained(folder), TokenizerFamily.load(folder / FAMILY)
    assert family.about.sizes == SIZES and family.about.base == base.fingerprint().hex()
    for size in SIZES:
        member = family.member(base, size)
        assert member.fingerprint().hex() == family.about.fingerprints[size] and not member.training
        assert member.layout(40, 40).vocab == (size,) and len(member.token_frequencies[0]) == size
        own = {"quantizer.codebook", "token_frequencies", "decoder.stem.bias"}
        assert family.members[size].keys() == own
        for name, tensor in member.state_dict().items():
            if name not in own:
                assert torch.equal(tensor, base.state_dict()[name]) and tensor.data_ptr() != 0
    with torch.no_grad():
        member.decoder.head.weight.zero_()  # nothing is shared
    assert base.decoder.head.weight.abs().sum() > 0


def test_the_same_family_is_the_same_bytes(folder, tmp_path):
    family = TokenizerFamily.load(folder / FAMILY)
    family.save(tmp_path / FAMILY)
    assert (tmp_path / FAMILY).read_bytes() == (folder / FAMILY).read_bytes()
    assert all(t.dtype == torch.float16 for m in family.members.values() for t in m.values() if t.is_floating_point())


def test_what_is_not_a_family_says_so(folder, tmp_path):
    with pytest.raises(FileError, match="no file"):
        FamilyMembers.read(tmp_path / FAMILY)
    (tmp_path / FAMILY).write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        TokenizerFamily.load(tmp_path / FAMILY)
    one = {"8.quantizer.codebook": torch.zeros(8, 4)}
    for metadata, message in ((None, "is no family"), ({FORMAT: "{"}, "incomplete"), ({FORMAT: "[]"}, "incomplete"),
                              ({FORMAT: '{"base": "00", "fingerprints": []}'}, "incomplete"),
                              ({FORMAT: '{"base": "00", "fingerprints": {}}'}, "incomplete"),
                              ({FORMAT: '{"base": "00", "fingerprints": {"4": "00"}}'}, "damaged")):
        save_file(one, tmp_path / FAMILY, metadata)
        with pytest.raises(ModelError, match=message):
            TokenizerFamily.load(tmp_path / FAMILY)
    base, family = LocalVQ.from_pretrained(folder), TokenizerFamily.load(folder / FAMILY)
    with pytest.raises(ModelError, match="no member of 5 words; it has 2, 8, 32"):
        family.member(base, 5)
    with pytest.raises(ModelError, match="was made for the model with fingerprint"):
        family.member(tiny(seed=1), 8)
    facts = json.dumps({"base": base.fingerprint().hex(), "fingerprints": {"8": "00"}})
    save_file(one, tmp_path / FAMILY, {FORMAT: facts})
    with pytest.raises(ModelError, match="Member 8 does not fit LocalVQ"):  # its table has still 64 words
        TokenizerFamily.load(tmp_path / FAMILY).member(base, 8)
    with pytest.raises(ConfigError, match="Member 64 is the base model itself"):
        TokenizerFamily.of(base, {64: base})


# ---- the registry ---------------------------------------------------------------------------------------------------

def test_a_folder_s_members_are_found_by_size_and_by_fingerprint(folder, tmp_path):
    about = family_of(folder)
    assert about is not None and about.sizes == SIZES
    for size in SIZES:
        member = load_tokenizer(folder, size=size)
        assert member.model_id == 0 and member.fingerprint().hex() == about.fingerprints[size]
        assert size_of(folder, member.fingerprint()) == size
    assert size_of(folder, load_tokenizer(folder).fingerprint()) is None
    tiny().save_pretrained(tmp_path)
    assert family_of(tmp_path) is None
    with pytest.raises(ModelError, match=r"has no family\.safetensors"):
        load_tokenizer(tmp_path, size=8)


def test_the_bundled_members_have_numbers_and_fingerprints(monkeypatch, folder, tmp_path):
    assert set(MEMBERS) == set(MODEL_IDS) - {DEFAULT_MODEL}
    monkeypatch.setattr(hub, "BUNDLED", tmp_path)
    assert set(FINGERPRINTS) == {DEFAULT_MODEL}  # an installation without the family
    (tmp_path / DEFAULT_MODEL).mkdir()
    for file in folder.iterdir():
        (tmp_path / DEFAULT_MODEL / file.name).write_bytes(file.read_bytes())
    assert set(FINGERPRINTS) == {DEFAULT_MODEL, f"{DEFAULT_MODEL}-s8", f"{DEFAULT_MODEL}-s32"}
    member = load_tokenizer(f"{DEFAULT_MODEL}-s8")
    assert member.model_id == MODEL_IDS[f"{DEFAULT_MODEL}-s8"]
    assert FINGERPRINTS[f"{DEFAULT_MODEL}-s8"] == member.fingerprint().hex()
    assert load_tokenizer(DEFAULT_MODEL, size=2).model_id == 0  # a size without a number of its own
    with pytest.raises(KeyError):
        FINGERPRINTS[f"{DEFAULT_MODEL}-s64"]
    with pytest.raises(ModelError, match="no member of 64 words"):
        load_tokenizer(f"{DEFAULT_MODEL}-s64")
    with pytest.raises(ModelError, match="is a member of a family itself"):
        load_tokenizer(f"{DEFAULT_MODEL}-s8", size=2)


def test_the_card_describes_the_bundled_family():
    data, card = ((hub.BUNDLED / DEFAULT_MODEL / name).read_bytes() for name in (FAMILY, "README.md"))
    assert hashlib.sha256(data).hexdigest() in card.decode() and f"{len(data):,} bytes" in card.decode()
    assert len(data) <= 3 * 2**20 // 2
    family = family_of(DEFAULT_MODEL)
    assert family is not None and family.base == FINGERPRINTS[DEFAULT_MODEL]
    assert family.sizes == tuple(size for _, size in MEMBERS.values())


# ---- rate control ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def rates(folder):
    codecs = [TokenCodec(load_tokenizer(folder, size=size)) for size in (*SIZES, None)]
    return RateControl(lambda quality: codecs[quality - 1], len(codecs))


def test_the_best_file_that_fits(rates):
    """Against trying all of them, for every budget from too small to more than enough."""
    image = picture()
    sizes = [len(rates.compress(image, quality)) for quality in range(1, 5)]
    assert sizes == sorted(set(sizes))  # they grow
    for budget in range(sizes[0] - 2, sizes[-1] + 3):
        fitting = [quality for quality in range(1, 5) if sizes[quality - 1] <= budget]
        if not fitting:
            with pytest.raises(ImageError, match=f"smallest file of this image has {sizes[0]} bytes, and {budget} are"):
                rates.compress_within(image, budget)
            continue
        stream, quality = rates.compress_within(image, budget)
        assert quality == fitting[-1] and stream == rates.compress(image, quality)


def test_bits_per_pixel_are_bytes(rates):
    image = picture(80, 80)
    size = len(rates.compress(image, 2))
    assert rates.compress_at(image, 8 * size / 6400)[1] == 2
    assert rates.compress_at(image, 8 * size / 6400 - 1e-4)[1] == 1
    with pytest.raises(ImageError, match="smallest file"):
        rates.compress_at(image, 1e-4)


def test_a_generous_budget_asks_for_the_best_alone():
    asked = []

    def codec_of(quality):
        asked.append(quality)
        return SimpleNamespace(compress=lambda image, *how: [bytes(10 * quality)])

    assert RateControl(codec_of, 10).compress_within(picture(), 100)[1] == 10 and asked == [10]
    asked.clear()
    assert RateControl(codec_of, 10).compress_within(picture(), 49)[1] == 4 and len(asked) <= 5


def test_qualities_there_are_not(rates):
    for quality in (0, 5):
        with pytest.raises(ConfigError, match=f"qualities 1 to 4, and {quality} is none"):
            rates.compress(picture(), quality)
    with pytest.raises(ConfigError, match="one quality"):
        RateControl(rates.codec_of, 1).codec(2)
    with pytest.raises(ConfigError, match="at least one"):
        RateControl(rates.codec_of, 0)


# ---- the command ----------------------------------------------------------------------------------------------------

@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with two pictures."""
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        Image.fromarray((picture(96, 112, i).permute(1, 2, 0) * 255).byte().numpy()).save(f"{i}.png")
    return tmp_path


def told_by(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_command_writes_what_it_was_asked_for_and_the_stream_says_which(folder, here, capsys):
    sizes = []
    for quality in (1, 2, 3, 4):
        assert encode.main(["0.png", "--model", str(folder), "-q", str(quality), "--json"]) == 0
        (told,) = told_by(capsys)
        assert told["quality"] == quality and told["bytes"] == (here / "0.vtc").stat().st_size
        sizes.append(told["bytes"])
        assert decode.main(["0.vtc", "--model", str(folder), "-o", f"q{quality}.png", "--quiet"]) == 0
        capsys.readouterr()
        member = load_tokenizer(folder, size=(*SIZES, None)[quality - 1])
        (expected,) = TokenCodec(member).decompress([(here / "0.vtc").read_bytes()])
        decoded = np.array(Image.open(f"q{quality}.png"))
        assert np.abs(decoded - expected.permute(1, 2, 0).numpy() * 255).max() <= 0.5 + 1e-3
    for option, quality in ((["--bytes", str(sizes[2])], 3), (["--bytes", str(sizes[2] - 1)], 2),
                            (["--bpp", str(8 * sizes[1] / 96 / 112)], 2), (["--bpp", "9"], 4), ([], 4)):
        assert encode.main(["0.png", "1.png", "--model", str(folder), "--json", "--quiet", "-j", "2", *option]) == 0
        told = told_by(capsys)
        assert told[0]["quality"] == quality and told[0]["bytes"] == sizes[quality - 1] and len(told) == 2


def test_a_budget_that_nothing_fits_is_one_sentence(folder, here, capsys, monkeypatch):
    assert encode.main(["0.png", "--model", str(folder), "--bytes", "20"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("0.png: The smallest file of this image has ") and error.endswith("20 are allowed.\n")
    assert not (here / "0.vtc").exists()
    with open("0.png", "rb") as stdin:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stdin))
        assert encode.main(["-", "-o", "a.vtc", "--model", str(folder), "--bpp", "0.001"]) == 1
    assert "-: The smallest file" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "message"), [
    (["-q", "0"], "no whole number"), (["-q", "high"], "no whole number"), (["--bytes", "-5"], "no whole number"),
    (["--bpp", "0"], "no positive number"), (["--bpp", "nan"], "no positive number"), (["--bpp", "."], "no positive"),
    (["-q", "1", "--bytes", "5"], "not allowed with"), (["--bpp", "1", "--bytes", "5"], "not allowed with")])
def test_wrong_wishes_are_usage_errors(here, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        encode.main(["0.png", *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_quality_that_the_model_lacks(folder, here, capsys, tmp_path):
    assert encode.main(["0.png", "--model", str(folder), "-q", "5"]) == 1
    assert capsys.readouterr().err == "vtc-encode: The model has the qualities 1 to 4, and 5 is none of them.\n"
    tiny().save_pretrained(tmp_path / "single")
    assert encode.main(["0.png", "--model", "single", "-q", "2"]) == 1
    assert "one quality and no family" in capsys.readouterr().err
    assert encode.main(["0.png", "--model", "single", "-q", "1", "--json"]) == 0
    assert "quality" not in told_by(capsys)[0]


# ---- making a family ------------------------------------------------------------------------------------------------

@pytest.fixture
def material(tmp_path):
    """A model's folder and a folder of photographs of noise with an edge."""
    tiny().save_pretrained(tmp_path / "model")
    (tmp_path / "photographs").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 90, (48, 64, 3), dtype=np.uint8)
        pixels[:, 20 + 10 * i :] += 150
        Image.fromarray(pixels).save(tmp_path / "photographs" / f"{i}.png")
    return tmp_path


def make(material, *more) -> int:
    return import_module("scripts.finetune_codebook").main(
        ["--model", str(material / "model"), "--train_data_dir", str(material / "photographs"),
         "--output_dir", str(material / "run"), "--lpips_weights", str(SHARED / "weights"), "--sizes", "4", "8",
         "--resolution", "32", "--train_batch_size", "2", "--max_train_steps", "2", "--mixed_precision", "no",
         "--logging_steps", "1", "--dataloader_num_workers", "0", *more])


@needs_shared("weights")
def test_one_command_makes_a_family(material, capsys):
    assert make(material) == 0
    family = TokenizerFamily.load(material / "model" / FAMILY)
    base = load_tokenizer(material / "model")
    assert family.about.sizes == (4, 8)
    clustered = cluster_codebook(base.quantizer.codebook, (4, 8), base.token_frequencies[0].float())
    for size in (4, 8):
        member = load_tokenizer(material / "model", size=size)
        assert torch.equal(member.quantizer.codebook, clustered.codebooks[size].half().float())  # words stay
        assert not torch.equal(member.decoder.stem.weight, base.decoder.stem.weight)  # their reading does not
        assert torch.equal(member.encoder.head.weight, base.encoder.head.weight)
        assert member.token_frequencies.sum() == 2**20
        counts = torch.zeros(size, dtype=torch.int64)
        for file in sorted((material / "photographs").iterdir()):
            counts += torch.bincount(member.encode(load_image(file).tensor()[None]).indices.flatten(), minlength=size)
        order = member.token_frequencies[0][counts.argsort()]
        assert (order.diff() >= 0).all()  # the tables follow the counts

    for size in (4, 8):
        log = (material / "run" / f"member_{size}" / "train.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in log] == [1, 2]
    first = (material / "model" / FAMILY).read_bytes()
    (material / "run" / "member_4.safetensors").unlink()  # a run that was stopped before its last member
    logs = [material / "run" / f"member_{size}" / "train.jsonl" for size in (4, 8)]
    for log in logs:
        log.unlink()
    assert make(material) == 0
    assert (material / "model" / FAMILY).read_bytes() == first
    assert len(logs[0].read_text().splitlines()) == 2
    assert not logs[1].exists()  # what was finished is not trained again
    capsys.readouterr()
    assert make(material, "--learning_rate", "1") == 1
    assert "is of another recipe or base" in capsys.readouterr().err


def pretend(monkeypatch, lpips: dict[int, tuple[float, float]]) -> None:
    """Let the script measure these (tuned, untuned) LPIPS by size; the entropy is log2 of the size."""
    script = import_module("scripts.finetune_codebook")
    seen = []

    def evaluate(model, pictures, judge):
        size = model.quantizer.codebook_size
        seen.append(size)
        return {"lpips_alex": lpips[size][seen.count(size) - 1], "codebook_entropy_bits": float(np.log2(size))}

    monkeypatch.setattr(script, "evaluate", evaluate)


@needs_shared("weights")
def test_a_member_keeps_what_tuning_made_better(material, monkeypatch):
    pretend(monkeypatch, {4: (0.6, 0.7), 8: (0.5, 0.45), 64: (0.4, 0.4)})
    assert make(material, "--validation_data_dir", str(material / "photographs")) == 0
    base, tuned, untuned = (load_tokenizer(material / "model", size=size) for size in (None, 4, 8))
    assert not torch.equal(tuned.decoder.stem.weight, base.decoder.stem.weight)
    assert torch.equal(untuned.decoder.stem.weight, base.decoder.stem.weight)
    assert len(untuned.token_frequencies.unique()) > 1  # counted, not those of a new model
    report = json.loads((material / "run" / "report.json").read_text())
    assert [report[size]["tuned"] for size in ("4", "8", "64")] == [True, False, False]
    assert [report[size]["lpips_alex"] for size in ("4", "8", "64")] == [0.6, 0.45, 0.4]


@needs_shared("weights")
def test_a_family_out_of_order_is_not_written(material, capsys, monkeypatch):
    pretend(monkeypatch, {4: (0.5, 0.6), 8: (0.5, 0.6), 64: (0.4, 0.4)})
    assert make(material, "--validation_data_dir", str(material / "photographs")) == 1
    assert "lpips_alex does not get smaller from 4 to 8 words (0.5000 to 0.5000)" in capsys.readouterr().err
    assert not (material / "model" / FAMILY).exists() and (material / "run" / FAMILY).exists()
    assert json.loads((material / "run" / "report.json").read_text())["64"]["lpips_alex"] == 0.4


def test_what_families_are_not_made_of(material, capsys):
    assert make(material, "--train_data_dir", str(material / "model")) == 1
    assert "There are no pictures in" in capsys.readouterr().err


# ---- the report -----------------------------------------------------------------------------------------------------

def test_the_rates_script_measures_whole_files(folder, here, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    family = TokenizerFamily.load(folder / FAMILY)
    family.members[8]["decoder.stem.bias"] = family.members[8]["decoder.stem.bias"] + 1
    family.save(here / "other.safetensors")
    monkeypatch.syspath_prepend(ROOT / "scripts")  # as when it is run: scripts import their neighbours
    script = import_module("evaluate_rates")
    run = ["--model", str(folder), "--images", str(here), "--output", "out", "--compare", "jpeg2000", "--downsample",
           "1", "2", "--targets", "0.2", "2", "--also", "other=other.safetensors", "--quiet"]
    assert script.main(run) == 0
    report = json.loads((here / "out" / "rates.json").read_text())
    points = {(p["curve"], p["setting"]): p for p in report["points"]}
    for quality, size in enumerate(SIZES, 1):
        codec = TokenCodec(load_tokenizer(folder, size=size))
        total = sum(len(codec.compress(load_image(f"{i}.png").tensor()[None])[0]) for i in range(2))
        assert points["ours", f"q{quality}"]["bpp"] == pytest.approx(8 * total / 2 / 96 / 112)
    assert [setting for curve, setting in points if curve == "ours"] == ["q1", "q2", "q3", "q4"]
    assert [setting for curve, setting in points if curve == "other"] == ["q2"]  # the others draw the same
    assert points["other", "q2"]["bpp"] == points["ours", "q2"]["bpp"]
    assert points["other", "q2"]["psnr"] != points["ours", "q2"]["psnr"]
    for (curve, setting), point in points.items():
        if curve.startswith("jpeg2000"):
            assert point["bpp"] <= float(setting)
    assert (here / "out" / "rates.svg").read_text().count("<svg") == 1
    assert "| ours | q1 | 2 |" in (here / "out" / "rates.md").read_text()
    before = (here / "out" / "rates.json").read_text()
    assert script.main([*run, "--reuse", "out/rates.csv"]) == 0
    after = json.loads((here / "out" / "rates.json").read_text())
    for old, new in zip(json.loads(before)["points"], after["points"], strict=True):
        assert {k: v for k, v in old.items() if "seconds" not in k} == {k: v for k, v in new.items()
                                                                       if "seconds" not in k}
    table = (here / "out" / "rates.csv").read_text().splitlines()
    first = [line for line in table if not line.startswith("1.png")]  # a run that was stopped after one picture
    (here / "out" / "rates.csv").write_text("\n".join(first) + "\n")
    assert script.main([*run, "--resume"]) == 0
    assert [line.split(",")[:6] for line in (here / "out" / "rates.csv").read_text().splitlines()] == [
        line.split(",")[:6] for line in table]
    assert script.main([*run[:1], str(here), *run[2:]]) == 1
    assert "has no family" in capsys.readouterr().err
