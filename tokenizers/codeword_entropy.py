"""The entropy of a softmax over all codewords, piece by piece: the N x K table of probabilities never exists whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vtc.tokenizers.bits import guarded_log
from vtc.tokenizers.ranks import mean_over_ranks

#: logits worked on at a time; 16 MiB of float32
PIECE = 1 << 22


def row_pieces(rows: int, columns: int) -> list[slice]:
    """Cuts of 0 ... rows such that a piece has about PIECE entries; an empty one where there are no rows."""
    step = max(1, PIECE // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, max(1, rows), step)]


class _CodewordEntropies(torch.autograd.Function):
    """Keeps its inputs and the mean probabilities; each piece's softmax is computed again on the way back."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, codewords: Tensor, bias: Tensor, eps: float,
                reduce_across_ranks: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            per_sample, mean = z.new_zeros(()), torch.zeros_like(bias)
            for piece in row_pieces(len(z), len(codewords)):
                log_p = torch.addmm(bias, z[piece], codewords.T).log_softmax(1)
                p = log_p.exp()
                per_sample -= (log_p * p).sum()
                mean += p.sum(0)
            per_sample, mean = per_sample / len(z), mean / len(z)
            if reduce_across_ranks:
                mean = mean_over_ranks(mean)
            ctx.save_for_backward(z, codewords, bias, mean)
            ctx.eps = eps
            return per_sample, -(mean * guarded_log(mean, eps, "add")[0]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        z, codewords, bias, mean = ctx.saved_tensors
        to_samples, to_codes = grads
        log_mean, derivative = guarded_log(mean, ctx.eps, "add")
        slope = (log_mean + derivative).mul_(to_codes / -len(z))
        grad_z, grad_codewords, grad_bias = torch.empty_like(z), torch.zeros_like(codewords), torch.zeros_like(bias)
        with torch.autocast(z.device.type, enabled=False):
            for piece in row_pieces(len(z), len(codewords)):
                log_p = torch.addmm(bias, z[piece], codewords.T).log_softmax(1)
                p = log_p.exp()
                # dH/dlogit = -p (log p + H), and what the mean's entropy adds is p (slope - <p, slope>).
                upwards = log_p.mul_(to_samples / -len(z)).add_(slope)
                upwards.sub_((p * upwards).sum(1, keepdim=True)).mul_(p)
                grad_z[piece] = upwards @ codewords
                grad_codewords.addmm_(upwards.T, z[piece])
                grad_bias += upwards.sum(0)
        return grad_z, grad_codewords, grad_bias, None, None


def codeword_entropies(z: Tensor, codewords: Tensor, bias: Tensor | None = None, eps: float = 1e-5,
                       reduce_across_ranks: bool = True) -> tuple[Tensor, Tensor]:
    """Mean entropy of softmax(z E^T + bias), and the entropy of the mean softmax, in nats.

    z: (N, d); codewords: (K, d), E; bias: (K,). float32 arithmetic (float64 for float64).
    eps: added to a mean probability inside its logarithm.
    reduce_across_ranks: the mean is over the (equal) batches of all processes; see `bits.bit_entropies`.

    No second derivatives, as there.
    """
    if z.dtype != torch.float64:
        z, codewords = z.float(), codewords.float()
    bias = z.new_zeros(len(codewords)) if bias is None else bias.to(z.dtype)
    per_sample, of_codes = _CodewordEntropies.apply(z, codewords, bias, eps, reduce_across_ranks)
    return per_sample, of_codes
