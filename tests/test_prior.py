"""The learned prior: integers against a second implementation, alike in every setting, hostile payloads, training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.shared import SHARED, needs_shared
from vtc.codecs import container, entropy
from vtc.codecs import prior as prior_module
from vtc.codecs.container import Coder
from vtc.codecs.entropy import StaticTables
from vtc.codecs.prior import FILE, Frequencies, TokenPrior, ans_encode
from vtc.codecs.token_codec import TokenCodec
from vtc.errors import BitstreamError, ConfigError, ModelError, TrainingError
from vtc.hub import BUNDLED
from vtc.images import load_image, save_image, to_tensor
from vtc.models import DEFAULT_MODEL, load_tokenizer
from vtc.tokenizers.base import TokenLayout
from vtc.tokenizers.local_vq import LocalVQ
from vtc.training.loop import Loop
from vtc.training.prior import (
    GridCrops,
    PriorNetwork,
    PriorRecipe,
    PriorTask,
    _Bits,
    bits_per_token,
    state_of,
    tensors_of,
    to_grid,
)
from vtc.training.tokens import TokenGrids, cached_grids, token_grids, whole_pictures

bench_prior = import_module("scripts.bench_prior")
train_prior = import_module("scripts.train_prior")

BUNDLED_PRIOR = BUNDLED / DEFAULT_MODEL / FILE
GRIDS = ((6, 8), (5, 7), (1, 9), (7, 1), (2, 2), (1, 1), (17, 3))


def network(seed: int = 0, spread: float = 0.2, **options: int) -> PriorNetwork:
    """A small random network of two codebooks, with biases and corrections that are not zero."""
    torch.manual_seed(seed)
    codebooks = {size: F.normalize(torch.randn(size, 6), dim=1) * 6**0.5 for size in (8, 64)}
    made = PriorNetwork(codebooks, **({"width": 24, "depth": 2, "dim": 12, "levels": 3, "hidden": 8} | options))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return made


@lru_cache
def prior() -> TokenPrior:
    return TokenPrior(tensors_of(network()))


def smooth(grid: tuple[int, int], size: int, seed: int = 0) -> np.ndarray:
    """(L,) random indices in flat patches."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, size, (-(-grid[0] // 3), -(-grid[1] // 3)))
    flat = small.repeat(3, 0).repeat(3, 1)[: grid[0], : grid[1]]
    noisy = rng.random(grid) < 0.2
    return np.where(noisy, rng.integers(0, size, grid), flat).reshape(-1)


# ---- the prior a second time, from docs/bitstream.md, in int64 -------------------------------------------------------

class Reference:
    """Cumulative frequencies by whole-number NumPy alone, position after position."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.t = {name: tensor.numpy().astype(np.int64) for name, tensor in tensors.items()}
        self.sizes = sorted(int(name.split(".")[1]) for name in tensors if name.startswith("words."))

    def layer(self, name: str, x: np.ndarray, step: int, size: int) -> np.ndarray:
        """floor((sum over the window + bias) / 2^shift), by adding up one tap of the window after the other."""
        weight = self.t[f"{name}.weight"]
        reach = weight.shape[2] // 2
        padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach)))
        total = np.zeros((len(weight), *x.shape[1:]), dtype=np.int64)
        for i in range(weight.shape[2]):
            for j in range(weight.shape[3]):
                total += np.einsum("oc,chw->ohw", weight[:, :, i, j],
                                   padded[:, i : i + x.shape[1], j : j + x.shape[2]])
        bias = self.t[f"{name}.steps"][step] + self.t[f"{name}.sizes"][self.sizes.index(size)]
        return (total + bias[:, None, None]) >> self.t[f"{name}.shift"][:, None, None]  # rounds down, as floor

    def cumulative(self, logits: np.ndarray) -> list[int]:
        powers = self.t["powers"]
        weights = [int(powers[min((int(logits.max()) - int(v)) // 8, len(powers) - 1)]) for v in logits]
        free, total = 2**24 - len(weights), sum(weights)
        return [i + sum(weights[:i]) * free // total for i in range(len(weights))] + [2**24]

    def parts(self, grid: np.ndarray, size: int) -> list[tuple[tuple[int, int], list[int]]]:
        """((row, column), cumulative frequencies) of every token in coding order."""
        levels = len(self.t["head.steps"]) // 3
        out = [((0, 0), self.cumulative(self.t[f"word_bias.{size}"]))]
        for level in reversed(range(64)):
            stride = 2**level
            part = grid[::stride, ::stride]
            if max(part.shape) < 2:
                continue
            even = tuple(n + n % 2 for n in part.shape)
            planes = np.zeros((self.t[f"codes.{size}"].shape[1] + 1, *even), dtype=np.int64)
            for i in range(part.shape[0]):
                for j in range(part.shape[1]):
                    planes[:, i, j] = [*self.t[f"codes.{size}"][part[i, j]], 32]
            phases = [(0, 0), (1, 1), (0, 1), (1, 0)]
            for step in range(3):
                number = min(level, levels - 1) * 3 + step
                known = np.concatenate([planes[:, i::2, j::2] for i, j in phases[: step + 1]])
                total = np.clip(self.layer(f"input.{step}", known, number, size), -32767, 32767)
                n = 0
                while f"wide.{n}.weight" in self.t:
                    x = np.clip((total + 4) >> 3, 0, 255)
                    x = np.clip(self.layer(f"wide.{n}", x, number, size), 0, 255)
                    total = np.clip(total + self.layer(f"narrow.{n}", x, number, size), -32767, 32767)
                    n += 1
                h = np.clip(self.layer("head", np.clip((total + 4) >> 3, 0, 255), number, size), -127, 127)
                i0, j0 = phases[step + 1]
                for i in range(i0, part.shape[0], 2):
                    for j in range(j0, part.shape[1], 2):
                        logits = self.t[f"words.{size}"] @ h[:, i // 2, j // 2] + self.t[f"word_bias.{size}"]
                        out.append(((i * stride, j * stride), self.cumulative(logits)))
        return out


def cumulative(frequencies: Frequencies) -> np.ndarray:
    """(N, S + 1), from 0 to 2^24: where each word starts, and behind the last."""
    return frequencies.starts(np.arange(frequencies.sums.shape[1])[None])


def assert_tables_equal(tensors: dict[str, Tensor], grid: tuple[int, int], size: int) -> None:
    indices = smooth(grid, size)
    expected = Reference(tensors).parts(indices.reshape(grid), size)
    seen = [(int(p), row.tolist()) for rows, positions in TokenPrior(tensors)._parts(indices, grid, size)
            for row, p in zip(cumulative(rows), positions, strict=True)]
    assert seen == [(i * grid[1] + j, row) for (i, j), row in expected]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", (8, 64))
def test_tables_equal_a_reference_in_int64(grid, size):
    assert_tables_equal(tensors_of(network()), grid, size)


def test_tables_equal_the_reference_where_everything_saturates():
    tensors = tensors_of(network(spread=1.0))
    for name in tensors:
        if name.endswith("shift"):
            tensors[name] = torch.ones_like(tensors[name])
    assert_tables_equal(tensors, (6, 8), 64)


@pytest.mark.skipif(not BUNDLED_PRIOR.is_file(), reason="no prior is bundled")
def test_tables_of_the_bundled_prior_equal_the_reference():
    assert_tables_equal(load_file(BUNDLED_PRIOR), (5, 6), 256)


@pytest.mark.parametrize("size", (2, 3, 100, 2**15))
def test_a_frequency_is_found_alone_as_in_the_whole_table(size):
    rng = np.random.default_rng(size)
    powers = rng.integers(0, 2**20, (4, size)) * (rng.random((4, size)) < 0.3)  # most words have the least frequency
    powers[:, rng.integers(size)] = 2**20
    frequencies = Frequencies(np.concatenate([np.zeros((4, 1), int), powers.cumsum(1)], 1))
    table = cumulative(frequencies)
    assert (np.diff(table) >= 1).all() and (table[:, 0] == 0).all() and (table[:, -1] == 2**24).all()
    words = rng.integers(0, size, 4)
    low, share = frequencies.of(words)
    assert (low == table[range(4), words]).all() and (low + share == table[range(4), words + 1]).all()
    for n, row in enumerate(table):
        edges = (row[words] + [-1, 0, 1, 0]).clip(0).tolist()
        for place in {0, *edges, *rng.integers(0, 2**24, 20).tolist(), 2**24 - 1}:
            word = int(row.searchsorted(place, "right")) - 1
            assert frequencies.find(n, place) == (word, row[word], row[word + 1])


# ---- payloads -------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from((8, 64)), st.integers(0, 9))
def test_decode_inverts_encode_at_the_ideal_length(rows, columns, size, seed):
    coder, indices = prior(), smooth((rows, columns), size, seed)
    payload = coder.encode(indices, (rows, columns), size)
    assert (coder.decode(payload, (rows, columns), size) == indices).all()
    each = np.concatenate([24 - np.log2(np.diff(cumulative(table))[range(len(places)), indices[places]])
                           for table, places in coder._parts(indices, (rows, columns), size)])
    assert each.sum() == pytest.approx(coder.ideal_bits(indices, (rows, columns), size), rel=1e-12)
    # The last tokens, packed in at most 24 bits, are the coder's start, and fewer bits where they are low numbers.
    seeds = min(len(indices), 24 // {8: 3, 64: 6}[size])
    # Whole bytes, and the rounding of the state: 0.04 bits more were seen.
    assert 8 * len(payload) <= each[: len(indices) - seeds].sum() + 24 + 8 + 1
    assert 8 * len(payload) >= each[: len(indices) - seeds].sum() - 1


def test_only_tokens_that_were_decoded_are_read():
    """Frequencies do not change with what is decoded later: here nothing but zeros stands there."""
    coder, grid = prior(), (9, 6)
    indices = smooth(grid, 64)
    filled = np.zeros_like(indices)
    true = coder._parts(indices, grid, 64)
    for (rows, positions), (expected, _) in zip(coder._parts(filled, grid, 64), true, strict=True):
        assert (rows.sums == expected.sums).all()
        filled[positions] = indices[positions]
    assert (filled == indices).all()


def test_the_coder_is_that_of_static_tables():
    """With one table for all symbols, the bytes are those that constriction writes for static tables."""
    rng = np.random.default_rng(0)
    row = rng.integers(1, 2000, 100)
    row[0] += 2**20 - row.sum()
    cumulative = np.array([i + int(row[:i].sum()) * (2**24 - 100) // 2**20 for i in range(101)])
    for count in (1, 2, 5, 700):
        words = rng.integers(0, 100, count)
        expected = entropy.encode_ans(words[:, None], TokenLayout(((1, count),), (100,)), StaticTables(row[None]),
                                      seeded=True)
        assert ans_encode(cumulative[words], cumulative[words + 1] - cumulative[words], words, 100) == expected


def test_a_payload_that_decodes_is_the_one_that_its_indices_encode_to():
    """Five words of 64, the last four of which are the coder's start: codes, and the numbers around them."""
    coder, grid, rng = prior(), (1, 5), np.random.default_rng(0)
    payloads = {coder.encode(row, grid, 64): row.tolist() for row in rng.integers(0, 64, (8, 5))}
    decoded = 0
    for payload in payloads:
        number = int.from_bytes(payload, "little")
        for near in range(-12, 12):
            changed = max(0, number + near * 2**20).to_bytes(9, "little").rstrip(b"\0")
            try:
                indices = coder.decode(changed, grid, 64)
            except BitstreamError:
                continue
            decoded += 1
            assert indices.min() >= 0 and indices.max() < 64 and coder.encode(indices, grid, 64) == changed
            assert changed not in payloads or payloads[changed] == indices.tolist()
    assert len(payloads) == 8 and decoded > 8


def test_damaged_payloads_are_bitstream_errors():
    coder, grid, rng = prior(), (4, 5), np.random.default_rng(0)
    good = coder.encode(smooth(grid, 64), grid, 64)
    for payload in (good[:-1], good + b"\1", good + b"\0", b"\xff" * 500):
        with pytest.raises(BitstreamError):
            coder.decode(payload, grid, 64)
    for _ in range(30):
        payload = bytearray(good)
        payload[rng.integers(len(payload))] ^= 1 << rng.integers(8)
        try:
            indices = coder.decode(bytes(payload), grid, 64)
        except BitstreamError:
            continue
        assert coder.encode(indices, grid, 64) == payload


def test_indices_and_codebooks_that_do_not_fit_are_refused():
    coder = prior()
    for indices, grid, size in ((np.zeros(5, int), (2, 3), 8), (np.full(6, 8), (2, 3), 8), (np.full(6, -1), (2, 3), 8),
                                (np.zeros(6, int), (2, 3), 16)):
        with pytest.raises(ConfigError):
            coder.encode(indices, grid, size)
    with pytest.raises(ConfigError, match="8, 64 words, not 16"):
        coder.decode(b"", (2, 3), 16)


# ---- exact everywhere -----------------------------------------------------------------------------------------------

def test_bands_and_blocks_change_nothing(monkeypatch):
    coder, grid = prior(), (21, 13)
    indices = smooth(grid, 64)
    whole = coder.encode(indices, grid, 64)
    for band in (1, 700, 3000):
        monkeypatch.setattr(prior_module, "BAND", band)
        monkeypatch.setattr(prior_module, "TABLE", band)
        assert coder.encode(indices, grid, 64) == whole


def test_half_precision_autocast_threads_and_fast_products_change_nothing():
    tokenizer = LocalVQ(codebook_size=64, dim=6, encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8, 8))
    codec = TokenCodec(tokenizer, prior=prior())
    picture = torch.rand(1, 3, 100, 130)
    indices = tokenizer.encode(picture).indices[0, :, 0].numpy()
    payload = codec.prior.encode(indices, (7, 9), 64)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        tokenizer.bfloat16()
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads(2)
        with torch.autocast("cpu", torch.bfloat16):
            assert codec.prior.encode(indices, (7, 9), 64) == payload
            assert (codec.prior.decode(payload, (7, 9), 64) == indices).all()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    assert not isinstance(codec.prior, nn.Module)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_bytes():
    indices = smooth((32, 48), 64)
    payload = prior().encode(indices, (32, 48), 64)
    on_gpu = TokenPrior(tensors_of(network()), "cuda")
    assert on_gpu.encode(indices, (32, 48), 64) == payload
    assert (on_gpu.decode(payload, (32, 48), 64) == indices).all()


@pytest.mark.parametrize("device", ["mps", "xpu:0"])
def test_where_float64_may_be_missing_the_prior_stays_on_the_cpu(device):
    indices = smooth((9, 7), 64)
    there = TokenPrior(tensors_of(network()), device)
    assert (there.device.type, there.dtype) == ("cpu", torch.float32)
    assert there.encode(indices, (9, 7), 64) == prior().encode(indices, (9, 7), 64)


def test_float64_gives_the_same_bytes():
    """What runs on a GPU, on the CPU."""
    indices, there = smooth((20, 30), 64), TokenPrior(tensors_of(network()))
    payload = there.encode(indices, (20, 30), 64)
    place = (torch.device("cpu"), torch.float64)
    there.inputs, there.wide, there.narrow = ([layer.to(*place) for layer in layers]
                                              for layers in (there.inputs, there.wide, there.narrow))
    there.head = there.head.to(*place)
    there.codes = {size: codes.to(*place) for size, codes in there.codes.items()}
    there.words = {size: (table.to(*place), bias.to(*place)) for size, (table, bias) in there.words.items()}
    assert there.encode(indices, (20, 30), 64) == payload


def test_another_process_with_plain_instructions_decodes(tmp_path):
    coder, grid = prior(), (24, 17)
    indices = smooth(grid, 64)
    save_file(tensors_of(network()), tmp_path / "p", {"format": prior_module.FORMAT})
    (tmp_path / "payload").write_bytes(coder.encode(indices, grid, 64))
    program = ("import sys; from pathlib import Path; from vtc.codecs.prior import TokenPrior\n"
               "folder = Path(sys.argv[1])\n"
               "found = TokenPrior.load(folder / 'p').decode((folder / 'payload').read_bytes(), (24, 17), 64)\n"
               "print(found.tolist())")
    plain = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=plain, capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == indices.tolist()


@pytest.mark.parametrize("name", ("input.0", "wide.1", "narrow.0", "head"))
def test_a_sum_that_might_not_be_exact_is_refused(name):
    tensors = tensors_of(network())
    outputs = len(tensors[f"{name}.shift"])
    tensors[f"{name}.steps"] = torch.zeros(9, outputs, dtype=torch.int32)
    weights = tensors[f"{name}.weight"].long().abs().flatten(1).sum(1)
    largest = int((weights * (127 if name == "input.0" else 255) + tensors[f"{name}.sizes"].abs().amax(0)).max())
    tensors[f"{name}.steps"][4] = 2**24 - 1 - largest
    TokenPrior(tensors)
    tensors[f"{name}.steps"][4] += 1
    with pytest.raises(ModelError, match="only sums below"):
        TokenPrior(tensors)


# ---- files ----------------------------------------------------------------------------------------------------------

def test_damaged_files_are_model_errors(tmp_path):
    tensors = tensors_of(network())
    path = tmp_path / "p.safetensors"
    save_file(tensors, path, {"format": prior_module.FORMAT})
    assert TokenPrior.load(path).fingerprint == TokenPrior(tensors).fingerprint
    path.write_bytes(path.read_bytes()[:-7])
    cases = [path, tmp_path / "absent", tmp_path]
    save_file(tensors, tmp_path / "old", {"format": "vtc prior 0"})
    for case in [*cases, tmp_path / "old"]:
        with pytest.raises(ModelError):
            TokenPrior.load(case)
    for name, tensor in tensors.items():
        changed = {key: value for key, value in tensors.items() if key != name}
        with pytest.raises(ModelError):
            TokenPrior(changed)
        with pytest.raises(ModelError):
            TokenPrior({**changed, name: tensor[..., None]})
    with pytest.raises(ModelError):
        TokenPrior({**tensors, "more.weight": torch.zeros(1)})
    with pytest.raises(ModelError):
        TokenPrior({})


def test_the_fingerprint_changes_with_any_number():
    tensors = tensors_of(network())
    before = TokenPrior(tensors).fingerprint
    for name in ("words.8", "head.sizes", "powers"):
        changed = tensors[name].clone()
        changed.flatten()[-1] += 1
        assert TokenPrior({**tensors, name: changed}).fingerprint != before
    assert len(before) == 8 and TokenPrior(tensors_of(network())).fingerprint == before


# ---- training -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("grid", GRIDS[:4])
def test_training_computes_what_the_integers_do(grid):
    """In float64 the rounded network and the integers agree in every feature; so they do in bits, to 1e-3 a token:
    frequencies are cut to 1/64 of an octave and to 24 bits."""
    made = network()
    coder, indices = TokenPrior(tensors_of(made)), smooth(grid, 64)
    table = torch.from_numpy(indices.reshape(grid))
    exact = network().double()
    for level in range(4):
        part = table[:: 2**level, :: 2**level]
        for step, rounded in enumerate(exact.features(part[None], 64, level)):
            i, j = prior_module.PHASES[step + 1]
            shape = part[i::2, j::2].shape
            if 0 not in shape:
                expected = rounded[0, : shape[0], : shape[1]].flatten(0, 1) * 16
                assert (coder._features(part, step, level, 64).double() == expected).all()
    frequencies = cumulative(coder.frequencies(coder.words[64][1][None].numpy().astype(np.int32)))
    first = -np.log2(np.diff(frequencies)[0] / 2**24)
    bits = coder.ideal_bits(indices, grid, 64) - first[indices[0]]
    assert exact(table[None], 64).item() == pytest.approx(bits / (len(indices) - 1), abs=1e-2)


def test_bits_and_their_gradients_equal_cross_entropy():
    torch.manual_seed(0)
    leaves = [torch.randn(1500, 6), torch.randn(20, 6), torch.randn(20)]
    target = torch.randint(0, 20, (1500,))
    mine, plain = ([t.clone().requires_grad_() for t in leaves] for _ in range(2))
    (2 * _Bits.apply(*mine, target)).backward()
    expected = F.cross_entropy((plain[0] @ plain[1].T + plain[2]) * np.log(2), target, reduction="sum") / np.log(2)
    (2 * expected).backward()
    assert _Bits.apply(*mine, target).item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_rounding_lets_gradients_pass_where_nothing_is_cut_off():
    x = torch.tensor([-9.0, -1.3, 0.1, 0.13, 2.0, 9.0], requires_grad=True)
    y = to_grid(x, 2, -8, 8)
    y.sum().backward()
    assert y.tolist() == [-2.0, -1.25, 0.0, 0.25, 2.0, 2.0]
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]  # the limits themselves count as cut off


def test_a_prior_goes_on_with_other_codebooks():
    """The 64 words in another order give the same bits; 128, each one half of an earlier one, a bit a token more."""
    earlier, generator = network(), torch.Generator().manual_seed(1)
    order = torch.randperm(64, generator=generator)
    codebooks = {8: earlier.codes(8), 64: earlier.codes(64)[order], 128: earlier.codes(64).repeat_interleave(2, 0)}
    later = PriorNetwork(codebooks, width=24, depth=2, dim=12, levels=3, hidden=8)
    later.go_on_from(earlier.state_dict(), {size: np.full(size, 7) for size in later.sizes})
    grid = torch.from_numpy(smooth((9, 13), 64).reshape(1, 9, 13))
    bits = earlier(grid, 64).item()
    places = torch.argsort(order)
    assert later(places[grid], 64).item() == pytest.approx(bits, abs=1e-3)
    halves = torch.randint(2, grid.shape, generator=generator)
    assert later(2 * grid + halves, 128).item() == pytest.approx(bits + 1, abs=2e-2)  # the bias is rounded anew
    with pytest.raises(ConfigError, match="other widths"):
        network(width=16).go_on_from(earlier.state_dict(), {8: np.ones(8), 64: np.ones(64)})
    with pytest.raises(ConfigError, match="no codebooks"):
        earlier.go_on_from({}, {})


def test_a_finished_prior_is_gone_on_from_to_the_bit():
    whole = tensors_of(network())
    later = PriorNetwork({size: whole[f"codes.{size}"] / 32 for size in (8, 64)}, width=24, depth=2, dim=12, levels=3,
                         hidden=8)
    later.go_on_from(state_of(whole), {size: np.full(size, 7) for size in later.sizes})
    again = tensors_of(later)
    assert again.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())


def grids(count: int, seed: int) -> TokenGrids:
    """Pictures of words 0 ... 7 or of words 8 ... 15, and so on: a neighbour tells three bits."""
    rng = np.random.default_rng(seed)
    shapes = rng.integers(5, 14, (count, 2)).astype(np.int32)
    tokens = [rng.integers(0, 8, h * w) + 8 * rng.integers(0, 8) for h, w in shapes]
    return TokenGrids(shapes, {64: np.concatenate(tokens).astype(np.int16)}).mapped(64, {8: torch.arange(64) % 8})


class Stopped(Exception):
    pass


def train(folder: Path, stop_at: int | None = None, resume: bool = False) -> PriorNetwork:
    """Forty steps on a few grids, or the first of them."""
    views = [grids(40, 0)]
    made = network(spread=0.0)
    made.start_from({size: np.bincount(views[0].tokens[size], minlength=size) for size in made.sizes})
    recipe = PriorRecipe(crop=12, train_batch_size=6, max_train_steps=40, lr_warmup_steps=5, ema_decay=0.8,
                         learning_rate=1e-2, largest_share=0.8, mixed_precision="no", validation_steps=20,
                         report_to="none")
    loop = Loop(PriorTask(made, recipe, grids(8, 100)), recipe, Accelerator(cpu=True),
                GridCrops(views, made.sizes, recipe), folder)
    if resume:
        assert loop.resume("latest")
    return cast(PriorNetwork, loop.train(stop_at))


def test_training_learns_and_a_stopped_run_goes_on_to_the_same_network(tmp_path):
    whole = train(tmp_path / "a")
    counts = np.bincount(grids(40, 0).tokens[64], minlength=64) + 0.5
    unseen = grids(8, 100)
    static = -np.log2(counts / counts.sum())[unseen.tokens[64]].mean()
    assert bits_per_token(TokenPrior(tensors_of(whole)), unseen, 64) < static - 0.08
    log = [json.loads(line) for line in (tmp_path / "a" / "validation.jsonl").read_text().splitlines()]
    assert [facts["step"] for facts in log] == [20, 40]
    assert "bits_64" in log[0] and {"bits_8", "bits_64"} <= log[-1].keys()
    train(tmp_path / "b", stop_at=20)
    resumed = tensors_of(train(tmp_path / "b", resume=True))
    for name, tensor in tensors_of(whole).items():
        assert torch.equal(tensor, resumed[name]), name


def test_crops_depend_on_their_number_alone_and_pad_with_minus_one():
    recipe = PriorRecipe(crop=16, train_batch_size=4, largest_share=0.5)
    crops = GridCrops([grids(5, 0)], (8, 64), recipe)
    (a, size), (b, again) = crops[7], crops[7]
    assert torch.equal(a, b) and size == again and a.shape == (4, 16, 16)
    sizes = [crops[n][1] for n in range(200)]
    assert 60 < sizes.count(64) < 140
    for crop in a:
        inside = crop >= 0
        rows, columns = inside.any(1).sum(), inside.any(0).sum()
        assert inside[:rows, :columns].all() and not inside[rows:].any() and not inside[:, columns:].any()
        assert 1 <= rows <= 13


def test_nonsense_recipes_are_refused():
    for wrong in ({"largest_share": 0.0}, {"max_train_steps": 0}, {"crop": 1}, {"train_batch_size": 0}):
        with pytest.raises(ConfigError):
            PriorRecipe(**wrong)


# ---- token grids and the script -------------------------------------------------------------------------------------

def tiny(size: int) -> LocalVQ:
    torch.manual_seed(0)
    model = LocalVQ(codebook_size=size, dim=6, encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8, 8)).eval()
    with torch.no_grad():
        torch.manual_seed(size)
        model.encoder.head.weight.add_(torch.randn_like(model.encoder.head.weight) * 0.1)
    return model


@pytest.fixture
def photographs(tmp_path) -> list[Path]:
    (tmp_path / "photographs").mkdir()
    torch.manual_seed(1)
    paths = [tmp_path / "photographs" / f"{n}.png" for n in range(3)]
    for n, path in enumerate(paths):
        save_image(F.interpolate(torch.rand(1, 3, 9, 7 + n), size=(144, 130))[0], path)
    return paths


def test_token_grids_are_those_of_each_member(photographs, tmp_path):
    members = [tiny(64), tiny(8)]
    found = token_grids(members, whole_pictures(photographs))
    for n, path in enumerate(photographs):
        picture = to_tensor(load_image(path).pixels)[None]
        for member in members:
            (expected,) = member.encode(picture).grids()
            size = member.quantizer.codebook_size
            assert (found.grid(n, size) == expected[0, ..., 0].numpy()).all()
    views = cached_grids(tmp_path / "cache", members, photographs, 3, seed=0)
    assert (views[0].tokens[64] == found.tokens[64]).all()
    assert (views[1].shapes < found.shapes).any() and views[1].sizes == (8, 64)
    stamps = [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").iterdir())]
    again = cached_grids(tmp_path / "cache", members, photographs, 3, seed=0)
    assert all((a.tokens[8] == b.tokens[8]).all() for a, b in zip(views, again, strict=True))
    assert stamps == [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").iterdir())]
    (part,) = cached_grids(tmp_path / "cache", members[:1], photographs, 1, seed=0)  # a part of the models
    assert part.sizes == (64,) and (part.tokens[64] == found.tokens[64]).all()
    assert stamps == [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").iterdir())]
    cached_grids(tmp_path / "cache", [tiny(32)], photographs, 1, seed=0)  # other models: made anew
    assert TokenGrids.load(tmp_path / "cache" / "view-000.safetensors")[0].sizes == (32,)


def test_a_cache_leaves_out_pictures_that_cannot_be_read(photographs, tmp_path, caplog, monkeypatch):
    whole = cached_grids(tmp_path / "whole", [tiny(8)], photographs, 2, seed=0)
    broken = tmp_path / "photographs" / "broken.png"
    broken.write_bytes(photographs[0].read_bytes()[:200])
    files = [photographs[0], broken, *photographs[1:]]
    first, second = cached_grids(tmp_path / "cache", [tiny(8)], files, 2, seed=0)
    assert (first.tokens[8] == whole[0].tokens[8]).all()  # a view is drawn by the number of its file
    assert (second.grid(0, 8) == whole[1].grid(0, 8)).all() and len(second) == 3
    assert [f"{broken} is left out" in message for message in caplog.messages] == [True, True]
    monkeypatch.setattr("vtc.training.tokens.PATIENCE", 2)
    with pytest.raises(TrainingError, match="2 pictures in a row cannot be read"):
        cached_grids(tmp_path / "broken", [tiny(8)], [photographs[0], broken, broken], 1, seed=0)


def test_token_grids_refuse_what_does_not_belong_together(photographs, tmp_path):
    other = tiny(8)
    with torch.no_grad():
        other.encoder.stem.weight.add_(1)
    for members in ([tiny(64), tiny(64)], [tiny(64), other]):
        with pytest.raises(ConfigError):
            token_grids(members, whole_pictures(photographs))
    with pytest.raises(ConfigError, match="no pictures"):
        token_grids([tiny(8)], [])
    with pytest.raises(ModelError):
        TokenGrids.load(photographs[0])


def test_the_script_trains_a_prior_that_the_codec_uses(photographs, tmp_path, capsys):
    tiny(64).save_pretrained(tmp_path / "model")
    output, work = tmp_path / "model" / FILE, tmp_path / "work"
    arguments = ["--model", str(tmp_path / "model"), "--train_data_dir", str(photographs[0].parent),
                 "--validation_data_dir", str(photographs[0].parent), "--work_dir", str(work), "--output", str(output),
                 "--views", "2", "--width", "16", "--depth", "1", "--dim", "8", "--crop", "10",
                 "--train_batch_size", "4"]
    assert train_prior.main([*arguments, "--max_train_steps", "30"]) == 0
    coder = TokenPrior.from_pretrained(tmp_path / "model")
    assert f"fingerprint {coder.fingerprint.hex()}" in capsys.readouterr().out
    codec = TokenCodec(load_tokenizer(tmp_path / "model"), prior=coder)
    picture = to_tensor(load_image(photographs[0]).pixels)[None]
    (stream,) = codec.compress(picture)
    assert container.parse(stream).coder == Coder.PRIOR
    assert torch.equal(codec.decompress_tokens(stream).indices, codec.tokenizer.encode(picture).indices)
    assert bench_prior.main(["--model", str(tmp_path / "model"), "--images", str(photographs[0].parent),
                             "--output", str(tmp_path / "facts.json")]) == 0
    row = json.loads((tmp_path / "facts.json").read_text())["sizes"]["64"]
    learned = [coder.encode(codec.tokenizer.encode(to_tensor(load_image(p).pixels)[None]).indices[0, :, 0].numpy(),
                            (9, 9), 64) for p in photographs]
    assert row["prior_bytes"] == pytest.approx(np.mean([len(payload) for payload in learned]))
    assert "| 64 | " in capsys.readouterr().out
    assert train_prior.main([*arguments, "--max_train_steps", "2", "--init_from", str(work / "checkpoint-30")]) == 0
    arguments[arguments.index(str(work))] = str(tmp_path / "again")
    assert train_prior.main([*arguments, "--max_train_steps", "2", "--init_from", str(tmp_path / "model")]) == 0
    assert train_prior.main(["--model", "nothing", *arguments[2:]]) == 1
    assert "train_prior: " in capsys.readouterr().err


# ---- the bundled prior ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bundled() -> TokenPrior:
    if not BUNDLED_PRIOR.is_file():
        pytest.skip("no prior is bundled")
    return TokenPrior.from_pretrained(DEFAULT_MODEL)


@needs_shared("data", "kodak")
def test_the_bundled_prior_saves_at_least_eight_per_cent_on_a_kodak_picture(bundled):
    codec, plain = (TokenCodec(load_tokenizer(), prior=p) for p in (bundled, None))
    picture = to_tensor(load_image(sorted((SHARED / "data" / "kodak").glob("*.png"))[0]).pixels)[None]
    tokens = codec.tokenizer.encode(picture)
    stream, other = codec.compress_tokens(tokens)[0], plain.compress_tokens(tokens)[0]
    learned, static = container.parse(stream), container.parse(other)
    assert learned.coder == Coder.PRIOR != static.coder
    assert len(learned.payload) <= 0.92 * len(static.payload)
    assert torch.equal(codec.decompress_tokens(stream).indices, tokens.indices)


def test_the_bundled_prior_knows_the_whole_family_and_is_small(bundled):
    assert bundled.sizes == (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    assert BUNDLED_PRIOR.stat().st_size < 2.5 * 2**20
