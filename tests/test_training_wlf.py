"""Wavelet-weighted flow matching: times, packing, the loss against PyWavelets, prompts beside their pictures."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import pywt
import torch
from PIL import Image
from torch import Tensor

from tests.shared import ROOT
from vtc.errors import ConfigError, ModelError, TrainingError
from vtc.tokenizers.diffusers_adapters import AutoencoderKL, DiffusersAutoencoder
from vtc.tokenizers.scale_consistent_vae import ScaleConsistentVAE
from vtc.training.sources import open_pictures
from vtc.training.wlf import (
    FlowTransformer,
    FluxTransformer2DModel,
    PromptedPictures,
    PromptEmbeddings,
    SD3Transformer2DModel,
    WLFTask,
    draw_sigmas,
    pack,
    save_prompt_embeddings,
    unpack,
)
from vtc.training.wlf_recipe import WLFRecipe

finetune_wlf = import_module("scripts.finetune_wlf")
CONFIGS = ROOT / "scripts/configs"


def autoencoder(channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                         block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels)


def transformer(name: str = "sd3") -> FlowTransformer:
    torch.manual_seed(1)
    return FlowTransformer.from_config(CONFIGS / f"{name}_debug.json", guidance=2.5)


def batch(count: int = 2, side: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"pixels": torch.randint(0, 256, (count, 3, side, side), generator=generator).to(torch.uint8),
            "prompt": torch.randn(count, 5, 12, generator=generator),
            "pooled": torch.randn(count, 8, generator=generator)}


@pytest.fixture
def photographs(tmp_path):
    """Three pictures, each of one grey level."""
    for i in range(3):
        (tmp_path / "photographs/cats").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 48), (80 * i,) * 3).save(tmp_path / f"photographs/cats/{i}.png")
    return tmp_path / "photographs"


def prompts(path: Path, names: list[str]) -> Path:
    rows = torch.arange(len(names)).float()
    save_prompt_embeddings(path, names, rows.view(-1, 1, 1).expand(-1, 5, 12), rows.view(-1, 1).expand(-1, 8))
    return path


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "mode"])
def test_times_are_those_of_diffusers(sampling):
    from diffusers.training_utils import compute_density_for_timestep_sampling  # behind vtc's guard of torchvision

    torch.manual_seed(7)
    theirs = compute_density_for_timestep_sampling(sampling, 500, logit_mean=0.2, logit_std=0.8, mode_scale=1.29)
    torch.manual_seed(7)
    ours = draw_sigmas(500, sampling, mean=0.2, deviation=0.8)
    torch.testing.assert_close(ours, theirs.clamp(0.001, 1), atol=1e-6, rtol=0)
    torch.manual_seed(7)
    shifted = draw_sigmas(500, sampling, 3.0, 0.2, 0.8)
    torch.testing.assert_close(shifted, (3 * theirs / (1 + 2 * theirs)).clamp(0.001, 1), atol=1e-6, rtol=0)


def test_packing_puts_two_by_two_latents_at_one_position():
    latents = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    packed = pack(latents)
    assert packed.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            square = latents[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(2, 12)
            assert torch.equal(packed[:, 3 * row + column], square)
    assert torch.equal(unpack(packed, 2, 3), latents)


@torch.no_grad()
def test_sd3_and_flux_are_called_as_diffusers_wants_them():
    inputs, sigma = batch(), torch.tensor([0.3, 0.9])
    noisy = torch.randn(2, 4, 8, 12)
    sd3 = transformer().eval()
    theirs = sd3.model(noisy, inputs["prompt"], inputs["pooled"], sigma * 1000).sample
    torch.testing.assert_close(sd3(noisy, sigma, inputs["prompt"], inputs["pooled"]), theirs)
    flux = transformer("flux").eval()
    places = torch.tensor([[0, row, column] for row in range(4) for column in range(6)]).float()
    theirs = flux.model(pack(noisy), inputs["prompt"], inputs["pooled"], sigma, places, torch.zeros(5, 3),
                        torch.full((2,), 2.5)).sample
    torch.testing.assert_close(flux(noisy, sigma, inputs["prompt"], inputs["pooled"]), unpack(theirs, 4, 6))
    assert sd3.latent_channels == flux.latent_channels == 4


@pytest.mark.parametrize(("bands", "weighting"), [((1.0, 1.0, 1.0, 1.0), "none"), ((1.0, 2.0, 0.5, 3.0), "cosmap")])
def test_the_loss_is_the_weighted_distance_of_pywavelets_bands(bands, weighting):
    recipe = WLFRecipe(band_weights=bands, loss_weighting=weighting, timestep_sampling="logit_normal")
    task = WLFTask(transformer(), DiffusersAutoencoder(autoencoder()), recipe)
    torch.manual_seed(3)
    loss = task.losses("transformer", batch(), 0)["wavelet"]
    torch.manual_seed(3)
    clean = task.autoencoder.encode(batch()["pixels"] / 255, sample=True).values
    sigma = torch.randn(2).sigmoid()
    noise = torch.randn_like(clean)
    s = sigma.view(-1, 1, 1, 1)
    noisy = (1 - s) * clean + s * noise
    velocity = task.model(noisy, sigma, batch()["prompt"], batch()["pooled"])
    difference = (noisy - s * velocity - clean).detach().double().numpy()
    a, details = pywt.dwt2(difference, "haar", mode="zero")
    weight = (torch.ones(2) if weighting == "none" else 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2)))
    squares = np.stack([w * band**2 for w, band in zip(bands, (a, *details), strict=True)], 1)
    expected = (squares * weight.view(-1, 1, 1, 1, 1).numpy()).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    if weighting == "none":  # Parseval: the published loss is ordinary flow matching times s^2
        plain = (s * (velocity - (noise - clean))).square().mean()
        assert loss.item() == pytest.approx(plain.item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in task.model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in task.autoencoder.parameters())


def test_prompts_stay_with_their_pictures_also_where_one_is_broken(photographs, tmp_path):
    (photographs / "cats/3.png").write_bytes(b"no picture")
    file = PromptEmbeddings(prompts(tmp_path / "p.safetensors", ["cats/0", "cats/1", "cats/2.png", "cats/3"]))
    data = PromptedPictures(open_pictures(photographs), file, 32, seed=0)
    levels = {round(sample["pixels"].float().mean().item()): (sample["prompt"].unique().item(),
                                                              sample["pooled"].unique().item())
              for sample in (data[n] for n in range(12))}
    assert levels == {0: (0, 0), 80: (1, 1), 160: (2, 2)} and data.crops.broken == 1
    one = PromptEmbeddings(prompts(tmp_path / "one.safetensors", [""]))
    assert PromptedPictures(open_pictures(photographs), one, 32, seed=0)[1]["prompt"].shape == (5, 12)


def test_a_run_of_the_debug_configuration_leaves_a_transformer_of_diffusers(photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    autoencoder().save_pretrained(tmp_path / "vae")
    names = prompts(tmp_path / "p.safetensors", [f"cats/{i}" for i in range(3)])
    arguments = ["--config", str(CONFIGS / "wlf_debug.yaml"), "--vae", str(tmp_path / "vae"), "--prompt_embeddings",
                 str(names), "--train_data_dir", str(photographs), "--output_dir", str(tmp_path / "out"),
                 "--validation_data_dir", str(photographs), "--gradient_checkpointing"]
    assert finetune_wlf.main(arguments) == 0
    model = FlowTransformer.from_pretrained(tmp_path / "out/model")
    assert isinstance(model.model, SD3Transformer2DModel)
    errors = json.loads((tmp_path / "out/validation.jsonl").read_text().splitlines()[-1])
    assert {"error_a_2", "error_h_2", "error_d_1"} <= errors.keys() and errors["error_a_2"] > 0
    assert list((tmp_path / "out/samples").iterdir())
    other = ["--config", str(CONFIGS / "wlf_debug.yaml"), "--vae", str(tmp_path / "vae"), "--prompt_embeddings",
             str(names), "--train_data_dir", str(photographs), "--transformer", str(tmp_path / "out/model")]
    assert finetune_wlf.main([*other, "--output_dir", str(tmp_path / "two")]) == 1  # one with random weights as well


def test_a_flux_run_on_latents_of_an_scvae_moves_the_transformer_alone(tmp_path):
    torch.manual_seed(0)
    vae = ScaleConsistentVAE(**{k: v for k, v in autoencoder().config.items()
                                if not k.startswith("_") and k != "stride"}, stride=2, alignment="centered")
    vae.save_pretrained(tmp_path / "sc")
    loaded = DiffusersAutoencoder.from_pretrained(tmp_path / "sc")
    task = WLFTask(transformer("flux"), loaded, WLFRecipe())
    assert isinstance(task.model.model, FluxTransformer2DModel)
    assert task.latents(batch()["pixels"]).shape == (2, 4, 8, 8)
    task.losses("transformer", batch(), 0)["wavelet"].backward()
    with pytest.raises(ConfigError, match="multiple of 8"):
        task.latents(batch(side=36)["pixels"])


def test_mistakes_are_told_in_a_sentence(photographs, tmp_path):
    with pytest.raises(ConfigError, match="latents have 8 channels, and the transformer takes 4"):
        WLFTask(transformer(), DiffusersAutoencoder(autoencoder(8)), WLFRecipe())
    task = WLFTask(transformer(), DiffusersAutoencoder(autoencoder()), WLFRecipe())
    save_prompt_embeddings(tmp_path / "wide.safetensors", [""], torch.zeros(1, 5, 13), torch.zeros(1, 8))
    with pytest.raises(ConfigError, match=r"widths \(13, 8\)"):
        task.check(PromptEmbeddings(tmp_path / "wide.safetensors"))
    some = PromptEmbeddings(prompts(tmp_path / "some.safetensors", ["cats/0", "cats/1"]))
    with pytest.raises(ConfigError, match=r"no prompt for cats/2\.png"):
        PromptedPictures(open_pictures(photographs), some, 32, seed=0)
    with pytest.raises(ConfigError, match="one row"):
        save_prompt_embeddings(tmp_path / "x", ["a", "a"], torch.zeros(2, 1, 1), torch.zeros(2, 1))
    (tmp_path / "no.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ModelError, match="no configuration of SD3"):
        FlowTransformer.from_config(tmp_path / "no.json")
    with pytest.raises(ModelError, match="No transformer of diffusers"):
        FlowTransformer.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds no prompt embeddings"):
        PromptEmbeddings(tmp_path / "no.json")
    for broken in photographs.rglob("*.png"):
        broken.write_bytes(b"no picture")
    one = PromptEmbeddings(prompts(tmp_path / "one.safetensors", [""]))
    with pytest.raises(TrainingError, match="look at the data"):
        PromptedPictures(open_pictures(photographs), one, 32, seed=0)[0]
    for settings in ({"sigma_shift": 0.0}, {"sample_steps": -1}, {"timestep_sampling": "cubic"}):
        with pytest.raises(ConfigError):
            WLFRecipe(**settings)
