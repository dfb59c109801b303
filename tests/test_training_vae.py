"""Training of autoencoders: the terms against independent forms and upstream's numbers, what learns and what rests."""

from __future__ import annotations

import json
import math
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from tests.fixtures import Fixture
from tests.shared import ROOT, needs_shared
from vtc.errors import ConfigError
from vtc.tokenizers.diffusers_adapters import AutoencoderKL, DiffusersAutoencoder
from vtc.tokenizers.discriminators import PatchGAN, SpectralDiscriminator
from vtc.tokenizers.patch_vae import PatchVAE
from vtc.tokenizers.scale_consistent_vae import ScaleConsistentVAE, doubled_conv
from vtc.training import vae
from vtc.training.data import RandomCrops
from vtc.training.loop import Loop
from vtc.training.vae import (
    KLAutoencoder,
    KLTask,
    PatchAutoencoder,
    ScaleConsistentStudent,
    ScaleConsistentTask,
    teacher_features,
)
from vtc.training.vae_recipe import KLRecipe, ScaleConsistentRecipe

train_vae = import_module("scripts.train_vae")
CONFIGS = ROOT / "scripts/configs"
NETWORK: dict[str, Any] = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                               block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4)


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        blocks = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        (tmp_path / "photographs").mkdir(exist_ok=True)
        Image.fromarray(blocks).save(tmp_path / "photographs" / f"{i}.png")
    return tmp_path / "photographs"


def small(**settings) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**{**NETWORK, **settings})


def batch(count: int = 2, side: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def pair(**settings) -> tuple[ScaleConsistentStudent, ScaleConsistentVAE]:
    torch.manual_seed(0)
    student = ScaleConsistentVAE(**NETWORK, stride=2, **settings)
    teacher = ScaleConsistentVAE(**NETWORK, stride=1)
    teacher.load_state_dict(student.state_dict())
    return ScaleConsistentStudent(student), teacher


def test_the_divergence_of_a_kl_autoencoder_is_that_of_torch():
    model = KLAutoencoder(small())
    images = vae.symmetric(batch())
    posterior = model.model.encode(images).latent_dist
    expected = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(model(images).nats, expected, rtol=1e-4, atol=1e-4)


def test_the_divergence_of_a_uniform_posterior_is_its_integral():
    model = PatchAutoencoder(PatchVAE(channels=6, width=8, depth=1), step=0.7)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    means = model.model.encode(images * 0.5 + 0.5).values.double().flatten(1)
    # the mean over the interval, by the midpoints of 2000 parts, of log(density / normal density)
    places = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000 - 0.5
    x = means[..., None] + 0.7 * places
    expected = (-math.log(0.7) - Normal(0.0, 1.0).log_prob(x)).mean(-1).sum(1)
    torch.testing.assert_close(model(images).nats.double(), expected, rtol=1e-5, atol=1e-3)


def test_a_step_of_the_kl_task_is_pixels_divergence_and_the_balanced_adversary():
    recipe = KLRecipe(kl_weight=0.01, adversarial_weight=0.5, perceptual_weight=2.0, discriminator_start=3)
    torch.manual_seed(0)
    critic = PatchGAN(4, 1, "none")

    class Distance(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a - b).square().flatten(1).mean(1)

    task = KLTask(KLAutoencoder(small()), recipe, critic, Distance())
    assert task.losses("discriminator", batch(), 2) == {}
    torch.manual_seed(5)
    assert task.losses("vae", batch(), 2).keys() == {"pixel", "perceptual", "kl"}
    torch.manual_seed(5)
    terms = task.losses("vae", batch(), 3)
    torch.manual_seed(5)
    images = batch().float() / 127.5 - 1
    output, nats = task.players["vae"](images)
    torch.testing.assert_close(terms["pixel"], (output - images).abs().mean())
    torch.testing.assert_close(terms["perceptual"], 2 * F.mse_loss(output / 2, images / 2))
    torch.testing.assert_close(terms["kl"], 0.01 * nats.mean() / (3 * 32 * 32))
    weight = task.players["vae"].last_layer
    (towards,) = torch.autograd.grad(terms["pixel"] + terms["perceptual"], weight, retain_graph=True)
    (against,) = torch.autograd.grad(terms["adversarial"], weight, retain_graph=True)
    (plain,) = torch.autograd.grad(-critic(output).mean(), weight, retain_graph=True)
    balance = towards.norm() / (plain.norm() + 1e-4)
    torch.testing.assert_close(against.norm(), 0.5 * balance * plain.norm(), rtol=1e-3, atol=0)
    hinge = task.losses("discriminator", batch(), 3)["hinge"]
    torch.testing.assert_close(hinge, (F.relu(1 - critic(images)).mean() + F.relu(1 + critic(output)).mean()) / 2)


def test_eq_vae_compares_transformed_latents_with_transformed_images(monkeypatch):
    recipe = KLRecipe(eq_prior=0.0, adversarial_weight=0.0, perceptual_weight=0.0)
    monkeypatch.setattr(vae, "draw_transform", lambda: (0.5, 1))
    task = KLTask(KLAutoencoder(small()), recipe, None, None)
    torch.manual_seed(5)
    terms = task.losses("vae", batch(), 0)
    torch.manual_seed(5)
    torch.rand(())  # the lot that was drawn
    images = batch().float() / 127.5 - 1
    model = task.players["vae"].model

    def half_and_clockwise(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2).flip(-2).transpose(-1, -2)

    output = model.decode(half_and_clockwise(model.encode(images).latent_dist.sample())).sample
    torch.testing.assert_close(terms["pixel"], (output - half_and_clockwise(images)).abs().mean())


@needs_shared("fixtures", "scvae")
def test_the_scale_consistent_terms_equal_upstream(monkeypatch):
    """The fixture's perceptual term is L1, and its student a feature map and the head's weight."""
    fixture = Fixture("scvae/scvae_losses")
    expected = fixture.facts["scalars"]

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last_layer = nn.Parameter(fixture["conv_out_weight"])

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return doubled_conv(fixture["feat"], self.last_layer, None, "upstream").clamp(-1, 1), fixture["feat"]

    class Absolute(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return 2 * (a - b).abs().flatten(1).mean(1)  # of images in [0, 1]

    monkeypatch.setattr(vae, "symmetric", lambda images: images)
    monkeypatch.setattr(vae, "teacher_features", lambda teacher, images: fixture["teacher_feat"])
    critic = SpectralDiscriminator(32).eval()
    critic.load_state_dict(Fixture("scvae/discriminator_tiny").weights())
    task = ScaleConsistentTask(Student(), pair()[1], ScaleConsistentRecipe(), critic, Absolute())
    terms = task.losses("vae", fixture["target"], 0)
    assert sum(term.item() for term in terms.values()) == pytest.approx(expected["total"], rel=1e-4)
    assert task.losses("discriminator", fixture["target"], 0) == {} == task.losses("vae", fixture["target"], 1)
    terms = task.losses("discriminator", fixture["target"], 1)
    assert terms["hinge"].item() == pytest.approx(expected["d_hinge"], rel=1e-4)
    assert terms["penalty"].item() == pytest.approx(expected["d_gp"], rel=1e-4)


def test_the_students_features_are_held_to_the_teachers():
    student, teacher = pair()
    recipe = ScaleConsistentRecipe(adversarial_weight=0, perceptual_weight=0)
    task = ScaleConsistentTask(student, teacher, recipe, None, None)
    torch.manual_seed(3)
    terms = task.losses("vae", batch(), 0)
    torch.manual_seed(3)
    images = batch().float() / 127.5 - 1
    output, features = student(images)
    theirs = teacher_features(teacher, images)
    torch.testing.assert_close(terms["consistency"], F.mse_loss(F.interpolate(features, scale_factor=2.0), theirs))
    torch.testing.assert_close(terms["pixel"], F.mse_loss(output, images))
    assert float(output.detach().abs().max()) <= 1 and theirs.shape == (2, 8, 32, 32)


def sc_task(**settings) -> ScaleConsistentTask:
    student, teacher = pair()
    recipe = ScaleConsistentRecipe(**{**dict(
        perceptual_weight=0.0, max_train_steps=6, train_batch_size=2, resolution=32, checkpointing_steps=3,
        validation_steps=0, learning_rate=1e-3, report_to="none", dataloader_num_workers=0), **settings})
    return ScaleConsistentTask(student, teacher, recipe, SpectralDiscriminator(16, 3), None)


def test_scale_consistent_training_moves_the_decoder_alone_and_goes_on_to_the_bit(photographs, tmp_path):
    """Also from a checkpoint between a turn of the decoder and one of the discriminator."""
    accelerator = Accelerator(cpu=True)
    finished = []
    for name, stops in (("whole", (6,)), ("parts", (3, 6))):
        for stop in stops:
            task = sc_task()
            before = {key: tensor.clone() for key, tensor in task.players["vae"].state_dict().items()}
            teacher = {key: tensor.clone() for key, tensor in task.teacher.state_dict().items()}
            crops = RandomCrops(sorted(photographs.iterdir()), 32, 0)
            loop = Loop(task, task.recipe, accelerator, crops, tmp_path / name)
            loop.resume()
            loop.train(stop_at=stop)
        finished.append(task.players["vae"].state_dict())
    for key, tensor in finished[0].items():
        assert torch.equal(tensor, finished[1][key]), key
        changed = not torch.equal(tensor, before[key])
        assert changed == key.startswith("model.decoder."), key
    assert all(torch.equal(tensor, teacher[key]) for key, tensor in task.teacher.state_dict().items())
    logs = [json.loads(line) for line in (tmp_path / "whole" / "train.jsonl").read_text().splitlines()]
    assert {"vae/consistency", "vae/adversarial", "discriminator/penalty"} <= logs[-1].keys()


def test_without_turns_both_learn_in_every_step():
    task = sc_task(alternate=False)
    for step in (0, 1):
        assert "adversarial" in task.losses("vae", batch(), step)
        assert "penalty" in task.losses("discriminator", batch(), step)


@pytest.mark.parametrize("name", ["kl", "eq", "patch"])
def test_the_debug_configurations_train_and_their_models_load(photographs, tmp_path, name):
    arguments = ["--config", str(CONFIGS / f"vae_{name}_debug.yaml"), "--train_data_dir", str(photographs),
                 "--validation_data_dir", str(photographs), "--output_dir", str(tmp_path / "out")]
    assert train_vae.main(arguments) == 0
    image = torch.rand(1, 3, 30, 41)
    model = (PatchVAE if name == "patch" else DiffusersAutoencoder).from_pretrained(tmp_path / "out/model")
    assert model.decode(model.encode(image)).shape == image.shape
    measured = json.loads((tmp_path / "out/validation.jsonl").read_text().splitlines()[-1])
    assert measured["psnr"] > 5 and 0 < measured["ssim"] <= 1
    assert list((tmp_path / "out/samples").iterdir())


def test_the_scale_consistent_debug_configuration_starts_from_any_autoencoder(photographs, tmp_path):
    small().save_pretrained(tmp_path / "f2")
    arguments = ["--config", str(CONFIGS / "vae_sc_debug.yaml"), "--train_data_dir", str(photographs),
                 "--init_from", str(tmp_path / "f2"), "--output_dir", str(tmp_path / "out")]
    assert train_vae.main(arguments) == 0
    model = DiffusersAutoencoder.from_pretrained(tmp_path / "out/model")
    assert model.downsample == 4 and model.model.config.alignment == "centered"
    latents = model.encode(torch.rand(1, 3, 32, 32))
    assert latents.values.shape == (1, 4, 8, 8)


def test_mistakes_are_told_in_a_sentence(photographs, tmp_path, capsys):
    def said(*arguments: str) -> str:
        base = ["--train_data_dir", str(photographs), "--output_dir", str(tmp_path / "out"), "--perceptual_weight", "0"]
        assert train_vae.main([*base, *arguments]) == 1
        return capsys.readouterr().err

    assert "give its folder as --init_from" in said("--objective", "scale_consistent")
    assert "cannot be made of" in said("--model_args", "wings=2")
    assert "No autoencoder of diffusers" in said("--init_from", str(tmp_path))
    with pytest.raises(ConfigError, match="eq_prior is a share"):
        KLRecipe(eq_prior=1.5)
    with pytest.raises(ConfigError, match="kl_weight is not below 0"):
        KLRecipe(kl_weight=-1.0)
    with pytest.raises(ConfigError, match="stride 2"):
        ScaleConsistentStudent(ScaleConsistentVAE(**NETWORK, stride=1))
    with pytest.raises(SystemExit):
        train_vae.main(["--kl_weight", "1", "--objective", "scale_consistent"])
