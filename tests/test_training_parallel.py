"""Two processes over gloo train what one with twice the batch trains: gradients, averages, codebooks, LeCAM.

They are started by `accelerate launch` with the configuration for FSDP that is shipped, so the loops that ask for an
accelerator by `make_accelerator` share weights out, and must end where those do that hold whole models.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from tests.shared import ROOT
from tests.test_training import MODEL_ARGS, recipe
from tests.test_training_generator import SIDES, pyramid
from tests.test_training_generator import recipe as generator_recipe
from tests.test_training_loop import Reverse, loop_in
from tests.test_training_loop import recipe as loop_recipe
from tests.test_training_vae import small
from vtc.errors import ConfigError
from vtc.generators.infinity import Infinity
from vtc.generators.llamagen import LlamaGen
from vtc.generators.var import VAR
from vtc.tokenizers.infinity_vae import InfinityVAE
from vtc.training.accelerate_config import follow_accelerate_config
from vtc.training.generator import InfinityTask, RasterTask, VARTask
from vtc.training.loop import Loop, Recipe, Task, make_accelerator
from vtc.training.sharding import is_sharded, kinds_to_shard
from vtc.training.tokenizer import TokenizerTask, make_tokenizer
from vtc.training.vae import KLAutoencoder, KLTask
from vtc.training.vae_recipe import KLRecipe
from vtc.training.validation import Options, Validation, validation_measures

STEPS = 4
CHEAP = ["psnr", "lattice", "codebook"]
FSDP = ROOT / "scripts/configs/fsdp.yaml"


class Pictures(torch.utils.data.Dataset):
    """Sample n is a picture drawn from n."""

    side = 16

    def __getitem__(self, n):
        generator = torch.Generator().manual_seed(n)
        return torch.randint(256, (3, self.side, self.side), dtype=torch.uint8, generator=generator)


class Words(torch.utils.data.Dataset):
    """Sample n is a grid of tokens, or grids, and a label."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __getitem__(self, n):
        return torch.randint(16, (self.tokens, 1), generator=torch.Generator().manual_seed(n)), n % 2


class Prompted(Pictures):
    """A picture, text features and their mask."""

    side = 32

    def __getitem__(self, n):
        text = torch.randn(3, 8, generator=torch.Generator().manual_seed(n))
        return super().__getitem__(n), text, torch.ones(3, dtype=torch.bool)


class Sharded(Reverse):
    """The linear layers of both players are shared out over the processes."""

    blocks = (torch.nn.Linear,)


def with_plain_steps(task: Task) -> Task:
    """Adam divides by gradients that may be rounding alone; plain steps show the gradients themselves."""
    task.optimizer = lambda player, recipe: torch.optim.SGD(  # type: ignore[method-assign]
        task.parameter_groups(player, recipe), lr=1.0, momentum=0.5)
    return task


def train(folder: Path, batch: int) -> None:
    """A linear layer with a discriminator; tokenizers with an EMA codebook and with entropies, both with a GAN."""
    accelerator = Accelerator(cpu=True)
    alike: dict[str, Any] = dict(train_batch_size=batch, max_train_steps=STEPS, lr_warmup_steps=0)
    loop_in(folder / "reverse", task=Reverse(noise=0.0), **alike).train()
    # stopped half-way: whole tensors in a checkpoint, cut again after it
    shard = accelerator.num_processes > 1
    loop_in(folder / "sharded", task=Sharded(noise=0.0), shard=shard, **alike).train(stop_at=2)
    again = loop_in(folder / "sharded", task=Sharded(noise=0.0), shard=shard, **alike)
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
        held = Validation([Pictures()[n] / 255 for n in range(2)], validation_measures(CHEAP, Options()))
        task = with_plain_steps(TokenizerTask(model, settings, validation=held))
        Loop(task, settings, accelerator, Pictures(), folder / name).train()


def models() -> Iterator[tuple[str, Recipe, Task, Any]]:
    """(name, recipe, task, data) of each kind of model whose weights can be shared out."""
    tokens = generator_recipe(2, train_batch_size=2, learning_rate=0.3, sample_classes=1, checkpointing_steps=1)
    raster_tokens = pyramid((4,))
    torch.manual_seed(0)
    var = VAR(2, 32, 4, classes=2, codebook_size=16, code_dim=4, sides=SIDES)
    yield "var", tokens, VARTask(var, pyramid(), tokens), Words(21)
    torch.manual_seed(0)
    yield "llamagen", tokens, RasterTask(LlamaGen(2, 32, 4, 64, classes=2, codebook_size=16, side=4), raster_tokens,
                                         tokens), Words(16)
    torch.manual_seed(0)
    vae = InfinityVAE(4, 32, (1, 1, 1, 1), 1, sides=SIDES).eval()
    bits = Infinity(2, 32, 4, bits=4, text_width=8, text_tokens=3, pool_heads=2, chunks=1)
    held_out = [tuple(part[None] for part in Prompted()[9])]
    yield "infinity", tokens, InfinityTask(bits, vae, tokens, vae.scales(32, 32), held_out), Prompted()
    kl = KLRecipe(resolution=32, train_batch_size=2, max_train_steps=2, perceptual_weight=0.0, adversarial_weight=0.0,
                  learning_rate=0.1, report_to="none", dataloader_num_workers=0, checkpointing_steps=1)
    yield "vae", kl, KLTask(KLAutoencoder(small()), kl, None, None), Pictures()
    settings = recipe(max_train_steps=2, train_batch_size=2, learning_rate=0.1, checkpointing_steps=1)
    torch.manual_seed(0)
    model = make_tokenizer("var_vqvae", MODEL_ARGS["var_vqvae"])
    yield "var_vqvae", settings, TokenizerTask(model, settings), Pictures()


def train_shared_out(folder: Path) -> None:
    """Each model held whole, and by the launched configuration: stopped and resumed, computing activations again."""
    for name, settings, task, data in models():
        Loop(with_plain_steps(task), settings, Accelerator(cpu=True), data, folder / name / "whole").train()
    for stop in (1, 2):
        for name, settings, task, data in models():
            settings.gradient_checkpointing = True
            accelerator = make_accelerator(settings, folder / name / "shared")
            assert settings.shard and settings.reshard_after_forward and accelerator.num_processes == 2
            settings.reshard_after_forward = name != "llamagen"
            loop = Loop(with_plain_steps(task), settings, accelerator, data, folder / name / "shared")
            cut = sum(p.numel() for p in task.model.parameters() if is_sharded(p))
            assert cut > 0.5 * sum(p.numel() for p in task.model.parameters()), name
            assert loop.resume("latest") == (stop == 2)
            if stop == 1:
                loop.train(stop_at=1)
            else:
                loop.run()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder in which two processes trained."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs torch with gloo")
    folder = tmp_path_factory.mktemp("two")
    script = folder / "both.py"
    script.write_text("import sys\nfrom pathlib import Path\nimport torch\n"
                      "from tests.test_training_parallel import train, train_shared_out\ntorch.set_num_threads(1)\n"
                      "train(Path(sys.argv[1]), 2)\ntrain_shared_out(Path(sys.argv[1]))\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--config_file", str(FSDP),
              "--num_processes", "2", "--main_process_port", str(port), str(script), str(folder)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], what: str) -> None:
    assert a.keys() == b.keys() and a
    for key, tensor in a.items():
        torch.testing.assert_close(b[key], tensor, atol=1e-5, rtol=0, msg=f"{what} {key}")


def test_two_processes_are_one_with_twice_the_batch(two_processes, tmp_path):
    """All weights, averages of weights, codebooks and statistics, to 1e-5."""
    train(tmp_path, 4)
    for name in ("reverse", "local_vq", "wetok", "sharded"):
        one, two = (folder / name / f"checkpoint-{STEPS}" for folder in (tmp_path, two_processes))
        assert '"processes": 2' in (two / "state.json").read_text()
        for file in sorted(one.glob("*.safetensors")):
            assert_close(load_file(file), load_file(two / file.name), name)
    a, b = (torch.load(folder / "sharded" / "model" / "weights.pt", weights_only=True)
            for folder in (tmp_path, two_processes))
    assert_close(a, b, "the finished model")
    for name in ("local_vq", "wetok"):  # measured by the main process, while the other one waits
        told = [json.loads((folder / name / "validation.jsonl").read_text()) for folder in (tmp_path, two_processes)]
        assert told[0] == pytest.approx({**told[1], "seconds": told[0]["seconds"]}, rel=1e-3)
        assert {"psnr", "codebook_usage"} <= told[0].keys()
    moved = load_file(tmp_path / "local_vq" / f"checkpoint-{STEPS}" / "discriminator.safetensors")
    assert moved["lecam.ema_fake"] != 0


@pytest.mark.parametrize("name", ["var", "llamagen", "infinity", "vae", "var_vqvae"])
def test_weights_that_are_shared_out_learn_what_whole_ones_do(two_processes, name):
    """By fsdp.yaml, resumed after the first step: weights, averages and momenta, to 1e-5."""
    whole, shared = (two_processes / name / kind for kind in ("whole", "shared"))
    start = load_file(whole / "checkpoint-1" / "average.safetensors")
    for file in sorted((whole / "checkpoint-2").glob("*.safetensors")):
        learned = load_file(file)
        assert_close(learned, load_file(shared / "checkpoint-2" / file.name), file.stem)
        assert any((learned[key] - start[key]).abs().max() > 1e-3 for key in start if key in learned)
    states = [torch.load(kind / "checkpoint-2" / "training.pt", weights_only=True)["optimizers"]
              for kind in (whole, shared)]
    norms = [sorted(float(state["momentum_buffer"].norm()) for player in optimizers.values()
                    for state in player["state"].values()) for optimizers in states]
    assert norms[0] == pytest.approx(norms[1], abs=1e-5) and max(norms[0]) > 1e-3
    assert (shared / "model").is_dir()


# ---- configurations -------------------------------------------------------------------------------------------------

LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_OFFLOAD_PARAMS": "false",
            "FSDP_FORWARD_PREFETCH": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


def test_settings_of_an_fsdp_configuration_become_the_recipes():
    plain = loop_recipe()
    assert follow_accelerate_config(plain, {"ACCELERATE_MIXED_PRECISION": "no"}) == [] and not plain.shard
    chosen = loop_recipe()
    told = follow_accelerate_config(chosen, {
        **LAUNCHED, "FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_ACTIVATION_CHECKPOINTING": "true",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block, Other", "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"})
    assert chosen.shard and chosen.gradient_checkpointing and not chosen.reshard_after_forward
    assert chosen.shard_classes == ("Block", "Other")
    assert [sentence.split(";")[0].split(" says ")[1] for sentence in told] == [
        "mixed_precision bf16", "gradient_accumulation_steps 4", "dynamo_backend inductor"]


@pytest.mark.parametrize(("settings", "message"), [
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not for this loop"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not for this loop"),
    ({**LAUNCHED, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "a parallelism_config is not for this loop"),
    ({**LAUNCHED, "FSDP_VERSION": "1"}, "knows FSDP 2 only: set fsdp_version: 2"),
    ({**LAUNCHED, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is not for this loop"),
    ({**LAUNCHED, "FSDP_FORWARD_PREFETCH": "True"}, "fsdp_forward_prefetch is not for this loop"),
    ({**LAUNCHED, "FSDP_IGNORED_MODULES": "head"}, "fsdp_ignored_modules is not for this loop"),
    ({**LAUNCHED, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "not SIZE_BASED_WRAP: models are shared out by their"),
    ({**LAUNCHED, "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "is true or false in FSDP 2, not FULL_SHARD"),
])
def test_what_the_loop_does_not_do_is_refused_by_its_name(settings, message, tmp_path, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        make_accelerator(loop_recipe(), tmp_path)


def test_the_shipped_configurations_say_what_accelerate_reads():
    from accelerate.commands.config import load_config_from_file

    fsdp, ddp = (load_config_from_file(str(ROOT / "scripts/configs" / name)) for name in ("fsdp.yaml", "ddp.yaml"))
    assert (fsdp.distributed_type, ddp.distributed_type) == ("FSDP", "MULTI_GPU")
    assert fsdp.num_processes == ddp.num_processes == 8
    assert fsdp.fsdp_config["fsdp_version"] == 2


def test_a_model_without_blocks_is_not_shared_out():
    with pytest.raises(ConfigError, match=r"^Linear has no blocks that could be shared out over processes"):
        kinds_to_shard(torch.nn.Linear(1, 1), (torch.nn.Conv2d,))
    model = LlamaGen(1, 32, 4, 64, classes=2, codebook_size=16, side=4)
    assert kinds_to_shard(model, RasterTask.blocks, ["Block"]) == RasterTask.blocks
    with pytest.raises(ConfigError, match="LlamaGen shares out Block, not Attention, Nothing: leave --shard_classes"):
        kinds_to_shard(model, RasterTask.blocks, ["Attention", "Block", "Nothing"])
