"""Weights shared out over the processes (FSDP 2): of a model's blocks, each process keeps a part and asks for the rest.

Weights, gradients, optimizer states and averages of the blocks (`Task.shards`) are cut into as many parts as there are
processes; a block's weights come together while it computes and are let go again. What lies outside of blocks, such as
entries, heads and codebooks, stays whole everywhere and is averaged as without sharding, so a task may call any method
of a player. Zhao et al., "PyTorch FSDP" (2304.11277); in torch's second form, a parameter becomes a `DTensor`.

Checkpoints hold whole tensors, which only the main process keeps, in its own memory: a run goes on with another number
of processes, and a finished model is as any other. The order of an optimizer's groups is not that of a run without
sharding, which therefore refuses to resume it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vtc.errors import ConfigError
from vtc.tokenizers.ranks import sum_over_ranks


def kinds_to_shard(model: nn.Module, kinds: tuple[type[nn.Module], ...], names: Sequence[str] = (),
                   ) -> tuple[type[nn.Module], ...]:
    """Those of the kinds that the model has, or of them those that are named. ConfigError where there are none."""
    found = {type(module).__name__: type(module) for module in model.modules() if isinstance(module, kinds)}
    if not found:
        raise ConfigError(f"{type(model).__name__} has no blocks that could be shared out over processes (--shard, "
                          "FSDP); train it by plain multi-GPU.")
    if unknown := [name for name in names if name not in found]:
        raise ConfigError(f"{type(model).__name__} shares out {', '.join(sorted(found))}, not {', '.join(unknown)}: "
                          "leave --shard_classes (fsdp_transformer_layer_cls_to_wrap) out, or name some of these.")
    return tuple(found[name] for name in names) or kinds


def shard_blocks(module: nn.Module, blocks: tuple[type[nn.Module], ...], device: torch.device,
                 reshard_after_forward: bool = True) -> int:
    """Share the blocks of a module out over all processes, in place; how many they are.

    reshard_after_forward: let a block's whole weights go after its forward pass, and ask for them again in the backward
        pass; False keeps them until then: faster, for the memory of all blocks' weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Torch warns of blocks whose output is a view, for the sake of in-place operations on it; our networks have none,
    # and the tests compare the gradients.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
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
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    return len(outermost)


def reshard(module: nn.Module) -> None:
    """Let go of whole weights that a forward pass without a backward pass has left."""
    from torch.distributed.fsdp import FSDPModule

    for block in module.modules():
        if isinstance(block, FSDPModule):
            block.reshard()


def check_sharding(recipe_precision: str) -> None:
    """ConfigError where sharding cannot be."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError("--shard shares weights out over several processes; start them with accelerate launch.")
    if recipe_precision == "fp16":
        raise ConfigError("Sharing weights out (--shard, FSDP) goes with --mixed_precision bf16 or no: the loss scale "
                          "of fp16 is not shared.")


def is_sharded(tensor: object) -> bool:
    """Whether other processes hold parts of it."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here; the tensor itself where it is not cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(value: Any, keep: bool = True) -> Any:
    """Tensors in nested dictionaries and lists put together, one after the other, in the main memory.

    All processes call it alike; those that do not keep the result get None in the place of each.
    """
    if isinstance(value, DTensor):
        together = value.full_tensor()
        return together.cpu() if keep else None
    if isinstance(value, dict):
        return {key: whole(item, keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item, keep) for item in value)
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


def cut_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state of whole tensors, each cut as the parameter is that it will belong to.

    Before `load_state_dict`, which would bring them whole to the device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    of = dict(zip(numbers, parameters, strict=False))

    def cut(number: int, value: Any) -> Any:
        same = isinstance(value, Tensor) and number in of and value.shape == of[number].shape
        return cut_like(value, of[number]) if same else value

    state = {number: {name: cut(number, value) for name, value in entries.items()}
             for number, entries in saved["state"].items()}
    return {**saved, "state": state}


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
