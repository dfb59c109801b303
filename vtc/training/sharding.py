"""Weights shared out over the processes (FSDP 2): of a model's blocks, each process keeps a part and asks for the rest.

Weights, gradients, optimizer states and averages of the blocks (`Task.blocks`) are cut into as many parts as there are
processes; a block's weights come together while it computes and are let go again. What lies outside of blocks, such as
entries, heads and codebooks, stays whole everywhere and is averaged as without sharding, so a task may call any method
of a player. Zhao et al., "PyTorch FSDP" (2304.11277); in torch's second form, a parameter becomes a `DTensor`.

Checkpoints hold whole tensors: a sharded run can be resumed without sharding but for its optimizer's order, and its
finished model is as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vtc.errors import ConfigError
from vtc.tokenizers.ranks import sum_over_ranks


def shard_blocks(module: nn.Module, blocks: tuple[type[nn.Module], ...], device: torch.device) -> int:
    """Share the blocks of a module out over all processes, in place; how many they are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    outermost: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for block in module.modules():
        if isinstance(block, blocks) and block not in inside:
            outermost.append(block)
            inside.update(block.modules())
    for block in outermost:
        for parameter in block.parameters():  # channels-last weights cannot be cut
            parameter.data = parameter.data.contiguous()
        fully_shard(block, mesh=mesh)
    return len(outermost)


def check_sharding(recipe_precision: str) -> None:
    """ConfigError where sharding cannot be."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError("--shard shares weights out over several processes; start them with accelerate launch.")
    if recipe_precision == "fp16":
        raise ConfigError("--shard goes with --mixed_precision bf16 or no: the loss scale of fp16 is not shared.")


def is_sharded(tensor: object) -> bool:
    """Whether other processes hold parts of it."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here; the tensor itself where it is not cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(value: Any) -> Any:
    """Tensors in nested dictionaries and lists put together; all processes call it alike."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value


def cut_like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, cut as `target` is."""
    if not isinstance(target, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)


def split_groups(optimizer: torch.optim.Optimizer) -> None:
    """Give sharded parameters groups of their own: optimizers handle a group's tensors together."""
    for group in list(optimizer.param_groups):
        cut = [p for p in group["params"] if is_sharded(p)]
        if cut and len(cut) < len(group["params"]):
            group["params"] = [p for p in group["params"] if not is_sharded(p)]
            optimizer.add_param_group({**{k: v for k, v in group.items() if k != "params"}, "params": cut})


def cut_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """After loading whole tensors: cut each as its parameter is."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = cut_like(value, parameter)


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], maximum: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for parameters of which some are cut: the norm of all before clipping."""
    if not any(is_sharded(p) for p in parameters):
        return nn.utils.clip_grad_norm_(parameters, maximum)
    cut = _squares([local(p.grad) for p in parameters if p.grad is not None and is_sharded(p)])
    rest = _squares([p.grad for p in parameters if p.grad is not None and not is_sharded(p)])
    norm = (sum_over_ranks(cut) + rest).sqrt()
    scale = (maximum / (norm + 1e-6)).clamp(max=1.0)
    for p in parameters:
        if p.grad is not None:
            local(p.grad).mul_(scale.to(p.grad.dtype))
    return norm


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.float().square().sum() for t in tensors]).sum() if tensors else torch.zeros(())
