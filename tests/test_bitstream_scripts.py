"""The scripts around the bitstream: fitting tables to images, and a short attack."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from collections import Counter
from importlib import import_module

import numpy as np
import pytest
import torch

from vtc.cli import decode
from vtc.codecs import chunks, container
from vtc.codecs.container import Coder
from vtc.codecs.entropy import StaticTables
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import ModelError, VtcError
from vtc.images import load_image, save_image, to_tensor
from vtc.models import FINGERPRINTS, MODEL_IDS, RETIRED_IDS, load_tokenizer
from vtc.tokenizers.local_vq import LocalVQ

fit_tables = import_module("scripts.fit_tables")
fuzz_bitstream = import_module("scripts.fuzz_bitstream")
fuzz_coverage = import_module("scripts.fuzz_coverage")


@pytest.fixture
def model_and_images(tmp_path):
    """A tiny random model, and four pictures with large flat parts."""
    torch.manual_seed(0)
    model = LocalVQ(codebook_size=64, dim=4, encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8, 8))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for n in range(4):
        picture = torch.full((3, 128, 160), n / 4)
        picture[:, :32] = torch.rand(3, 32, 160)
        save_image(picture, tmp_path / "images" / f"{n}.png")
    return tmp_path / "model", tmp_path / "images"


def test_tables_are_counted_written_and_used(model_and_images, tmp_path, capsys):
    folder, images = model_and_images
    before = load_tokenizer(folder)
    assert fit_tables.main(["--model", str(folder), "--images", str(images), "--validate", str(images),
                            "--output", str(tmp_path / "fitted"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    after = load_tokenizer(tmp_path / "fitted")

    pictures = [to_tensor(load_image(p).pixels)[None] for p in sorted(images.iterdir())]
    counted = Counter(int(i) for x in pictures for i in before.encode(x).indices.flatten())
    tokens = counted.total()
    table = after.get_buffer("token_frequencies")[0].tolist()
    assert sum(table) == 2**20 and len(table) == 64
    for word, frequency in enumerate(table):  # proportional to count + 1/2, to the units that rounding down leaves
        assert 0 <= frequency - int(2**20 * (counted[word] + 0.5) / (tokens + 32)) <= 64

    expected = -sum(c * math.log2(c / tokens) for c in counted.values()) / tokens
    assert facts["tokens"] == tokens == 4 * 80
    assert facts["entropy_bits"] == pytest.approx(expected, abs=1e-9)
    assert facts["perplexity"] == pytest.approx(2**expected, abs=1e-6)
    assert facts["usage"] == len(counted) / 64
    assert expected < facts["fitted_bits_per_index"] < facts["fitted_packed_bits_per_index"] == 6
    assert facts["validation_bits_per_index"] == facts["fitted_bits_per_index"]
    assert facts["fingerprint"] == after.fingerprint().hex() != before.fingerprint().hex()

    for old, new in zip(TokenCodec(before).compress(pictures[0]), TokenCodec(after).compress(pictures[0]), strict=True):
        assert container.parse(new).coder == Coder.STATIC_ANS and len(new) < len(old)


def test_tables_in_place_keep_everything_else(model_and_images):
    folder, images = model_and_images
    before = load_tokenizer(folder).state_dict()
    assert fit_tables.main(["--model", str(folder), "--images", str(images)]) == 0
    after = load_tokenizer(folder).state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"token_frequencies"}


def test_a_model_that_cannot_hold_such_tables_is_left_alone(model_and_images, tmp_path, capsys):
    folder, _ = model_and_images
    with pytest.raises(VtcError):
        fit_tables.write(str(folder), tmp_path / "out", StaticTables(np.full((2, 64), 2)))
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    assert fit_tables.main(["--model", str(folder), "--images", str(tmp_path / "empty")]) == 1
    assert "There are no pictures" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "kind", "shape"), [("groups", "group", 3), ("scales", "scale", 10),
                                                     ("scales", "one", 1), ("grid", "one", 1), ("groups", "scale", 3)])
def test_counts_of_every_layout(name, kind, shape):
    tokenizer = fuzz_bitstream.TINY_TOKENIZERS[name]()
    tokens = [tokenizer.encode(torch.rand(1, 3, 50, 70, generator=torch.Generator().manual_seed(n))) for n in range(2)]
    counts = fit_tables.count(tokens, kind)
    assert len(counts) == shape
    assert sum(c.sum() for c in counts) == sum(t.indices.numel() for t in tokens)
    tables = StaticTables(np.stack([fit_tables.row_of(c, max(map(len, counts))) for c in counts]))
    for number, (where, group, _) in enumerate(tables.runs(tokens[0].layout)):
        found = Counter(int(i) for t in tokens for i in t.indices[0, where, group].flatten())
        assert {w: int(c) for w, c in enumerate(counts[number]) if c} == found


def test_a_short_attack_of_every_kind(capsys):
    assert fuzz_bitstream.main(["--iterations", "20", "--seed", "7"]) == 0
    said = capsys.readouterr().out
    assert ", 0 violations, " in said
    left_out = {"latents"} if "latents are left out" in said else set()
    cases = dict(re.findall(r"^(\S+) +([0-9]+) cases, 0 violations", said, re.M))
    assert cases == {kind: "20" for kind in fuzz_bitstream.KINDS if kind not in left_out}


def test_the_attack_notices_a_defect(capsys, monkeypatch):
    """Anything but the typed errors is reported, and the run fails."""
    sound = TokenCodec.receive

    def defective(codec, stream):
        if len(stream) == 31:  # as long as no valid stream of the corpus is
            raise KeyError("defect")
        return sound(codec, stream)

    monkeypatch.setattr(TokenCodec, "receive", defective)
    assert fuzz_bitstream.main(["--iterations", "300", "--kinds", "packed"]) == 1
    assert "VIOLATION KeyError: 'defect'" in capsys.readouterr().err


def test_the_attack_notices_damage_that_passes(capsys, monkeypatch):
    """With a reader that believes every checksum, wrong tokens come out, and the attack says so."""
    monkeypatch.setattr(container.zlib, "crc32", lambda data, start=0: 0)
    assert fuzz_bitstream.main(["--iterations", "100", "--kinds", "packed", "chunks-8"]) == 1
    assert capsys.readouterr().err.count("damage passed for what was encoded") > 2


def test_the_attack_notices_a_command_that_reaches_out(capsys, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").write_text("")
    monkeypatch.setattr(decode, "name_of", lambda model_id: open(tmp_path / "elsewhere").close())
    assert fuzz_bitstream.main(["--iterations", "20", "--kinds", "commands"]) == 1
    assert re.search("vtc-decode reached for open .*elsewhere", capsys.readouterr().err)


def test_sealing_makes_damaged_streams_pass_their_checks():
    codec = TokenCodec(fuzz_bitstream.TINY_TOKENIZERS["grid"]())
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    (whole,), (parts,) = codec.compress(picture), codec.compress(picture, resilience=3)
    for stream in (whole, parts):
        assert fuzz_bitstream.seal(stream) == fuzz_bitstream.Parts.of(stream).to_bytes() == stream
    assert container.parse(fuzz_bitstream.seal(whole[:-4] + bytes(4))) == container.parse(whole)
    at = len(parts) - parts.rindex(parts[:3]) + 3  # behind the header, index and shortfall: the first chunk's payload
    damaged = parts[:at] + bytes((parts[at] ^ 1,)) + parts[at + 1 :]
    assert chunks.parse(damaged).lost == (0,)
    assert chunks.parse(fuzz_bitstream.seal(damaged)).lost == ()


def test_a_model_id_is_a_number_of_the_table_and_nothing_else(monkeypatch):
    """Whatever id and fingerprint a stream names: a bundled model, or a sentence. No path is made of either."""
    monkeypatch.setattr(decode, "in_streams", lambda known, name, learned: bytes.fromhex(known))
    rng, codec = random.Random(0), TokenCodec(fuzz_bitstream.TINY_TOKENIZERS["grid"]())
    header = container.parse(codec.compress(torch.zeros(1, 3, 16, 16))[0])
    known = {bytes.fromhex(fingerprint): name for name, fingerprint in FINGERPRINTS.items()}
    for model_id in (*range(300), *(rng.getrandbits(32) for _ in range(300)), 2**32 - 1):
        for fingerprint in (b"../../x\0", b"http://x", b"a/b.json", rng.randbytes(8), *known):
            named = dataclasses.replace(header, model_id=model_id, fingerprint=fingerprint)
            expected = next((name for name, number in MODEL_IDS.items() if number == model_id), None)
            if model_id == 0:
                expected = known.get(fingerprint)
            if expected is None:
                retired = next((name for name, number in RETIRED_IDS.items() if number == model_id), "")
                with pytest.raises(ModelError, match=rf"{retired}.*does not ship; give the model's folder by --model"):
                    decode._bundled_model(named)
            else:
                assert decode._bundled_model(named) == expected


@pytest.fixture(scope="module")
def fuzz():
    return fuzz_coverage.Fuzz()


def test_coverage_guided_fuzzing_starts_from_the_same_cases(fuzz, tmp_path):
    """Without atheris: its entry point takes the seeds and what its mutator makes of them."""
    assert fuzz.write_seeds(tmp_path) > 50
    seeds = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    for number, seed in enumerate(seeds[::8]):
        fuzz(seed)
        mutated = fuzz.mutate(lambda data, size: data[::-1], seed, 500, number)
        assert len(mutated) <= 500 and mutated == fuzz.mutate(lambda data, size: data[::-1], seed, 500, number)
        fuzz(mutated)


def test_coverage_guided_fuzzing_notices_a_defect(fuzz, monkeypatch):
    monkeypatch.setattr(container, "check_limits", lambda *_: {}["defect"])
    with pytest.raises(KeyError):
        fuzz(fuzz.seeds[0])
