"""Bits to indices and back, and the entropy of bits in closed form: what the lookup-free quantizers share.

A code over d bits, c in {-1, +1}^d, meets a latent u as a softmax over all 2^d codes of s <u, c>. That softmax is a
product of d independent coins: bit i is one with probability sigmoid(2 s u_i). Two things follow, both exact:

  - the entropy of one sample is the sum of d coin entropies: O(d) work where the plain form has O(2^d);
  - the probabilities of the codes of the low half of the bits, and of the high half, are tables with 2^(d/2) columns,
    and the mean over N samples of all 2^d code probabilities is the product of the two tables, a single GEMM.

So neither the N x 2^d distances nor their softmax ever exist, forward or backward.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vtc.errors import ConfigError
from vtc.tokenizers.ranks import mean_over_ranks

#: Which channel carries an index's least significant bit: the first ("lsb_first": WeTok, Open-MAGVIT2) or the last
#: ("msb_first": lucidrains' LFQ, BSQ, Infinity, Cosmos). Part of a token format: indices do not tell.
BitOrder = Literal["lsb_first", "msb_first"]

#: a histogram of 2^24 codes takes 64 MiB; beyond, the bits must be grouped
MAX_HISTOGRAM_BITS = 24

#: What keeps log(p) finite in the codebook entropy: log(p + eps) as WeTok, Open-MAGVIT2 and BSQ have it, or
#: log(max(p, eps)) as lucidrains' LFQ. With 2^d' codes not far below 1 / eps the two differ visibly.
LogGuard = Literal["add", "clamp"]

#: numbers in one table of code probabilities: batches are worked through in pieces of this size
TABLE_SIZE = 1 << 20


def check_bit_order(order: str) -> None:
    """Raises ConfigError for an order that is not one of the two."""
    if order not in get_args(BitOrder):
        raise ConfigError(f"The bit order is 'lsb_first' or 'msb_first', not {order!r}.")


def check_guard(eps: float, guard: str) -> None:
    """Raises ConfigError for an unknown guard or a negative eps."""
    if guard not in get_args(LogGuard):
        raise ConfigError(f"The guard of a logarithm is 'add' or 'clamp', not {guard!r}.")
    if not eps >= 0:
        raise ConfigError(f"The eps of a logarithm is at least 0, not {eps}.")


def place_values(bits: int, order: BitOrder, device: torch.device | None = None) -> Tensor:
    """(bits,) int64: what a one in each channel adds to the index."""
    values = 1 << torch.arange(bits, device=device)
    return values if order == "lsb_first" else values.flip(0)


def pack_bits(bits: Tensor, order: BitOrder) -> Tensor:
    """(..., d) bool to (...) int64 indices; d is 62 at most."""
    return (bits * place_values(bits.shape[-1], order, bits.device)).sum(-1)


def unpack_bits(indices: Tensor, bits: int, order: BitOrder) -> Tensor:
    """(...) int64 indices to (..., bits) bool: the inverse of `pack_bits`."""
    return (indices[..., None] & place_values(bits, order, indices.device)) != 0


def pack_tokens(bits: Tensor, token_bits: tuple[int, ...], order: BitOrder) -> Tensor:
    """(B, d, ...) bool to (B, ..., G) int64: consecutive channels, token_bits[g] of them, make the index of group g."""
    if len(set(token_bits)) == 1:  # equal tokens: one multiplication instead of G, and sums along far strides
        grouped = bits.unflatten(1, (len(token_bits), token_bits[0]))
        places = place_values(token_bits[0], order, bits.device).view(-1, *[1] * (bits.ndim - 2))
        return (grouped * places).sum(2).movedim(1, -1).contiguous()
    return torch.stack([pack_bits(part.movedim(1, -1), order) for part in bits.split(token_bits, dim=1)], -1)


def unpack_tokens(indices: Tensor, token_bits: tuple[int, ...], order: BitOrder) -> Tensor:
    """(B, ..., G) int64 to (B, d, ...) bool: the inverse of `pack_tokens`."""
    parts = [unpack_bits(group, n, order) for group, n in zip(indices.unbind(-1), token_bits, strict=True)]
    return torch.cat(parts, -1).movedim(-1, 1)


def check_token_bits(token_bits: tuple[int, ...], dim: int) -> None:
    """Raises ConfigError unless the tokens share out exactly `dim` bits, 1 to 62 each."""
    if sum(token_bits) != dim or min(token_bits) < 1 or max(token_bits) > 62:
        raise ConfigError(f"Tokens of {token_bits} bits do not share out {dim} bits (1 to 62 bits a token).")


def _coins(logits: Tensor) -> tuple[Tensor, Tensor]:
    """P(one) and P(zero) of each coin; the smaller one is not what is left of 1, so it keeps all its digits."""
    return torch.sigmoid(logits), torch.sigmoid(-logits)


def _coin_entropy(logits: Tensor, ones: Tensor, zeros: Tensor) -> Tensor:
    """Entropy of each coin in nats, -logsigmoid(|x|) + |x| P(the rarer side): no difference of large numbers."""
    rare = torch.minimum(ones, zeros)
    return torch.log1p(-rare).neg_().addcmul_(logits.abs(), rare)


def _code_table(coins: Tensor) -> Tensor:
    """(g, d, 2, N) coin probabilities to (g, 2^d, N) code probabilities; the first bit is the least significant."""
    bits = coins.shape[1]
    if bits < 2:
        return coins[:, 0] if bits else coins.new_ones(coins.shape[0], 1, coins.shape[3])
    low, high = _code_table(coins[:, : bits // 2]), _code_table(coins[:, bits // 2 :])
    return (high[:, :, None] * low[:, None]).flatten(1, 2)


def _pieces(bits: int, n: int) -> list[slice]:
    step = max(1, TABLE_SIZE >> -(-bits // 2))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _half_tables(ones: Tensor, zeros: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
    """Code probabilities of the low and of the high half of the bits, for some of the samples."""
    half = ones.shape[1] // 2
    coins = torch.stack([zeros[..., piece], ones[..., piece]], 2)
    return _code_table(coins[:, :half]), _code_table(coins[:, half:])


def _mean_codes(ones: Tensor, zeros: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(g, d, N) coins to (g, 2^ceil(d/2), 2^floor(d/2)): mean probability of each code, high half by low half.

    And, where the samples fit into one piece, its two tables.
    """
    groups, bits, n = ones.shape
    half = bits // 2
    pieces = _pieces(bits, n)
    total = ones.new_zeros(groups, 1 << (bits - half), 1 << half)
    for piece in pieces:
        low, high = _half_tables(ones, zeros, piece)
        total.baddbmm_(high, low.mT)
    return total.div_(n), [low, high] if len(pieces) == 1 else []


@torch.no_grad()
def mean_code_probabilities(logits: Tensor) -> Tensor:
    """(g, d, N) bit logits to (g, 2^d): mean over N of each code's probability, first bit least significant."""
    with torch.autocast(logits.device.type, enabled=False):
        return _mean_codes(*_coins(_wide(logits)))[0].flatten(1)


def guarded_log(p: Tensor, eps: float, guard: LogGuard) -> tuple[Tensor, Tensor]:
    """log p, kept finite, and p times its derivative (1 where the guard does nothing)."""
    tiny = torch.finfo(p.dtype).tiny
    if guard == "clamp":
        return p.clamp(min=max(eps, tiny)).log(), (p >= eps).to(p.dtype)
    shifted = (p + eps).clamp(min=tiny)
    return shifted.log(), p / shifted


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _BitEntropies(torch.autograd.Function):
    """Keeps logits, coins and histogram; tables of more than one piece are built again on the way back."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, eps: float, guard: LogGuard,
                reduce_across_ranks: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast(logits.device.type, enabled=False):
            wide = _wide(logits)
            ones, zeros = _coins(wide)
            per_sample = _coin_entropy(wide, ones, zeros).sum(1).mean(1)
            histogram, tables = _mean_codes(ones, zeros)
            if reduce_across_ranks:
                histogram = mean_over_ranks(histogram)
            ctx.save_for_backward(wide, ones, zeros, histogram, *tables)
            ctx.eps, ctx.guard, ctx.dtype = eps, guard, logits.dtype
            return per_sample, -(histogram * guarded_log(histogram, eps, guard)[0]).sum((1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        wide, ones, zeros, histogram, *tables = ctx.saved_tensors
        to_samples, to_codes = (g[:, None, None] for g in grads)
        _, bits, n = wide.shape
        half = bits // 2
        with torch.autocast(wide.device.type, enabled=False):
            # d(-p log p)/dp of each code, times what arrives from above
            log_p, derivative = guarded_log(histogram, ctx.eps, ctx.guard)
            slope = (log_p + derivative).mul_(to_codes / -n)
            # d(code probability)/d(logit of a bit) = code probability * (bit - P(one))
            grad = (wide * ones).mul_(zeros).mul_(to_samples / -n)
            low_bits = _bit_matrix(half, grad)
            high_bits = _bit_matrix(bits - half, grad)
            for piece in _pieces(bits, n):
                low, high = tables or _half_tables(ones, zeros, piece)
                weighted_low = (slope.mT @ high).mul_(low)
                weighted_high = (slope @ low).mul_(high)
                expected = weighted_low.sum(1, keepdim=True)
                grad[:, :half, piece].baddbmm_(low_bits, weighted_low)
                grad[:, half:, piece].baddbmm_(high_bits, weighted_high)
                grad[:, :, piece].addcmul_(ones[:, :, piece], expected, value=-1)
        return grad.to(ctx.dtype), None, None, None


def _bit_matrix(bits: int, like: Tensor) -> Tensor:
    """(g, bits, 2^bits): bit i of each code, for each group of `like`."""
    codes, place = torch.arange(1 << bits, device=like.device), torch.arange(bits, device=like.device)
    return ((codes >> place[:, None]) & 1).to(like.dtype).expand(len(like), -1, -1)


def bit_entropies(logits: Tensor, eps: float = 0.0, guard: LogGuard = "add",
                  reduce_across_ranks: bool = True) -> tuple[Tensor, Tensor]:
    """Entropy of the codes of single samples, and of the mean over samples, both in nats.

    logits: (g, d, N): g separate histograms, d bits (24 at most), N samples; the logit of each bit being one. Any
        floating type; the arithmetic is float32 (float64 for float64) whatever the type and autocast.
    eps, guard: of a mean probability's logarithm, as upstream recipes have it; see LogGuard. 0 is the exact entropy.
    reduce_across_ranks: average the histogram over the processes of a data-parallel run, as if their batches were one
        (equal batches assumed). Each process returns the gradient whose mean over processes is the true one, which is
        what DistributedDataParallel takes.

    Returns (g,) mean over samples of the sample entropy, and (g,) entropy of the mean. There are no second derivatives:
    with create_graph=True the gradient counts as a constant.
    """
    check_guard(eps, guard)
    if logits.shape[1] > MAX_HISTOGRAM_BITS:
        raise ConfigError(f"A histogram of {logits.shape[1]} bits is too large: split the bits into groups of at most "
                          f"{MAX_HISTOGRAM_BITS}.")
    per_sample, of_codes = _BitEntropies.apply(logits, eps, guard, reduce_across_ranks)
    return per_sample, of_codes
