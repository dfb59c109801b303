"""Two processes over gloo train what one with twice the batch trains: gradients, averages, codebooks, LeCAM."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file

from tests.shared import ROOT
from tests.test_training import MODEL_ARGS, recipe
from tests.test_training_loop import Reverse, loop_in
from vtc.training.loop import Loop
from vtc.training.sharding import is_sharded
from vtc.training.tokenizer import TokenizerTask, make_tokenizer

STEPS = 4


class Pictures(torch.utils.data.Dataset):
    """Sample n is a picture drawn from n."""

    def __getitem__(self, n):
        return torch.randint(256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


class Sharded(Reverse):
    """The linear layers of both players are shared out over the processes."""

    blocks = (torch.nn.Linear,)


def train(folder: Path, batch: int) -> None:
    """A linear layer with a discriminator; tokenizers with an EMA codebook and with entropies, both with a GAN."""
    accelerator = Accelerator(cpu=True)
    small: dict[str, Any] = dict(train_batch_size=batch, max_train_steps=STEPS, lr_warmup_steps=0)
    loop_in(folder / "reverse", task=Reverse(noise=0.0), **small).train()
    # stopped half-way: whole tensors in a checkpoint, cut again after it
    shard = accelerator.num_processes > 1
    loop_in(folder / "sharded", task=Sharded(noise=0.0), shard=shard, **small).train(stop_at=2)
    again = loop_in(folder / "sharded", task=Sharded(noise=0.0), shard=shard, **small)
    assert again.resume("latest") and all(is_sharded(p) == shard for p in again.task.model.parameters())
    again.run()
    for name in ("local_vq", "wetok"):
        torch.manual_seed(5)
        settings = recipe(max_train_steps=STEPS, train_batch_size=batch, gan_weight=0.1, gan_start=1, lecam_weight=0.1,
                          adaptive_weight=True, discriminator_norm="none", discriminator_channels=4,
                          discriminator_layers=2, learning_rate=1e-3, gradient_accumulation_steps=2, logging_steps=2)
        model = make_tokenizer(name, MODEL_ARGS[name])
        # dead words are revived by latents of the first process, which one process has not alone
        model.quantizer.dead_below = 0.0  # type: ignore[union-attr]
        task = TokenizerTask(model, settings)
        # Adam divides by gradients that may be rounding alone; plain steps show the gradients themselves
        task.optimizer = lambda player, recipe, task=task: torch.optim.SGD(  # type: ignore[method-assign,misc]
            task.parameter_groups(player, recipe), lr=1.0)
        Loop(task, settings, accelerator, Pictures(), folder / name).train()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo")
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    """All weights, averages of weights, codebooks and statistics, to 1e-5."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = ("import sys\nfrom pathlib import Path\nimport torch\nfrom tests.test_training_parallel import train\n"
            "torch.set_num_threads(1)\ntrain(Path(sys.argv[1]), 2)\n")
    places = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"} for r in (0, 1)]
    both = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "two")], cwd=ROOT,
                             env={**os.environ, **place}, stderr=subprocess.PIPE, text=True) for place in places]
    train(tmp_path / "one", 4)
    messages = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], messages
    for name in ("reverse", "local_vq", "wetok", "sharded"):
        one, two = (tmp_path / n / name / f"checkpoint-{STEPS}" for n in ("one", "two"))
        assert '"processes": 2' in (two / "state.json").read_text()
        for file in sorted(one.glob("*.safetensors")):
            a, b = load_file(file), load_file(two / file.name)
            assert a.keys() == b.keys()
            for key, tensor in a.items():
                torch.testing.assert_close(b[key], tensor, atol=1e-5, rtol=0, msg=f"{name} {key}")
    a, b = (torch.load(tmp_path / n / "sharded" / "model" / "weights.pt", weights_only=True) for n in ("one", "two"))
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        torch.testing.assert_close(b[key], tensor, atol=1e-5, rtol=0, msg=key)
    moved = load_file(tmp_path / "one" / "local_vq" / f"checkpoint-{STEPS}" / "discriminator.safetensors")
    assert moved["lecam.ema_fake"] != 0
