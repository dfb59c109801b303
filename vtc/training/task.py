"""What is trained: the networks, their losses, what is shown and measured on the way. The loop does the rest."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vtc.errors import ConfigError
from vtc.training.muon import Muon, matrices_of, muon_groups
from vtc.training.recipe import Recipe


class Task:
    """Base of all kinds of training. A task sets `players` in its constructor and implements `losses`.

    players: networks that learn, in the order in which a batch is shown to them. The first is the model: it is
        averaged, validated and saved. Each has an optimizer of its own.
    frozen: networks that are only asked (LPIPS, a teacher): moved to the device, in eval mode, without gradients.
    blocks: kinds of modules whose activations `--gradient_checkpointing` computes again, in models that have no method
        of their own for it.
    shards: kinds of modules whose weights `--shard` shares out over the processes, where these are not the blocks: what
        is used of them is their forward pass, and nothing else.
    """

    players: dict[str, nn.Module]
    frozen: dict[str, nn.Module]
    blocks: tuple[type[nn.Module], ...] = ()
    shards: tuple[type[nn.Module], ...] = ()

    def __init__(self, players: dict[str, nn.Module], frozen: dict[str, nn.Module] | None = None) -> None:
        self.players, self.frozen = players, frozen or {}

    @property
    def model(self) -> nn.Module:
        """The first player."""
        return next(iter(self.players.values()))

    def losses(self, player: str, batch: Any, step: int) -> dict[str, Tensor]:
        """The weighted terms for one player and one batch (on the device): the loop adds them up. {}: it sits out.

        Players are asked in their order, with the same batch and without a step in between, so a later one may use what
        an earlier one left in the task. Meanwhile the others' parameters need no gradient. Autocast is on as the recipe
        says; torch's random state depends on (seed, step, part, process) alone.
        """
        raise NotImplementedError

    def parameter_groups(self, player: str, recipe: Recipe) -> list[dict[str, Any]]:
        """For the optimizer. A group may say "share", by which its learning rate is multiplied, and "weight_decay"."""
        parameters = [p for p in self.players[player].parameters() if p.requires_grad]
        groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
                  {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def optimizer(self, player: str, recipe: Recipe) -> torch.optim.Optimizer:
        """AdamW, or Muon for the model's matrices; the other players always learn by AdamW."""
        groups = self.parameter_groups(player, recipe)
        kind: type[torch.optim.AdamW] = torch.optim.AdamW
        if recipe.optimizer == "muon" and self.players[player] is self.model:
            groups, kind = muon_groups(groups, matrices_of(self.model)), Muon
        return kind(groups, lr=recipe.learning_rate, betas=(recipe.adam_beta1, recipe.adam_beta2), weight_decay=0.0)

    def train_mode(self) -> None:
        """Put the players in training mode: at the start and after each validation."""
        for player in self.players.values():
            player.train()

    def before_step(self, step: int) -> None:
        """Called before each step: to start a codebook, to anneal a weight."""

    def compiled(self) -> list[nn.Module]:
        """What `--compile` compiles: modules whose forward pass is called in a step."""
        return list(self.players.values())

    def report(self, step: int) -> dict[str, float]:
        """Further numbers of the log, every `logging_steps`; all processes ask. Those that end in "usage" are shares of
        a codebook in use, which the loop watches.
        """
        return {}

    def validate(self, average: nn.Module, step: int) -> dict[str, float]:
        """Measures of the averaged model, by the main process, in eval mode and without gradients."""
        return {}

    def samples(self, average: nn.Module, step: int) -> Tensor | None:
        """(N, 3, H, W) in [0, 1]: pictures for a grid, made where `validate` is."""
        return None

    def save(self, average: nn.Module, directory: Path) -> None:
        """Write the finished model."""
        average.save_pretrained(directory)  # type: ignore[operator]  # torch's stub: Tensor or Module

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside players and optimizers: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""


def checkpoint_activations(model: nn.Module, blocks: tuple[type[nn.Module], ...]) -> None:
    """Let a model compute activations again in the backward pass, by its own method or block by block.

    Raises ConfigError for a model without the one and the other.
    """
    for name in ("enable_gradient_checkpointing", "gradient_checkpointing_enable"):  # diffusers, transformers
        if hasattr(model, name):
            getattr(model, name)()
            return
    found: Iterable[nn.Module] = [module for module in model.modules() if isinstance(module, blocks)]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no gradient checkpointing; leave --gradient_checkpointing out.")
    for module in found:
        module.forward = partial(_again, module, type(module).forward)


def _again(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    return checkpoint(forward, module, *args, use_reentrant=False, **kwargs)
