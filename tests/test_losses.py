"""Losses and discriminators against the fixtures of WeTok and SC-VAE, and against first principles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fixtures import Fixture
from tests.shared import needs_shared
from vtc.errors import ConfigError
from vtc.tokenizers import losses
from vtc.tokenizers.discriminators import BlurPatchGAN, PatchGAN, SpectralDiscriminator
from vtc.tokenizers.losses import LeCAM, discriminator_loss, generator_loss
from vtc.tokenizers.scale_consistent_vae import doubled_conv

FIXTURES = needs_shared("fixtures")
CLOSE: dict[str, Any] = dict(rtol=1e-4, atol=0)


def upstream_discriminator(fixture: Fixture) -> torch.nn.Module:
    config = fixture.config["disc"]
    model = (BlurPatchGAN(config["disc_hidden_channels"], config["disc_num_stages"]) if config.get("use_blur")
             else PatchGAN(config["disc_ndf"], config["disc_num_layers"]))
    model.load_state_dict(fixture.weights())
    return model


@FIXTURES
@pytest.mark.parametrize("name", ["wetok_losses_patchgan", "wetok_losses_blurdisc"])
def test_wetok_losses_equal_upstream(name):
    """In the order of the fixture, because the batch norms of the PatchGAN remember what passed through."""
    fixture = Fixture(name)
    config = fixture.config
    discriminator = upstream_discriminator(fixture).train()
    real, fake = fixture["real"], fixture["fake"].clone().requires_grad_(True)
    weighted = config["codebook_weight"] * fixture["entropy_aux_loss"] + config["commit_weight"] * fixture["commitment"]

    terms = generator_loss(fake, real, discriminator(fake), weighted, adversarial_weight=config["gen_loss_weight"])
    torch.testing.assert_close(terms["loss"], fixture["gen_loss"], **CLOSE)
    torch.testing.assert_close(terms["pixel"], fixture["nll_loss"], **CLOSE)
    torch.testing.assert_close(config["gen_loss_weight"] * terms["adversarial"], fixture["g_loss_weighted"], **CLOSE)
    (grad,) = torch.autograd.grad(terms["loss"], fake)
    torch.testing.assert_close(grad, fixture["gen_grad_wrt_recon"], rtol=1e-3, atol=1e-6)

    second_stage = generator_loss(fake, real, discriminator(fake), adversarial_weight=config["gen_loss_weight"])
    torch.testing.assert_close(second_stage["loss"], fixture["stage2_gen_loss"], **CLOSE)

    lecam = LeCAM()
    for step in ("step1", "step2"):
        of_real, of_fake = discriminator(real), discriminator(fake.detach())
        terms = discriminator_loss(of_real, of_fake, lecam, config["lecam_loss_weight"])
        torch.testing.assert_close(terms["loss"], fixture[f"disc_loss_{step}"], **CLOSE)
        torch.testing.assert_close(terms["lecam"], fixture[f"lecam_{step}"], **CLOSE)
        if step == "step1":
            torch.testing.assert_close(terms["adversarial"], fixture["hinge_step1"], **CLOSE)
            torch.testing.assert_close(lecam.ema_real, fixture["lecam_ema_real_step1"], **CLOSE)
            torch.testing.assert_close(lecam.ema_fake, fixture["lecam_ema_fake_step1"], **CLOSE)
    discriminator.eval()
    torch.testing.assert_close(discriminator(real), fixture["logits_real_eval"], rtol=0, atol=1e-4)
    torch.testing.assert_close(discriminator(fake), fixture["logits_fake_eval"], rtol=0, atol=1e-4)


@FIXTURES
@torch.no_grad()
def test_spectral_discriminator_equals_upstream():
    fixture = Fixture("scvae/discriminator_tiny")
    model = SpectralDiscriminator(32).eval()
    model.load_state_dict(fixture.weights())
    torch.testing.assert_close(model(fixture["x"]), fixture["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("depth", "widths"), [
    (4, [8, 16, 32, 64]), (5, [8, 16, 32, 64, 64]), (6, [8, 16, 32, 64, 64, 64]), (7, [4, 8, 16, 32, 64, 64, 64])])
def test_spectral_discriminator_has_the_published_widths_at_any_depth(depth, widths):
    """max(depth - 3, 3) doublings up to the width of the end."""
    layers = [m for m in SpectralDiscriminator(64, depth).encoder if isinstance(m, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in layers] == widths
    assert [layer.in_channels for layer in layers] == [3, *widths[:-1]]


@FIXTURES
def test_sc_vae_losses_equal_upstream():
    fixture = Fixture("scvae/scvae_losses")
    expected, weights = fixture.facts["scalars"], fixture.facts["weights"]
    discriminator = SpectralDiscriminator(32).eval()
    discriminator.load_state_dict(Fixture("scvae/discriminator_tiny").weights())
    target, features, weight = fixture["target"], fixture["feat"], fixture["conv_out_weight"].requires_grad_(True)
    pred = fixture["pred"]
    measured: dict[str, Tensor] = {
        "mse": F.mse_loss(pred, target),
        "lpips_standin_l1": F.l1_loss(pred, target),
        "gen": losses.hinge_generator_loss(discriminator(pred)),
        "sc": losses.scale_consistency_loss(features, fixture["teacher_feat"]),
        # SC-VAE adds the two halves where others take their mean.
        "d_hinge": 2 * losses.hinge_discriminator_loss(discriminator(target), discriminator(pred)),
        "d_gp": 10 * losses.gradient_penalty(discriminator, target),
        "patch_mse": losses.patch_mse(pred, target),
    }
    # The prediction was made by SC-VAE's head, one pixel off, and clamped.
    output = doubled_conv(features, weight, None, "upstream").clamp(-1, 1)
    torch.testing.assert_close(output, pred, atol=1e-5, rtol=0)
    perceptual, adversarial = F.l1_loss(output, target), losses.hinge_generator_loss(discriminator(output))
    measured["adaptive_weight"] = losses.adaptive_weight(perceptual, adversarial, weight, compat="sc_vae")
    for name, value in measured.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-4), name
    total = (measured["mse"] + weights["lpips"] * measured["lpips_standin_l1"]
             + weights["gen"] * measured["adaptive_weight"] * measured["gen"] + weights["sc"] * measured["sc"])
    assert total.item() == pytest.approx(expected["total"], rel=1e-4)


def test_scale_consistency_is_the_mse_of_the_doubled_map():
    student, teacher = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 8, 10, requires_grad=True)
    loss = losses.scale_consistency_loss(student, teacher)
    plain = F.mse_loss(F.interpolate(student, scale_factor=2.0), teacher.detach())
    torch.testing.assert_close(loss, plain)
    ours, theirs = torch.autograd.grad(loss, student)[0], torch.autograd.grad(plain, student)[0]
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ConfigError, match="twice"):
        losses.scale_consistency_loss(student, teacher[..., :8])


def test_adversarial_losses_at_points_that_can_be_checked_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-0.5, 1.0])
    assert losses.hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 1.25))
    assert losses.hinge_generator_loss(fake).item() == pytest.approx(-0.25)
    ones, zeros = torch.ones(2), torch.zeros(2)
    cross_entropy = F.binary_cross_entropy_with_logits
    assert losses.vanilla_discriminator_loss(real, fake).item() == pytest.approx(
        0.5 * (cross_entropy(real, ones) + cross_entropy(fake, zeros)).item())
    assert losses.non_saturating_generator_loss(fake).item() == pytest.approx(cross_entropy(fake, ones).item())
    patches = torch.tensor([[[[1.0, -3.0]]], [[[0.0, 4.0]]]])
    assert losses.non_saturating_generator_loss(patches, True).item() == pytest.approx(
        cross_entropy(torch.tensor([-1.0, 2.0]), ones).item())


def test_lecam_pulls_towards_the_other_kind():
    lecam = LeCAM(decay=0.5)
    value = lecam(torch.full((4,), 2.0), torch.full((4,), -2.0))
    assert (lecam.ema_real.item(), lecam.ema_fake.item()) == (1.0, -1.0)
    assert value.item() == pytest.approx(3.0**2 + 3.0**2)
    assert not list(lecam.parameters())
    assert set(lecam.state_dict()) == {"ema_real", "ema_fake"}


def test_adaptive_weight_levels_the_gradients():
    weight = torch.randn(5, requires_grad=True)
    reference, adversarial = (3 * weight).sum(), (0.01 * weight).sum()
    scale = losses.adaptive_weight(reference, adversarial, weight, compat="sc_vae")
    assert not scale.requires_grad
    assert scale.item() == pytest.approx(300, rel=1e-4)
    assert losses.adaptive_weight(reference, 0 * adversarial, weight).item() == pytest.approx(1e4)


def test_gradient_penalty_of_a_plane_is_its_slope():
    slope = torch.zeros(3, 4, 4)
    slope[0, 0, 0] = 3.0
    slope.requires_grad_(True)
    penalty = losses.gradient_penalty(lambda x: (x * slope).sum((1, 2, 3)), torch.randn(2, 3, 4, 4))
    assert penalty.item() == pytest.approx(4.0)
    penalty.backward()
    assert slope.grad is not None and slope.grad[0, 0, 0].item() == pytest.approx(4.0)


@pytest.mark.parametrize("make", [lambda: PatchGAN(8, 2, "none"), lambda: PatchGAN(8, 2, "group"),
                                  lambda: BlurPatchGAN(32, 2), lambda: BlurPatchGAN(32, 2, blur=False)])
def test_discriminators_without_batch_statistics_judge_each_image_alone(make):
    torch.manual_seed(0)
    model = make().train()
    images = torch.randn(3, 3, 37, 50)
    together = model(images)
    torch.testing.assert_close(together[1:2], model(images[1:2]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("make", "least"), [
    (lambda: PatchGAN(8, 1), (6, 6)), (lambda: PatchGAN(8, 3), (24, 24)), (lambda: PatchGAN(8, 2, "group"), (12, 12)),
    (lambda: BlurPatchGAN(32, 2), (1, 1)), (lambda: BlurPatchGAN(32, 2, blur=False), (4, 4)),
    (lambda: SpectralDiscriminator(8, 3), (1, 9))])
@pytest.mark.parametrize("training", [False, True])
def test_the_smallest_images_are_judged_and_smaller_ones_refused(make, least, training):
    torch.manual_seed(0)
    model = make().train(training)
    height, width = least
    images = torch.randn(1, 3, height, width, requires_grad=True)
    logits = model(images)
    assert logits.numel() and logits.isfinite().all()
    logits.sum().backward()
    assert images.grad is not None and images.grad.isfinite().all()
    with pytest.raises(ConfigError, match=r"needs .* pixels, not images of"):
        model(torch.randn(1, 3, height, width - 1))
    with pytest.raises(ConfigError, match=r"\(B, 3, H, W\)"):
        model(torch.randn(3, 64, 64))


def test_wrong_settings_say_so():
    with pytest.raises(ConfigError, match="norm"):
        PatchGAN(norm="layer")
    with pytest.raises(ConfigError, match="32"):
        BlurPatchGAN(20)
