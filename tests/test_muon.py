"""Muon beside a singular value decomposition, torch's own for matrices, itself in two processes and after a break."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from torch import Tensor, nn

from tests.test_training import MODEL_ARGS, recipe
from tests.test_training_parallel import Pictures
from vtc.errors import ConfigError, TrainingError
from vtc.training.loop import Loop
from vtc.training.muon import Muon, matrices_of, muon_groups, orthogonalize
from vtc.training.prior import PriorNetwork, PriorRecipe, PriorTask
from vtc.training.tokenizer import TokenizerTask, make_tokenizer


@pytest.mark.parametrize("shape", [(32, 32), (24, 9 * 24), (160, 40), (8, 8)])
def test_a_matrix_keeps_its_directions_and_loses_its_sizes(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    sizes = torch.logspace(0, -2, u.shape[1])
    made = u.T @ orthogonalize(100 * (u * sizes) @ v) @ v.T
    assert (made.diagonal() > 0.65).all() and (made.diagonal() < 1.21).all()
    assert (made - made.diagonal().diag()).abs().max() < 2e-4
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


def steps(optimizer: torch.optim.Optimizer, weight: nn.Parameter, count: int = 4) -> Tensor:
    for n in range(count):
        torch.manual_seed(n)
        weight.grad = torch.randn(24, 9 * 16).view(weight.shape)
        optimizer.step()
    return weight.detach().flatten(1)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_kernel_learns_as_torchs_own_teaches_a_matrix(layout: torch.memory_format) -> None:
    """torch computes in bfloat16, which is worth one per cent of a step."""
    torch.manual_seed(9)
    start = torch.randn(24, 9 * 16)
    theirs = nn.Parameter(start.clone())
    ours = nn.Parameter(start.view(24, 16, 3, 3).clone(memory_format=layout))
    published = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, momentum=0.95,
                                 adjust_lr_fn="match_rms_adamw")
    after = steps(published, theirs)
    before = start.clone()
    moved = steps(Muon([{"params": [ours], "muon": True, "weight_decay": 0.1}], lr=1e-2), ours)
    assert (moved - after).norm() < 0.02 * (after - before).norm()


def test_what_it_is_for_and_what_it_is_not() -> None:
    module = nn.ModuleDict({"kernel": nn.Conv2d(8, 16, 3), "map": nn.Linear(32, 8), "picture": nn.Conv2d(16, 3, 3),
                            "depthwise": nn.Conv2d(16, 16, 3, groups=16), "words": nn.Embedding(64, 16),
                            "norm": nn.LayerNorm(16), "fixed": nn.Linear(16, 16).requires_grad_(False)})
    # a depthwise kernel has nine taps of one input, of which each is a row: a matrix, but of unrelated rows
    chosen = {id(p) for p in matrices_of(module)}
    assert {name for name, p in module.named_parameters() if id(p) in chosen} == {"kernel.weight", "map.weight"}


def test_the_other_parameters_learn_by_adamw() -> None:
    torch.manual_seed(0)
    kernel, vector = nn.Parameter(torch.randn(16, 8, 3, 3)), nn.Parameter(torch.randn(16))
    alone = nn.Parameter(vector.detach().clone())
    both = Muon([{"params": [vector], "weight_decay": 0.1}, {"params": [kernel], "muon": True}], lr=1e-2)
    adam = torch.optim.AdamW([alone], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(3):
        kernel.grad, vector.grad = torch.randn_like(kernel), torch.randn_like(vector)
        alone.grad = vector.grad.clone()
        both.step()
        adam.step()
    assert torch.equal(vector, alone) and kernel.grad is not None


def shared_steps(rank: int, folder: str) -> None:
    """What one of two processes does: the gradients are the same in both, as the loop's are."""
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(several(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def several() -> list[Tensor]:
    torch.manual_seed(3)
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((16, 8, 3, 3), (32, 16), (8, 64), (24, 24))]
    optimizer = Muon([{"params": weights, "muon": True}], lr=1e-2)
    for _ in range(3):
        for w in weights:
            w.grad = torch.randn_like(w)
        optimizer.step()
    return [w.detach() for w in weights]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo")
def test_processes_share_the_matrices_out(tmp_path: Path) -> None:
    mp.spawn(shared_steps, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for alone, first, second in zip(several(), *halves, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)


def loop_in(folder: Path, optimizer: str = "muon", **changes: object) -> Loop:
    torch.manual_seed(5)
    settings = recipe(max_train_steps=6, optimizer=optimizer, learning_rate=1e-3, **changes)
    task = TokenizerTask(make_tokenizer("local_vq", MODEL_ARGS["local_vq"]), settings)
    return Loop(task, settings, Accelerator(cpu=True), Pictures(), folder)


def test_a_tokenizer_trained_by_it_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, parts = loop_in(tmp_path / "whole"), loop_in(tmp_path / "parts")
    whole.train()
    parts.train(stop_at=3)
    resumed = loop_in(tmp_path / "parts")
    assert resumed.resume("latest")
    resumed.train()
    by_adam = loop_in(tmp_path / "adam", "adamw")
    by_adam.train()
    for one, other in zip(whole.task.model.parameters(), resumed.task.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert any(not torch.equal(one, other) for one, other in
               zip(whole.task.model.parameters(), by_adam.task.model.parameters(), strict=True))
    with pytest.raises(TrainingError, match=r"The optimizer of 'model' in .* is of another model"):
        loop_in(tmp_path / "adam").resume("latest")


def test_groups_keep_their_settings_and_their_order() -> None:
    kernel, vector, other = (nn.Parameter(torch.zeros(shape)) for shape in ((8, 8, 3, 3), (8,), (8, 16)))
    groups: list[dict[str, Any]] = [{"params": [vector, kernel], "weight_decay": 0.1, "share": 0.5},
                                    {"params": [other], "weight_decay": 0.0}]
    cut = muon_groups(groups, [kernel, other])
    assert [(g["params"][0] is p, g["weight_decay"], g["muon"]) for g, p in zip(cut, (vector, kernel, other),
            strict=True)] == [(True, 0.1, False), (True, 0.1, True), (True, 0.0, True)]
    assert cut[1]["share"] == 0.5 and len(groups[0]["params"]) == 2


def test_the_rounded_kernels_of_a_prior_are_matrices_and_its_words_are_not() -> None:
    network = PriorNetwork({16: torch.randn(16, 8)}, width=16, depth=1, dim=8, hidden=16)
    settings = PriorRecipe(optimizer="muon")
    optimizer = PriorTask(network, settings).optimizer("model", settings)
    learnt = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    assert isinstance(optimizer, Muon)
    assert {name for name, p in network.named_parameters() if id(p) in learnt} == {
        *(f"input.{n}.weight" for n in range(3)), "wide.0.weight", "narrow.0.weight", "head.weight", "embed.0.weight",
        "embed.2.weight"}


def test_a_discriminator_keeps_adamw() -> None:
    settings = recipe(optimizer="muon", gan_weight=0.1)
    task = TokenizerTask(make_tokenizer("local_vq", MODEL_ARGS["local_vq"]), settings)
    kinds = {player: type(task.optimizer(player, settings)) for player in task.players}
    assert kinds == {"model": Muon, "discriminator": torch.optim.AdamW}


def test_it_needs_whole_weights() -> None:
    with pytest.raises(ConfigError, match="--optimizer muon and --shard exclude one another"):
        recipe(optimizer="muon", shard=True)
