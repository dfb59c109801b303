"""Continuous latents: CompressAI's contract and numbers, exactness everywhere, streams, damage, training."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.shared import ROOT, needs_shared
from tests.tiny_tokenizers import TinyGrid
from vtc.codecs import container
from vtc.codecs.container import Coder, Container, varint
from vtc.codecs.hyperprior import EXACT, HYPER_STRIDE, MIDDLE_SCALE, Hyperprior, WholeSynthesis, scale_table
from vtc.codecs.latent_codec import LatentCodec
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import BitstreamError, ConfigError, ImageError, ModelError, VtcError
from vtc.images import load_image
from vtc.tokenizers.base import Latents
from vtc.tokenizers.patch_vae import PatchVAE, cosine_basis
from vtc.torchvision_guard import ensure_torchvision_imports

ensure_torchvision_imports()
compressai = pytest.importorskip("compressai", reason="needs the extra compressai")
CHANNELS, HYPER, QUALITIES = 12, 8, 2


def fill(synthesis: WholeSynthesis, seed: int) -> None:
    """Random weights, int8 to the brim, whose means are some steps and whose scales spread over the table."""
    generator = torch.Generator().manual_seed(seed)
    for number, shift in enumerate((7, 9, 10)):
        weight, bias = (cast(Tensor, getattr(synthesis, f"{name}_{number}")) for name in ("weight", "bias"))
        weight.copy_(torch.randint(-127, 128, weight.shape, generator=generator))
        bias.copy_(torch.randint(-(2**shift) * 8, 2**shift * 8, bias.shape, generator=generator))
        cast(Tensor, getattr(synthesis, f"shift_{number}")).fill_(shift)


def make_codec(seed: int = 0) -> LatentCodec:
    torch.manual_seed(seed)
    hyperprior = Hyperprior(CHANNELS, HYPER, 8, QUALITIES)
    fill(cast(WholeSynthesis, hyperprior.h_s), seed)
    cast(nn.Conv2d, hyperprior.h_a[-1]).weight.data.mul_(40)
    hyperprior.log_gain.data.copy_(torch.tensor([[2.0], [4.0]]).expand(QUALITIES, CHANNELS))
    codec = LatentCodec(PatchVAE(CHANNELS, 16, 2), hyperprior).eval()
    codec.update()
    return codec


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """(1, 3, H, W): smooth, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 16 + 2, width // 16 + 2, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    return make_codec()


# ---- CompressAI's contract ------------------------------------------------------------------------------------------

@torch.no_grad()
def test_likelihoods_and_strings_are_those_of_compressais_scale_hyperprior(codec):
    """Its own layers, with the same parameters, on the same z, y, scales and means: equal in every bit."""
    from compressai.models import ScaleHyperprior

    ours, x = codec.hyperprior, picture(64, 96)
    theirs = ScaleHyperprior(HYPER, CHANNELS).eval()
    entropy_bottleneck, conditional = cast(Any, theirs.entropy_bottleneck), cast(Any, theirs.gaussian_conditional)
    parameters = dict(ours.entropy_bottleneck.named_parameters())
    assert parameters.keys() == dict(entropy_bottleneck.named_parameters()).keys()
    for name, parameter in entropy_bottleneck.named_parameters():
        parameter.copy_(parameters[name])
    theirs.update(scale_table(), force=True)

    latents = codec.latents(x)
    y = latents * 16.0  # the gain of the finest quality
    amplitudes = torch.log(1 + y.abs())
    z = ours.h_a(torch.cat([amplitudes, torch.sign(y) * amplitudes], 1))
    z_hat, z_likelihoods = entropy_bottleneck(z)
    medians = ours.entropy_bottleneck.quantiles[:, 0, 1][None, :, None, None]
    means, numbers = ours.h_s(torch.round(z - medians), torch.tensor([1]))
    scales = torch.tensor(scale_table(), dtype=torch.float64)[numbers.long()].float()
    y_hat, y_likelihoods = conditional(y, scales, means)
    output = codec(x)
    torch.testing.assert_close(output["likelihoods"]["z"], z_likelihoods, rtol=0, atol=0)
    # our scales are computed in float32: one or two units in the last place
    torch.testing.assert_close(output["likelihoods"]["y"], y_likelihoods, rtol=1e-4, atol=1e-7)
    assert len(numbers.unique()) > 20 and z_hat.std() > 1  # the case says something

    coded = codec.compress(x)
    assert coded["shape"] == z.shape[-2:] == (2, 3)
    assert coded["strings"][1] == entropy_bottleneck.compress(z)  # (no z is so near to a half that log1p matters)
    assert coded["strings"][0] == conditional.compress(y, numbers.int(), means=means)
    theirs_y = conditional.decompress(coded["strings"][0], numbers.int(), means=means)
    torch.testing.assert_close(theirs_y, y_hat, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs_y / 16, ours.decompress(**coded)["y_hat"], rtol=0, atol=0)
    torch.testing.assert_close(entropy_bottleneck.decompress(coded["strings"][1], coded["shape"]), z_hat)


@torch.no_grad()
@pytest.mark.parametrize("quality", range(QUALITIES))
def test_decompress_gives_what_forward_promised(codec, quality):
    x = torch.cat([picture(64, 64, 1), picture(64, 64, 2)])
    promised, coded = codec(x, quality), codec.compress(x, quality)
    assert [len(strings) for strings in coded["strings"]] == [2, 2]
    torch.testing.assert_close(codec.decompress(**coded, quality=quality)["x_hat"], promised["x_hat"], rtol=0,
                               atol=2e-6)


@torch.no_grad()
def test_estimated_and_true_bytes_agree_within_one_per_cent():
    """Where latents are distributed as h_s says, from scales of 0.11 to 30 steps. (An outlier costs an escape, which
    no likelihood tells of.)
    """
    codec, generator = LatentCodec(PatchVAE(64, 2, 1), Hyperprior(64, 4, 2)).eval(), torch.Generator().manual_seed(0)
    codec.update()
    numbers = torch.arange(64) * 46 // 64
    cast(Tensor, codec.hyperprior.h_s.bias_2)[0, 64:] = (numbers.int() - MIDDLE_SCALE) * 2
    deviations = torch.tensor(scale_table())[numbers][None, :, None, None]
    for rows, columns in ((16, 24), (64, 96)):
        latents = torch.randn(1, 64, rows, columns, generator=generator) * deviations
        likelihoods = codec.hyperprior(latents)["likelihoods"]
        estimated = sum(-torch.log2(likelihood.double()).sum().item() for likelihood in likelihoods.values()) / 8
        (y,), (z,) = codec.hyperprior.compress(latents)["strings"]
        true = len(Container(8 * rows, 8 * columns, ((rows, columns),), 64, Coder.LATENTS,
                             varint(0) + varint(len(z)) + z + y, 0, bytes(8)).to_bytes())
        assert estimated > 5000 and abs(true / estimated - 1) < 0.01


def test_training_mode_has_noise_gradients_and_an_auxiliary_loss():
    codec = make_codec(1).train()
    output = codec(picture(64, 64))
    bits = sum(-torch.log2(likelihood).sum() for likelihood in output["likelihoods"].values())
    (bits + output["x_hat"].square().sum()).backward()
    for parameter in (codec.autoencoder.analysis, codec.hyperprior.h_a[0].weight, codec.hyperprior.log_gain,
                      codec.hyperprior.entropy_bottleneck.matrices[0]):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    before = codec.aux_loss()
    torch.optim.SGD([codec.hyperprior.entropy_bottleneck.quantiles], 0.01).zero_grad()
    before.backward()
    with torch.no_grad():
        quantiles = codec.hyperprior.entropy_bottleneck.quantiles
        quantiles -= 0.01 * quantiles.grad
    assert codec.aux_loss() < before
    assert not codec.update() and codec.update(force=True)


def test_what_does_not_fit_is_refused(codec):
    with pytest.raises(ConfigError, match="qualities 0 to 1, not"):
        codec.compress(picture(32, 32), 2)
    with pytest.raises(ConfigError, match="multiples of 4"):
        codec.hyperprior(torch.zeros(1, CHANNELS, 6, 8))
    with pytest.raises(ConfigError, match="not finite"):
        codec.hyperprior.compress(torch.full((1, CHANNELS, 4, 4), torch.nan))
    with pytest.raises(ConfigError, match="32768"):
        codec.hyperprior.compress(torch.full((1, CHANNELS, 4, 4), 1e6))
    with pytest.raises(ConfigError, match="strings of y"):
        codec.decompress([[b""]], (1, 1))
    with pytest.raises(ConfigError, match="at most 256 channels"):
        LatentCodec(PatchVAE(3, 2, 1), Hyperprior(257))
    with pytest.raises(ConfigError, match="at least one"):
        Hyperprior(4, qualities=0)
    with pytest.raises(ImageError, match="float images"):
        codec.encode_streams(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ModelError, match="call its update"):
        LatentCodec(PatchVAE(CHANNELS, 16, 1), Hyperprior(CHANNELS)).compress(picture(32, 32))


def test_without_compressai_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "compressai", None)
    with pytest.raises(ModelError, match=r"pip install 'vtc\[compressai\]'"):
        Hyperprior(4)


# ---- exactness ------------------------------------------------------------------------------------------------------

def reference(synthesis: WholeSynthesis, symbols: np.ndarray, quality: int) -> tuple[np.ndarray, np.ndarray]:
    """h_s as docs/bitstream.md says it, in int64: (means in sixteenths, numbers of scales)."""
    x = symbols.clip(-127, 127)
    for number in range(3):
        weight, shift, bias = (getattr(synthesis, f"{name}_{number}").numpy().astype(np.int64)
                               for name in ("weight", "shift", "bias"))
        height, width = x.shape[1:]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        total = sum(np.einsum("oi,ihw->ohw", weight[:, :, i, j], padded[:, i : i + height, j : j + width])
                    for i in range(3) for j in range(3))
        x = (total + bias[quality][:, None, None]) >> shift[:, None, None]
        if number < 2:
            channels = len(x) // 4
            x = x.clip(0, 255).reshape(channels, 2, 2, height, width).transpose(0, 3, 1, 4, 2)
            x = x.reshape(channels, 2 * height, 2 * width)
    means, scales = np.split(x.clip(-32767, 32767), 2)
    return means, (((scales + 1) >> 1) + 24).clip(0, 63)


@pytest.mark.parametrize("seed", range(3))
def test_h_s_equals_a_reference_in_int64(seed):
    synthesis = WholeSynthesis(CHANNELS, HYPER, 8, QUALITIES)
    fill(synthesis, seed)
    symbols = torch.randint(-200, 201, (2, HYPER, 5, 3), generator=torch.Generator().manual_seed(seed))
    means, numbers = synthesis(symbols.float(), torch.tensor([0, 1]))
    for n in range(2):
        wanted = reference(synthesis, symbols[n].numpy(), n)
        assert np.array_equal((means[n] * 16).numpy(), wanted[0])
        assert np.array_equal(numbers[n].numpy(), wanted[1])
    assert len(numbers.unique()) > 20


def test_h_s_without_weights_gives_the_middle_scale():
    means, numbers = WholeSynthesis(3, 4, 2, 1)(torch.ones(1, 4, 2, 2), torch.tensor([0]))
    assert means.shape == numbers.shape == (1, 3, 8, 8)
    assert not means.any() and (numbers == MIDDLE_SCALE).all()


def test_threads_half_precision_and_autocast_change_no_symbol(codec):
    streams = [stream for quality in range(QUALITIES) for stream in codec.encode_streams(picture(96, 160), quality)]
    wanted = [codec.symbols(stream) for stream in streams]
    assert all(symbols.unique().numel() > 5 for symbols in wanted)
    half = copy.deepcopy(codec).bfloat16()  # the fingerprint was taken before
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for model in (codec, half):
                assert all(torch.equal(model.symbols(s), w) for s, w in zip(streams, wanted, strict=True))
            with torch.autocast("cpu", torch.bfloat16):
                assert all(torch.equal(codec.symbols(s), w) for s, w in zip(streams, wanted, strict=True))
    finally:
        torch.set_num_threads(threads)
    exact, rough = (model.decode_streams(streams[-1:])[0] for model in (codec, half))
    assert rough.dtype == torch.float32 and (exact - rough).abs().mean() < 0.02  # pixels do differ
    (again,) = half.encode_streams(picture(96, 160), 0)  # and what a half-precision encoder writes, any other reads
    assert torch.equal(codec.symbols(again), half.symbols(again))


def test_another_process_with_plain_instructions_reads_the_same_symbols(codec, tmp_path):
    codec.save_pretrained(tmp_path / "codec")
    saved = LatentCodec.from_pretrained(tmp_path / "codec")
    (stream,) = saved.encode_streams(picture(96, 160))
    (tmp_path / "stream").write_bytes(stream)
    program = ("import sys, torch\nfrom vtc.codecs.latent_codec import LatentCodec\n"
               "codec = LatentCodec.from_pretrained(sys.argv[1] + '/codec')\n"
               "assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT' and torch.get_num_threads() == 2\n"
               "symbols = codec.symbols(open(sys.argv[1] + '/stream', 'rb').read())\n"
               "sys.stdout.buffer.write(symbols.numpy().astype('<i4').tobytes())")
    plain = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "2",
             "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(tmp_path)], env=plain,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == saved.symbols(stream).numpy().astype("<i4").tobytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reads_the_same_symbols(codec):
    (stream,) = codec.encode_streams(picture(96, 160))
    wanted = codec.symbols(stream)
    assert torch.equal(copy.deepcopy(codec).cuda().symbols(stream).cpu(), wanted)


def test_sums_that_might_not_be_exact_are_refused(codec):
    for name, value in (("weight_1", 127), ("bias_2", EXACT)):
        broken = copy.deepcopy(codec)
        if name == "weight_1":  # 9 * 8 * 127 * 255 is not enough; the bias is what is missing to 2^24
            cast(Tensor, broken.hyperprior.h_s.bias_1).fill_(EXACT - 9 * 8 * 127 * 255)
        cast(Tensor, getattr(broken.hyperprior.h_s, name)).fill_(value)
        with pytest.raises(ModelError, match="only sums below 16777216 are exact"):
            broken.compress(picture(32, 32))


@pytest.mark.parametrize("damage", ["lengths", "rise", "end", "type", "rows"])
def test_tables_that_rans_cannot_trust_are_refused(codec, damage):
    broken = copy.deepcopy(codec).hyperprior
    model = broken.gaussian_conditional
    if damage == "lengths":
        model._cdf_length[3] = model._quantized_cdf.shape[1] + 1
    elif damage == "rise":
        model._quantized_cdf[3, 2] = model._quantized_cdf[3, 1]
    elif damage == "end":
        model._quantized_cdf[3, model._cdf_length[3] - 1] += 1
    elif damage == "type":
        model._offset = model._offset.float()
    else:
        model._offset = model._offset[:-1]
    with pytest.raises(ModelError, match="tables"):
        broken.check_tables()


# ---- streams --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(1, 1), (33, 17), (64, 100)])
def test_streams_have_the_true_size_and_the_pixels_of_forward(codec, size):
    x = picture(*size)
    for quality in range(QUALITIES):
        (stream,) = codec.encode_streams(x, quality)
        (image,) = codec.decode_streams([stream])
        assert image.shape == (3, *size)
        torch.testing.assert_close(image, codec(x, quality)["x_hat"][0], rtol=0, atol=2e-6)
        whole = codec.decompress(**codec.compress(x, quality), quality=quality)["x_hat"]
        assert all(n % (8 * HYPER_STRIDE) == 0 for n in whole.shape[-2:])
    parsed = container.parse(stream)
    assert (parsed.coder, parsed.groups, parsed.height, parsed.width) == (Coder.LATENTS, CHANNELS, *size)


def sealed(stream: bytes) -> bytes:
    return stream[:-4] + zlib.crc32(stream[:-4]).to_bytes(4, "little")


def test_other_models_and_other_streams_are_refused(codec):
    (stream,) = codec.encode_streams(picture(32, 32))
    with pytest.raises(ModelError, match="another model"):
        make_codec(1).decode_streams([stream])
    tables = copy.deepcopy(codec)
    tables.hyperprior.gaussian_conditional._quantized_cdf[5, 1] += 1
    tables._fingerprint = None
    with pytest.raises(ModelError, match="another model"):  # the tables are part of the fingerprint
        tables.decode_streams([stream])
    tokens = TokenCodec(TinyGrid())
    with pytest.raises(BitstreamError, match="holds tokens, not latents"):
        codec.decode_streams(tokens.compress(picture(32, 32)))
    with pytest.raises(BitstreamError, match="holds tokens, not latents"):  # in chunks, too
        codec.decode_streams(TokenCodec(TinyGrid()).compress(picture(32, 32), resilience=2))
    parsed = container.parse(stream)
    cut = Container(32, 32, parsed.scales, parsed.groups, Coder.LATENTS, parsed.payload[:5], 0, parsed.fingerprint)
    with pytest.raises(BitstreamError, match="5 bytes of latents end before"):
        codec.decode_streams([cut.to_bytes()])
    own = Container(32, 32, ((2, 2),), 1, Coder.LATENTS, parsed.payload, 0, tokens.fingerprint).to_bytes()
    with pytest.raises(ModelError, match="continuous latents, not tokens"):
        tokens.decompress([own])
    with pytest.raises(BitstreamError, match="limit of 100 pixels"):
        LatentCodec(codec.autoencoder, codec.hyperprior, max_pixels=100).decode_streams([stream])


def test_every_damaged_byte_is_found(codec):
    (stream,) = codec.encode_streams(picture(24, 24))
    for at in range(len(stream)):
        with pytest.raises(BitstreamError):
            codec.decode_streams([stream[:at] + bytes((stream[at] ^ 0x10,)) + stream[at + 1 :]])
        with pytest.raises(BitstreamError):
            codec.decode_streams([stream[:at]])


def test_the_limit_of_memory_counts_what_padding_adds(codec):
    """At stride 8, a picture 8 x 2^20 pixels has 2^17 x 12 latents, and four times as many when padded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(container, "MAX_INDICES", 2**21)
        stream = Container(8, 2**20, ((1, 2**17),), CHANNELS, Coder.LATENTS, b"\0\0", 0, codec.fingerprint()).to_bytes()
        with pytest.raises(BitstreamError, match=f"{4 * 2**17 * CHANNELS} indices exceeds the limit"):
            codec.decode_streams([stream])
        with pytest.raises(ImageError, match="exceeds the limit"):
            codec.encode_streams(torch.zeros(1, 3, 1, 1).expand(1, 3, 8, 2**20))


def test_hostile_payloads_are_errors_and_not_crashes(codec):
    """With a right checksum: only what is exactly the code of some latents decodes."""
    rng, (stream,) = random.Random(0), codec.encode_streams(picture(64, 64))
    parsed = container.parse(stream)
    strings = codec.compress(picture(64, 64))["strings"]
    (y,), (z,) = strings
    payloads = [b"", b"\1", b"\xff" * 9, varint(2) + varint(len(z)) + z + y, varint(1) + varint(2**31) + z + y,
                varint(1) + varint(len(z)) + z, varint(1) + varint(0) + z + y, parsed.payload + b"\0" * 4,
                varint(1) + varint(len(z)) + z + y[:-4], varint(1) + varint(len(z)) + z + b"\xff" * 4096,
                varint(1) + varint(4096) + b"\xff" * 4096 + y]
    for _ in range(60):
        mutated = bytearray(parsed.payload)
        for _ in range(rng.choice((1, 1, 3))):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        payloads.append(bytes(mutated))
        payloads.append(varint(1) + varint(len(z)) + z + rng.randbytes(rng.randrange(4000)))
    refused = 0
    for payload in payloads:
        made = Container(parsed.height, parsed.width, parsed.scales, parsed.groups, Coder.LATENTS, payload, 0,
                         parsed.fingerprint).to_bytes()
        try:
            codec.symbols(made)
        except BitstreamError:
            refused += 1
    assert refused > 0.4 * len(payloads)  # some mutations are the code of other latents
    for payload in payloads[:11]:
        with pytest.raises(BitstreamError):
            codec.symbols(Container(parsed.height, parsed.width, parsed.scales, parsed.groups, Coder.LATENTS, payload,
                                    0, parsed.fingerprint).to_bytes())


def test_headers_that_do_not_fit_the_model_are_refused(codec):
    (stream,) = codec.encode_streams(picture(64, 64))
    parsed = container.parse(stream)
    for scales, groups in ((((8, 8),), CHANNELS - 1), (((4, 4),), CHANNELS), (((64, 1),), CHANNELS)):
        with pytest.raises(ModelError, match="not laid out"):
            codec.decode_streams([Container(64, 64, scales, groups, Coder.LATENTS, parsed.payload, 0,
                                            parsed.fingerprint).to_bytes()])


GOLDEN = ROOT / "tests" / "golden" / "latents_v1.json"


def golden_hyperprior() -> Hyperprior:
    """Every number that decoding reads is a whole one and comes from arithmetic, no table from a float."""
    hyperprior = Hyperprior(3, 2, 2, 2)
    for name, tensor in cast(WholeSynthesis, hyperprior.h_s).named_buffers():
        tensor.copy_((torch.arange(tensor.numel()) * 37 % 101 - 50 if "shift" not in name
                      else torch.full((tensor.numel(),), 4)).view(tensor.shape))
    for model, rows in ((hyperprior.entropy_bottleneck, 2), (hyperprior.gaussian_conditional, 64)):
        middle = torch.arange(1, 8) * 4096 + 16384
        row = torch.cat([torch.tensor([0]), middle, torch.tensor([65000, 65536])])
        model._quantized_cdf = (row[None] + torch.arange(rows)[:, None] * (row % 4096 == 0) * (row > 0)
                                * (row < 65536)).int()
        model._cdf_length = torch.full((rows,), len(row), dtype=torch.int32)
        model._offset = torch.full((rows,), -4, dtype=torch.int32)
    hyperprior.log_gain.data.fill_(1.0)
    return hyperprior.eval()


def test_golden_bytes():
    """The streams of version 1 that hold latents decode for ever to the same symbols."""
    codec = LatentCodec(PatchVAE(3, 2, 1), golden_hyperprior())
    for name, tensor in codec.autoencoder.state_dict().items():
        tensor.copy_((torch.arange(tensor.numel()) % 5 - 2).view(tensor.shape) / 8)
        assert name
    golden = json.loads(GOLDEN.read_text())
    for entry in golden:
        symbols = codec.symbols(bytes.fromhex(entry["stream"]))
        assert symbols.flatten().tolist() == entry["symbols"]
    assert {entry["quality"] for entry in golden} == {0, 1}


class RansReader:
    """CompressAI's strings as docs/bitstream.md says them, in Python integers."""

    def __init__(self, string: bytes) -> None:
        self.words = np.frombuffer(string, dtype="<u4").tolist()
        self.state = self.words[0] | self.words[1] << 32
        self.words = self.words[2:]

    def refill(self) -> None:
        if self.state < 2**31:
            self.state = self.state << 32 | (self.words.pop(0) if self.words else 0)

    def digit(self) -> int:
        value, self.state = self.state % 16, self.state // 16
        self.refill()
        return value

    def symbol(self, row: list[int], offset: int) -> int:
        q = self.state % 2**16
        i = next(i for i in range(len(row)) if row[i] <= q < row[i + 1])
        self.state = self.state // 2**16 * (row[i + 1] - row[i]) + q - row[i]
        self.refill()
        if i == len(row) - 2:  # an escape
            count = digit = self.digit()
            while digit == 15:
                digit = self.digit()
                count += digit
            v = sum(self.digit() << 4 * n for n in range(count))
            i = i + v // 2 if v % 2 == 0 else -(v // 2) - 1
        return i + offset


def read_string(string: bytes, model: Any, numbers: list[int]) -> list[int]:
    reader = RansReader(string)
    rows = [row[:length].tolist() for row, length in zip(model._quantized_cdf, model._cdf_length, strict=True)]
    symbols = [reader.symbol(rows[n], int(model._offset[n])) for n in numbers]
    assert not reader.words
    return symbols


def read_stream(stream: bytes, hyperprior: Hyperprior) -> list[int]:
    """The symbols of y, by docs/bitstream.md alone. All numbers of these streams' payloads have one byte but z's."""
    parsed = container.parse(stream)
    ((rows, columns),) = parsed.scales
    rows, columns = -(-rows // 4), -(-columns // 4)
    quality, length = parsed.payload[0], parsed.payload[1]
    assert length < 128
    z, y = parsed.payload[2 : 2 + length], parsed.payload[2 + length :]
    channels = hyperprior.settings["hyper_channels"]
    numbers = [n for n in range(channels) for _ in range(rows * columns)]
    symbols = np.array(read_string(z, hyperprior.entropy_bottleneck, numbers)).reshape(channels, rows, columns)
    _, scales = reference(cast(WholeSynthesis, hyperprior.h_s), symbols, quality)
    return read_string(y, hyperprior.gaussian_conditional, scales.flatten().tolist())


def test_streams_are_what_the_format_says(codec):
    hyperprior = golden_hyperprior()
    for entry in json.loads(GOLDEN.read_text()):  # with escapes
        assert read_stream(bytes.fromhex(entry["stream"]), hyperprior) == entry["symbols"]
        assert {40, -300} <= set(entry["symbols"])
    (stream,) = codec.encode_streams(picture(20, 30))
    assert read_stream(stream, codec.hyperprior) == codec.symbols(stream).flatten().tolist()


# ---- models on disk -------------------------------------------------------------------------------------------------

def test_a_codec_on_disk_decodes_what_it_encoded(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    first, second = LatentCodec.from_pretrained(tmp_path), LatentCodec.from_pretrained(tmp_path)
    (stream,) = first.encode_streams(picture(40, 70))
    assert torch.equal(second.decode_streams([stream])[0], first.decode_streams([stream])[0])
    likelihoods = first(picture(40, 70))["likelihoods"]  # bounds of 1e-9 survive files in float16
    assert all((likelihood > 0).all() for likelihood in likelihoods.values())
    config = json.loads((tmp_path / "config.json").read_text())
    config["autoencoder"]["kind"] = "os.system"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(VtcError, match="PatchVAE, DiffusersAutoencoder"):
        LatentCodec.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "ScaleConsistentVAE"])
def test_kl_vaes_of_diffusers(kind, tmp_path):
    from vtc.tokenizers.diffusers_adapters import AUTOENCODERS, DiffusersAutoencoder

    torch.manual_seed(0)
    model = AUTOENCODERS[kind](down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                               block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4)
    autoencoder = DiffusersAutoencoder(model)
    hyperprior = Hyperprior(4, 4, 4)
    hyperprior.log_gain.data.fill_(4)
    codec = LatentCodec(autoencoder, hyperprior).eval()
    codec.update()
    x = picture(37, 50)
    (stream,) = codec.encode_streams(x)
    (image,) = codec.decode_streams([stream])
    assert image.shape == (3, 37, 50)
    values = codec.latents(x)
    rows, columns = (-(-n // autoencoder.downsample) for n in (37, 50))
    rounded = Latents(torch.round(values[..., :rows, :columns] * 16) / 16, 37, 50)
    torch.testing.assert_close(image, autoencoder.decode(rounded)[0], rtol=0, atol=1e-5)
    assert torch.equal(values[..., :rows, :columns], autoencoder.encode(x).values)
    codec.save_pretrained(tmp_path)
    again = LatentCodec.from_pretrained(tmp_path)
    (stream,) = again.encode_streams(x)
    assert again.decode_streams([stream])[0].shape == (3, 37, 50)


@torch.no_grad()
def test_patch_vae_starts_as_an_orthonormal_transform_and_is_local():
    basis = cosine_basis(192).flatten(1).double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(192, dtype=torch.float64), rtol=0, atol=1e-6)
    x = torch.rand(2, 3, 19, 45)
    whole = PatchVAE(192, 8, 1).eval()
    torch.testing.assert_close(whole.decode(whole.encode(x)), x, rtol=0, atol=2e-6)
    grey = torch.full((1, 3, 16, 16), 0.75)
    first = PatchVAE(5, 8, 1).encode(grey).values[0, :, 0, 0]
    torch.testing.assert_close(first, torch.tensor([0.25 * math.sqrt(192), 0, 0, 0, 0]), rtol=0, atol=1e-5)
    model = PatchVAE(12, 8, 2).eval()
    for part in (model.encoder[-1], model.decoder[-2]):
        part.weight.normal_()
    a = torch.rand(1, 3, 16, 256)
    b = a.clone()
    b[..., 128:] = 0
    same = (model.encode(a).values == model.encode(b).values).all(dim=(0, 1, 2))
    assert same[:10].all() and not same[16:].any()
    for bad in ((2, 8, 1), (193, 8, 1), (12, 7, 1), (12, 8, 0)):
        with pytest.raises(ConfigError):
            PatchVAE(*bad)
    assert PatchVAE(**PatchVAE(6, 4, 3).arguments()).arguments() == {"channels": 6, "width": 4, "depth": 3}


# ---- training -------------------------------------------------------------------------------------------------------

def test_training_computes_what_the_integers_do():
    """In float64, where neither rounds by accident, means and numbers are equal in every bit."""
    from vtc.training.hyperprior import RoundedSynthesis

    torch.manual_seed(0)
    rounded = RoundedSynthesis(CHANNELS, HYPER, 8, QUALITIES).double()
    for parameter in rounded.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    whole = WholeSynthesis(CHANNELS, HYPER, 8, QUALITIES)
    whole.load_state_dict(rounded.whole())
    symbols, quality = torch.randint(-150, 151, (4, HYPER, 3, 5)), torch.tensor([0, 1, 1, 0])
    for ours, wanted in zip(whole(symbols.float(), quality), rounded(symbols.double(), quality), strict=True):
        assert torch.equal(ours.double(), wanted)
        assert ours.unique().numel() > 10


@torch.no_grad()
def test_training_starts_from_scales_that_follow_the_amplitudes():
    """On latents whose deviation changes from place to place, the first h_s beats any fixed scale a channel."""
    from vtc.training.hyperprior import make_trainable, start_from

    torch.manual_seed(0)
    deviations = torch.exp(torch.randn(8, 1, 6, 6) * 1.2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    latents = torch.randn(8, 12, 24, 24) * deviations * torch.linspace(1, 4, 12)[:, None, None]
    hyperprior = Hyperprior(12, 8, 8)
    make_trainable(hyperprior)
    start_from(hyperprior, latents)
    hyperprior.eval()
    bits = -torch.log2(hyperprior(latents)["likelihoods"]["y"]).mean()
    fixed = hyperprior.gaussian_conditional(latents, latents.std((0, 2, 3), keepdim=True).expand_as(latents))[1]
    true = hyperprior.gaussian_conditional(latents, (deviations * torch.linspace(1, 4, 12)[:, None, None]))[1]
    assert -torch.log2(true).mean() < bits < -0.9 * torch.log2(fixed).mean()


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    for n in range(3):
        pixels = (picture(72, 80, n)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    return folder


def run_script(*arguments: str) -> int:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import train_hyperprior
        return train_hyperprior.main(list(arguments))
    finally:
        sys.path.pop(0)


def test_the_script_trains_a_codec_whose_cost_falls(photographs, tmp_path, capsys):
    common = ["--train_data_dir", str(photographs), "--work_dir", str(tmp_path / "run"), "--output",
              str(tmp_path / "codec"), "--channels", "6", "--width", "8", "--depth", "1", "--hyper_channels", "4",
              "--hyper_width", "4", "--resolution", "64", "--train_batch_size", "2", "--lambdas", "0.002,0.02",
              "--quantile_steps", "10", "--learning_rate", "0.01"]
    assert run_script(*common, "--max_train_steps", "40", "--validation_data_dir", str(photographs),
                      "--validation_steps", "8", "--checkpointing_steps", "20") == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    first, *_, last = (entry["validation_bpp_psnr"] for entry in log)
    for weight, before, after in zip((0.002, 0.02), first, last, strict=True):
        cost, was = (bpp + weight * 255**2 * 10 ** (-psnr / 10) for bpp, psnr in (after, before))
        assert cost < 0.95 * was
    codec = LatentCodec.from_pretrained(tmp_path / "codec")
    assert codec.fingerprint().hex() in capsys.readouterr().out
    image = load_image(photographs / "0.png").tensor()[None]
    sizes = []
    for quality, (bpp, psnr) in enumerate(last):
        (stream,) = codec.encode_streams(image, quality)
        (output,) = codec.decode_streams([stream])
        assert -10 * math.log10((output - image).square().mean().item()) > psnr - 2
        assert 8 * len(stream) / (72 * 80) < bpp * 2 + 0.2
        sizes.append(len(stream))
    assert sizes[0] < sizes[1]
    assert run_script(*common, "--max_train_steps", "41", "--resume_from_checkpoint", "latest") == 0
    assert run_script(*common, "--lambdas", "none") == 1
    assert "lambdas are numbers" in capsys.readouterr().err


def test_the_script_leaves_a_given_autoencoder_as_it_is(photographs, tmp_path):
    from vtc.tokenizers.diffusers_adapters import AutoencoderKL, DiffusersAutoencoder

    torch.manual_seed(0)
    model = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                          block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4)
    DiffusersAutoencoder(model).save_pretrained(tmp_path / "vae")
    assert run_script("--train_data_dir", str(photographs), "--work_dir", str(tmp_path / "run"), "--output",
                      str(tmp_path / "codec"), "--autoencoder", str(tmp_path / "vae"), "--hyper_channels", "4",
                      "--hyper_width", "4", "--resolution", "32", "--train_batch_size", "2", "--lambdas", "0.0001",
                      "--max_train_steps", "3") == 0
    trained = LatentCodec.from_pretrained(tmp_path / "codec")
    before = DiffusersAutoencoder.from_pretrained(tmp_path / "vae").state_dict()
    assert all(torch.equal(t, before[name]) for name, t in trained.autoencoder.state_dict().items())
    (stream,) = trained.encode_streams(picture(32, 48))
    assert trained.decode_streams([stream])[0].shape == (3, 32, 48)


@needs_shared("data", "kodak")
def test_a_kodak_picture_with_the_untrained_transform(codec):
    """Orthonormal blocks, steps of 1/16: the error is that of rounding and of the frequencies that are dropped."""
    from tests.shared import SHARED

    image = load_image(sorted((SHARED / "data" / "kodak").glob("*.png"))[22]).tensor()[None, :, :128, :192]
    (stream,) = codec.encode_streams(image)
    (output,) = codec.decode_streams([stream])
    assert -10 * math.log10((output - image).square().mean().item()) > 24
