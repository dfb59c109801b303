"""Training the prior of token grids: the network of `vtc.codecs.prior`, rounded in training as its whole numbers are.

Forward rounds weights, biases and activations to where the integer network has them; gradients pass straight through.
So the loss that is trained is that of the integers, and `tensors_of` only writes them down. In float64 the two agree in
every bit; float32 and bfloat16, in which training runs, may round a sum the other way now and then.

E(word) comes from the codeword by a small network and a table of corrections: words that look alike share what is
learnt, and those that are frequent may differ. b(word) starts as the log2 frequency.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import Dataset

from vtc.codecs.prior import (
    ACTIVATION,
    ACTIVATION_BITS,
    BYTE,
    CODE_BITS,
    FEATURE_BITS,
    FILE,
    FORMAT,
    LARGEST_POWER,
    LOGIT_BITS,
    OCTAVE_BITS,
    OCTAVES,
    PHASES,
    STEPS,
    TOTAL,
    TOTAL_BITS,
    WORD_BITS,
    TokenPrior,
)
from vtc.errors import ConfigError
from vtc.files import write_file
from vtc.tokenizers.vector_quantizer import nearest_codeword
from vtc.training.recipe import Recipe, flag
from vtc.training.task import Task
from vtc.training.tokens import TokenGrids

#: fractional bits that a layer's weights may have: the shift is at least 1, and biases stay far below 2^24
WEIGHT_BITS = (4, 12)
#: those of the inputs and the outputs of each kind of layer
LAYER_BITS = {"input": (CODE_BITS, TOTAL_BITS), "wide": (ACTIVATION_BITS, ACTIVATION_BITS),
              "narrow": (ACTIVATION_BITS, TOTAL_BITS), "head": (ACTIVATION_BITS, FEATURE_BITS)}


class _ToGrid(torch.autograd.Function):
    """floor(2^bits x + 1/2) / 2^bits, from `low` to `high` of them; the gradient passes but where that was cut off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, low: int, high: int) -> Tensor:
        y = x.mul(2.0**bits).add_(0.5).floor_().clamp_(low, high).mul_(2.0**-bits)
        ctx.save_for_backward(y)
        ctx.limits = low * 2.0**-bits, high * 2.0**-bits
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        (y,), (low, high) = ctx.saved_tensors, ctx.limits
        return gradients[0] * ((y > low) & (y < high)), None, None, None


def to_grid(x: Tensor, bits: int, low: int, high: int) -> Tensor:
    """x rounded to whole multiples of 2^-bits, from `low` to `high` of them."""
    return cast(Tensor, _ToGrid.apply(x, bits, low, high))


class _Bits(torch.autograd.Function):
    """Sum of -log2 softmax2(h . E + b)[target]: one pass over the scores, which are never kept.

    h (N, d), E (S, d), b (S,), targets (N,). The gradients are found on the way, in blocks of rows.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, words: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        total, gradients = h.new_zeros(()), [torch.zeros_like(t) for t in (h, words, bias)]
        for start in range(0, len(h), 1024):
            part, wanted = h[start : start + 1024], target[start : start + 1024, None]
            p = torch.addmm(bias * math.log(2), part, words.T, alpha=math.log(2)).softmax(1)
            total -= p.gather(1, wanted).clamp_(min=1e-30).log2_().sum()
            p.scatter_add_(1, wanted, p.new_full(wanted.shape, -1.0))  # the gradient: p - [word is the target]
            gradients[0][start : start + 1024] = p @ words
            gradients[1].addmm_(p.T, part)
            gradients[2] += p.sum(0)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        return (*(gradients[0] * g for g in ctx.saved_tensors), None)


class RoundedConv(nn.Conv2d):
    """A convolution whose output is floored to a grid: int8 weights with a power of two an output, biases to match.

    in_bits, out_bits: fractional bits of inputs and outputs. A bias for each step and one for each codebook are added.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, in_bits: int, out_bits: int, steps: int,
                 codebooks: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.steps = nn.Parameter(torch.zeros(steps, outputs))
        self.sizes = nn.Parameter(torch.zeros(codebooks, outputs))
        self.in_bits, self.out_bits = in_bits, out_bits

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def weight_bits(self) -> Tensor:
        """(O,): the most fractional bits with which an output's weights fit int8."""
        largest = self.weight.detach().flatten(1).abs().amax(1).clamp(min=1e-9)
        return torch.floor(torch.log2(BYTE / largest)).clamp(*WEIGHT_BITS)

    def forward(self, x: Tensor, steps: Tensor, size: int, low: int, high: int) -> Tensor:  # type: ignore[override]
        """(B, I, h, w), the step of each of B, and the number of the codebook, to (B, O, h, w)."""
        scale = torch.exp2(self.weight_bits())
        weight = _rounded(self.weight, scale.view(-1, 1, 1, 1), BYTE)
        unit = scale * 2.0**self.in_bits
        bias = _rounded(self.steps, unit)[steps] + _rounded(self.sizes[size], unit)
        y = F.conv2d(x, weight, padding=self.padding) + bias[:, :, None, None]
        return to_grid(y, self.out_bits, low, high)

    def whole(self) -> dict[str, Tensor]:
        """The tensors of `vtc.codecs.prior.Layer`. One half before the floor goes into the biases of the steps."""
        bits = self.weight_bits()
        shift = bits + self.in_bits - self.out_bits
        unit = torch.exp2(bits + self.in_bits)
        weight = torch.round(self.weight.detach() * torch.exp2(bits).view(-1, 1, 1, 1)).clamp(-BYTE, BYTE)
        steps = torch.round(self.steps.detach() * unit) + torch.exp2(shift - 1)
        return {"weight": weight.to(torch.int8), "shift": shift.to(torch.uint8), "steps": steps.to(torch.int32),
                "sizes": torch.round(self.sizes.detach() * unit).to(torch.int32)}


def _rounded(x: Tensor, scale: Tensor | float, largest: float = math.inf) -> Tensor:
    """x to whole multiples of 1 / scale, at most `largest` of them, straight through."""
    return x + (torch.round(x.detach() * scale).clamp(-largest, largest) / scale - x.detach())


class PriorNetwork(nn.Module):
    """The trainable form of `TokenPrior`.

    codebooks: size -> (S, d) codewords.
    width, depth: channels, and number of residual blocks.
    dim: of h and E. levels: that have biases of their own; all coarser ones share the last one's.
    hidden: width of the network from codeword to E.
    """

    def __init__(self, codebooks: dict[int, Tensor], width: int = 128, depth: int = 3, dim: int = 64, levels: int = 4,
                 hidden: int = 128) -> None:
        super().__init__()
        self.sizes, self.levels = tuple(sorted(codebooks)), levels
        code_dim = next(iter(codebooks.values())).shape[1]
        variants = {"steps": levels * STEPS, "codebooks": len(self.sizes)}
        self.input = nn.ModuleList(RoundedConv((code_dim + 1) * (step + 1), width, 3, *LAYER_BITS["input"], **variants)
                                   for step in range(STEPS))
        self.wide = nn.ModuleList(RoundedConv(width, width, 3, *LAYER_BITS["wide"], **variants) for _ in range(depth))
        self.narrow = nn.ModuleList(RoundedConv(width, width, 1, *LAYER_BITS["narrow"], **variants)
                                    for _ in range(depth))
        self.head = RoundedConv(width, dim, 1, *LAYER_BITS["head"], **variants)
        self.embed = nn.Sequential(nn.Linear(code_dim, hidden), nn.SiLU(), nn.Linear(hidden, dim))
        self.corrections = nn.ParameterDict({str(size): torch.zeros(size, dim) for size in self.sizes})
        self.word_bias = nn.ParameterDict({str(size): torch.zeros(size) for size in self.sizes})
        for size in self.sizes:
            codes = torch.round(codebooks[size].detach().float() * 2**CODE_BITS).clamp(-BYTE, BYTE) / 2**CODE_BITS
            self.register_buffer(f"codes_{size}", codes)
        for conv in self.narrow:  # blocks start near the identity
            nn.init.normal_(cast(RoundedConv, conv).weight, std=0.02)

    @torch.no_grad()
    def start_from(self, counts: dict[int, NDArray[np.int64]]) -> None:
        """Set the words' biases to the log2 of their frequencies, counts + 1/2."""
        for size in self.sizes:
            shares = torch.from_numpy(counts[size] + 0.5)
            self.word_bias[str(size)].copy_(torch.log2(shares / shares.sum()))

    @torch.no_grad()
    def go_on_from(self, earlier: Mapping[str, Tensor], counts: dict[int, NDArray[np.int64]]) -> None:
        """Start from the state of another network of these widths, whose codebooks may be others.

        earlier: its state dict, or the `state_of` a finished prior. A codebook starts as the earlier one of the nearest
        size, a word as the nearest word there. Words that share one share its frequency, as their counts + 1/2 tell.
        """
        sizes = sorted(int(name.removeprefix("codes_")) for name in earlier if name.startswith("codes_"))
        if not sizes:
            raise ConfigError("There is no prior to go on from: it has no codebooks.")
        of = {size: min(sizes, key=lambda s: abs(math.log(s / size))) for size in self.sizes}
        rows = torch.tensor([sizes.index(of[size]) for size in self.sizes])
        state = {name: tensor[rows] if name.endswith(".sizes") else tensor for name, tensor in earlier.items()
                 if not name.startswith(("codes_", "corrections.", "word_bias."))}
        for size in self.sizes:
            nearest = nearest_codeword(self.codes(size), earlier[f"codes_{of[size]}"])
            share = torch.from_numpy(counts[size] + 0.5)
            share = share / share.new_zeros(of[size]).index_add_(0, nearest, share)[nearest]
            state[f"corrections.{size}"] = earlier[f"corrections.{of[size]}"][nearest]
            state[f"word_bias.{size}"] = earlier[f"word_bias.{of[size]}"][nearest] + torch.log2(share).float()
            state[f"codes_{size}"] = self.codes(size)
        if not any(name.startswith("embed.") for name in earlier):  # E is all in the corrections
            last = cast(nn.Linear, self.embed[-1])
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            state |= {f"embed.{name}": tensor for name, tensor in self.embed.state_dict().items()}
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise ConfigError("The prior to go on from has other widths, or another depth, than this one.") from error

    def codes(self, size: int) -> Tensor:
        """(S, d) codewords as the network sees them."""
        return cast(Tensor, getattr(self, f"codes_{size}"))

    def words(self, size: int) -> tuple[Tensor, Tensor]:
        """E (S, dim) and b (S,) of a codebook."""
        table = self.embed(self.codes(size)) + self.corrections[str(size)]
        return to_grid(table, WORD_BITS, -BYTE, BYTE), _rounded(self.word_bias[str(size)], 2.0**LOGIT_BITS)

    def features(self, indices: Tensor, size: int, level: int) -> list[Tensor]:
        """(B, h, w) indices, -1 outside of the picture, to h of the three phases that are coded, (B, h', w', dim)."""
        codes = self.codes(size)
        inside = (indices >= 0)[..., None]
        planes = torch.cat([codes[indices.clamp(min=0)], codes.new_ones(*indices.shape, 1)], -1) * inside
        height, width = indices.shape[1:]
        planes = F.pad(planes.permute(0, 3, 1, 2), (0, width % 2, 0, height % 2))
        phases = [planes[:, :, i::2, j::2] for i, j in PHASES[:STEPS]]
        number, count = self.sizes.index(size), len(indices)
        steps = torch.arange(STEPS, device=indices.device).repeat_interleave(count)
        steps = steps + STEPS * min(level, self.levels - 1)
        total = torch.cat([conv(torch.cat(phases[: step + 1], 1), steps[step * count : (step + 1) * count], number,
                                -TOTAL, TOTAL) for step, conv in enumerate(self.input)])
        largest = TOTAL / 2**TOTAL_BITS
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = wide(to_grid(total, ACTIVATION_BITS, 0, ACTIVATION), steps, number, 0, ACTIVATION)
            total = (total + narrow(x, steps, number, -2**23, 2**23)).clamp(-largest, largest)
        x = self.head(to_grid(total, ACTIVATION_BITS, 0, ACTIVATION), steps, number, -BYTE, BYTE)
        return list(x.permute(0, 2, 3, 1).split(count))

    def scored(self, indices: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """h (N, dim) and the words (N,) that it is to predict: finest level first, step by step."""
        for level in range((max(indices.shape[1:]) - 1).bit_length()):
            for (i, j), features in zip(PHASES[1:], self.features(indices, size, level), strict=True):
                target = indices[:, i::2, j::2]
                known = target >= 0
                yield features[:, : target.shape[1], : target.shape[2]][known], target[known]
            indices = indices[:, ::2, ::2]

    def forward(self, indices: Tensor, size: int) -> Tensor:
        """(B, h, w) indices, -1 outside of a picture, to the mean bits of a token; the coarsest one is left out."""
        features, targets = zip(*self.scored(indices, size), strict=True)
        target = torch.cat(targets)
        words, bias = self.words(size)
        with torch.autocast(indices.device.type, enabled=False):
            total = cast(Tensor, _Bits.apply(torch.cat(features).float(), words.float(), bias.float(), target))
        return total / max(1, len(target))


def tensors_of(network: PriorNetwork) -> dict[str, Tensor]:
    """The whole numbers of a network, as `TokenPrior` takes them."""
    tensors: dict[str, Tensor] = {}
    layers = {f"{kind}.{n}": conv for kind in ("input", "wide", "narrow")
              for n, conv in enumerate(getattr(network, kind))}
    for name, conv in {**layers, "head": network.head}.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in cast(RoundedConv, conv).whole().items()}
    with torch.no_grad():
        for size in network.sizes:
            words, bias = network.words(size)
            tensors[f"codes.{size}"] = torch.round(network.codes(size) * 2**CODE_BITS).to(torch.int8)
            tensors[f"words.{size}"] = torch.round(words * 2**WORD_BITS).to(torch.int8)
            tensors[f"word_bias.{size}"] = torch.round(bias * 2**LOGIT_BITS).to(torch.int16)
    exponents = torch.arange(OCTAVES * 2**OCTAVE_BITS, dtype=torch.float64)
    tensors["powers"] = torch.round(LARGEST_POWER * torch.exp2(-exponents / 2**OCTAVE_BITS)).to(torch.int32)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def state_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `PriorNetwork.go_on_from` takes, of a finished prior's whole numbers; `tensors_of` gives them back."""
    tables = {"codes": ("codes_", CODE_BITS), "words": ("corrections.", WORD_BITS),
              "word_bias": ("word_bias.", LOGIT_BITS)}
    state: dict[str, Tensor] = {}
    for name, whole in tensors.items():
        layer, _, part = name.rpartition(".")
        if layer in tables:
            prefix, bits = tables[layer]
            state[prefix + part] = whole * 2.0**-bits
        elif part in ("weight", "steps", "sizes"):
            in_bits, out_bits = LAYER_BITS[layer.partition(".")[0]]
            shift = tensors[f"{layer}.shift"].float()
            weight_bits = shift - in_bits + out_bits
            if part == "weight":
                state[name] = whole * torch.exp2(-weight_bits).view(-1, 1, 1, 1)
            else:
                half = torch.exp2(shift - 1) if part == "steps" else 0
                state[name] = (whole - half) * torch.exp2(-weight_bits - in_bits)
    return state


@dataclass
class PriorRecipe(Recipe):
    """Hyper-parameters of one run; each is a flag of `scripts/train_prior.py`."""

    width: int = flag(128, "channels")
    depth: int = flag(3, "residual blocks")
    dim: int = flag(64, "of features and words")
    crop: int = flag(32, "side of the crops of token grids")
    train_batch_size: int = flag(12, "crops of one process at a time, all in one codebook")
    max_train_steps: int = flag(3000, "steps of the whole run; the schedule ends there")
    learning_rate: float = flag(2e-3, "after the warm-up")
    final_learning_rate: float = flag(4e-5, "at the end of the schedule")
    lr_warmup_steps: int = flag(100, "steps of linear warm-up")
    adam_beta2: float = flag(0.98, "decay of Adam's second moments")
    weight_decay: float = flag(0.05, "of AdamW, on weights and the table of corrections")
    ema_decay: float = flag(0.995, "of the average of the weights that is validated and saved")
    mixed_precision: str = flag("bf16", "type of the forward pass; fp16 needs a GPU", ("no", "bf16", "fp16"))
    dataloader_num_workers: int = flag(0, "processes that cut crops, for each training process")
    checkpointing_steps: int = flag(250, "steps between checkpoints")
    validation_steps: int = flag(500, "steps between validations; 0: only at the end")
    largest_share: float = flag(0.4, "how often the largest codebook is drawn; the others share the rest alike")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.largest_share <= 1 or self.crop < 2:
            raise ConfigError("A prior's recipe has crops of at least two tokens, and a --largest_share in (0, 1].")


class GridCrops(Dataset[tuple[Tensor, int]]):
    """Batch n: crops of random grids in a random codebook; it depends on the seed and n alone."""

    whole_batches = True

    def __init__(self, views: Sequence[TokenGrids], sizes: Sequence[int], recipe: PriorRecipe) -> None:
        self.views, self.sizes, self.recipe = views, sorted(sizes), recipe
        rest = len(self.sizes) - 1
        share = recipe.largest_share if rest else 1.0
        self.shares = np.array([(1 - share) / max(1, rest)] * rest + [share])

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        """(B, crop, crop) indices, -1 beyond a grid's end, and the codebook's size.

        A grid also loses up to seven of its first rows and columns, so that its tokens fall on all phases.
        """
        rng = np.random.default_rng((self.recipe.seed, n))
        size, side = int(rng.choice(self.sizes, p=self.shares)), self.recipe.crop
        batch = np.full((self.recipe.train_batch_size, side, side), -1, dtype=np.int64)
        for crop in batch:
            view = self.views[rng.integers(len(self.views))]
            grid = view.grid(int(rng.integers(len(view))), size)
            top, left = (rng.integers(0, max(min(8, length), length - side + 1)) for length in grid.shape)
            part = grid[top : top + side, left : left + side]
            crop[: part.shape[0], : part.shape[1]] = part
        return torch.from_numpy(batch), size


def bits_per_token(prior: TokenPrior, grids: TokenGrids, size: int, limit: int | None = None) -> float:
    """Of the first `limit` grids, all positions, by the frequencies that code them."""
    bits = tokens = 0.0
    for n in range(len(grids))[:limit]:
        grid = grids.grid(n, size).astype(np.int64)
        bits += prior.ideal_bits(grid.ravel(), cast(tuple[int, int], grid.shape), size)
        tokens += grid.size
    return bits / tokens


class PriorTask(Task):
    """Trains a `PriorNetwork` on `GridCrops`; what counts and is written is the moving average of its weights.

    validation: grids of other pictures, or None.
    """

    def __init__(self, network: PriorNetwork, recipe: PriorRecipe, validation: TokenGrids | None = None) -> None:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        super().__init__({"model": network})
        self.network, self.recipe, self.validation = network, recipe, validation

    def losses(self, player: str, batch: tuple[Tensor, int], step: int) -> dict[str, Tensor]:
        indices, size = batch
        return {"bits": self.network(indices, size)}  # one name: ranks and parts have codebooks of different sizes

    def parameter_groups(self, player: str, recipe: Recipe) -> list[dict[str, Any]]:
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.network.named_parameters():
            groups[name.endswith("weight") or "corrections" in name].append(parameter)
        return [{"params": groups[True], "weight_decay": recipe.weight_decay},
                {"params": groups[False], "weight_decay": 0.0}]

    def validate(self, average: nn.Module, step: int) -> dict[str, float]:
        """Bits a token of the whole numbers: in the largest codebook, in all of them at the end."""
        if self.validation is None:
            return {}
        prior = TokenPrior(tensors_of(cast(PriorNetwork, average)))
        sizes = self.network.sizes if step == self.recipe.total_steps else self.network.sizes[-1:]
        return {f"bits_{size}": bits_per_token(prior, self.validation, size) for size in sizes}

    def save(self, average: nn.Module, directory: Path) -> None:
        """The file of whole numbers, FILE."""
        directory.mkdir(exist_ok=True)
        save_prior(cast(PriorNetwork, average), directory / FILE)


def save_prior(network: PriorNetwork, path: str | Path) -> bytes:
    """Write a network's whole numbers to a file for `TokenPrior.load`; its fingerprint. ModelError where a sum is
    not proved to be exact.
    """
    tensors = tensors_of(network)
    prior = TokenPrior(tensors)
    write_file(path, save(tensors, {"format": FORMAT}))
    return prior.fingerprint
