"""Muon: steps of the same size along every direction that a weight can turn.

A weight is a matrix (a convolution's: outputs x inputs and taps), its averaged gradient too. Adam scales that gradient
number by number; Muon takes the nearest matrix with orthonormal rows instead, so that directions in which gradients are
small learn as fast as the others. Jordan et al., https://kellerjordan.github.io/posts/muon/; the step's size is
Moonlight's (2502.16982): one root mean square for all shapes, a usual one of AdamW's, so that learning rates and decays
mean the same for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from vtc.tokenizers.ranks import is_parallel

#: of p(x) = a x + b x^3 + c x^5, five of which bring any x of [0.002, 1] to between 0.68 and 1.21; Jordan et al.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
#: rows or columns below which a weight is left to AdamW
SMALLEST = 8
#: root mean square of a step, in learning rates, that is usual for AdamW
USUAL_STEP = 0.2


def orthogonalize(matrix: Tensor) -> Tensor:
    """The matrix with its singular values brought to about 1: 0.68 to 1.21, where they were over 0.002 of its norm.

    The polynomials are multiplied in the small square matrix of inner products: the wide matrix is touched twice.
    In float32, since bfloat16's inner products have negative eigenvalues, which the polynomials would blow up.
    """
    x = matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp_min(1e-12)
    a, b, c = COEFFICIENTS
    gram = x @ x.T
    diagonal = torch.eye(len(gram), device=gram.device)
    total = diagonal
    for left in reversed(range(ITERATIONS)):
        step = a * diagonal + b * gram + c * (gram @ gram)
        total = step @ total
        if left:
            gram = step @ gram @ step
    x = total @ x
    return x.T if tall else x


def matrices_of(module: nn.Module) -> list[nn.Parameter]:
    """Weights of linear layers and convolutions that Muon suits: not grouped ones, nor those to or from a few numbers.

    Words (`nn.Embedding`, codebooks) are rows of their own rather than a map; vectors have no directions to even out.
    """
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | _ConvNd) and getattr(m, "groups", 1) == 1]
    weights = [dict(m.named_parameters(recurse=False)).get("weight") for m in layers]  # none where it is made of others
    return [w for w in weights
            if w is not None and w.requires_grad and min(w.shape[0], w[0].numel()) >= SMALLEST]


def muon_groups(groups: Sequence[dict[str, Any]], matrices: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """An optimizer's groups, each cut in two: its `matrices`, marked "muon", and the others."""
    chosen = {id(p) for p in matrices}
    cut = [{**group, "params": [p for p in group["params"] if (id(p) in chosen) == muon], "muon": muon}
           for group in groups for muon in (False, True)]
    return [group for group in cut if group["params"]]


class Muon(torch.optim.AdamW):
    """Muon for the groups of parameters with "muon": True, AdamW for the others.

    The processes of a run share the matrices out: each has the same gradients, so each makes some of the steps for all.
    """

    def __init__(self, parameters: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99),
                 weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
        for group in self.param_groups:
            group.setdefault("muon", False)
            group.setdefault("momentum", momentum)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """As any optimizer's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices = [(p, group) for group in self.param_groups if group["muon"] for p in group["params"]
                    if p.grad is not None]
        directions = self._directions(matrices)
        for (p, group), direction in zip(matrices, directions, strict=True):
            size = USUAL_STEP * max(p.shape[0], p[0].numel()) ** 0.5
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction.reshape(p.shape), alpha=-group["lr"] * size)
        gradients = [p.grad for p, _ in matrices]
        for p, _ in matrices:
            p.grad = None  # hidden from AdamW
        super().step()
        for (p, _), gradient in zip(matrices, gradients, strict=True):
            p.grad = gradient
        return loss

    def _directions(self, matrices: list[tuple[Tensor, dict[str, Any]]]) -> list[Tensor]:
        averaged = []
        for p, group in matrices:
            state, gradient = self.state[p], p.grad.float().flatten(1)  # type: ignore[union-attr]  # those without are out
            if not state:
                state["momentum_buffer"] = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
                state["step"] = torch.zeros(())  # AdamW looks for it in every state that it reads
            state["step"] += 1
            buffer = state["momentum_buffer"].flatten(1)
            buffer.lerp_(gradient, 1 - group["momentum"])
            averaged.append(gradient.lerp(buffer, group["momentum"]))
        return shared_directions(averaged) if is_parallel() else [orthogonalize(m) for m in averaged]


def shared_directions(averaged: list[Tensor]) -> list[Tensor]:
    """`orthogonalize` of each, by one process each and sent to the others; the largest first, to whoever has least."""
    load, owner = [0] * dist.get_world_size(), [0] * len(averaged)
    work = [m.numel() * min(m.shape) for m in averaged]
    for i in sorted(range(len(averaged)), key=lambda i: -work[i]):
        owner[i] = load.index(min(load))
        load[owner[i]] += work[i]
    directions, waits = [], []
    for m, process in zip(averaged, owner, strict=True):
        directions.append(orthogonalize(m).contiguous() if process == dist.get_rank() else torch.empty_like(m))
        waits.append(dist.broadcast(directions[-1], process, async_op=True))
    for wait in waits:
        if wait is not None:
            wait.wait()
    return directions
