"""Training tokenizers: every network and quantizer learns, the discriminator's part, the codebook's start, stage 2."""

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from tests.shared import ROOT, SHARED, needs_shared
from tests.test_training_data import photographs  # noqa: F401  # a fixture
from vtc.errors import ConfigError
from vtc.eval.ssim import structural_similarity
from vtc.tokenizers.base import Tokenizer
from vtc.tokenizers.codebook_clustering import with_codebook
from vtc.tokenizers.composed import NETWORKS, QUANTIZERS, compose
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.losses import adaptive_weight
from vtc.tokenizers.lpips import LPIPS
from vtc.tokenizers.pyramid_vq import PyramidVQ
from vtc.tokenizers.tokenizer_family import FAMILY, TokenizerFamily
from vtc.tokenizers.wetok import WeTok
from vtc.training.data import RandomCrops, image_files
from vtc.training.loop import Loop
from vtc.training.perceptual import PerceptualLoss, RandomView
from vtc.training.tokenizer import MODELS, TokenizerRecipe, TokenizerTask, evaluate, make_tokenizer
from vtc.training.validation import Options, Validation, validation_measures

NARROW = {"channels": 32, "channel_multipliers": [1, 1, 1], "num_res_blocks": 1}  # f = 4
VQGAN = {**NARROW, "z_channels": 8}
LOCAL = {"encoder_widths": [8], "encoder_depths": [1], "decoder_widths": [8, 8], "decoder_depths": [1, 1], "thin": 4}
NETWORK_ARGS = {"vqgan": {**VQGAN, "mid_attention": False}, "wetok": NARROW, "local_vq": LOCAL}
VQ = {"codebook_size": 8, "dim": 4}
QUANTIZER_ARGS = {
    "vq": VQ, "gradient_vq": VQ, "ibq": VQ, "lfq": {"bits": 4}, "group_lfq": {"groups": 2, "bits": 3},
    "bsq": {"dim": 4, "group_bits": 2}, "fsq": {"levels": [5, 5, 3]},
    "product": {"quantizers": [{"quantizer": "vq", **VQ}, {"quantizer": "lfq", "bits": 2}]},
    "residual": {"quantizers": [{"quantizer": "gradient_vq", **VQ}, {"quantizer": "gradient_vq", **VQ}]},
    "multi_scale_vq": {**VQ, "scales": [1, 2, 4], "phis": 2}, "multi_scale_bsq": {"dim": 4, "scales": [1, 2, 4]}}
MODEL_ARGS: dict[str, dict[str, Any]] = {
    "local_vq": {"codebook_size": 16, "dim": 4, "encoder_widths": [8, 8, 8], "encoder_depths": [1, 1, 1],
                 "decoder_widths": [8, 8, 8, 8], "decoder_depths": [1, 1, 1, 1], "thin": 4},
    "pyramid_vq": {"codebook_size": 16, "dim": 4, "encoder_widths": [8, 8], "encoder_depths": [1, 1],
                   "decoder_widths": [8, 8, 8], "decoder_depths": [1, 1, 1], "thin": 4, "sides": [1, 2], "phis": 1},
    "vqgan": {**VQGAN, "codebook_size": 16, "embed_dim": 4, "attention_levels": []},
    "ibq": {**VQGAN, "codebook_size": 16, "embed_dim": 4, "attention_levels": []},
    "llamagen": {**VQGAN, "codebook_size": 16, "embed_dim": 4},
    "wetok": {**NARROW, "groups": 2, "bits_per_group": 4}, "open_magvit2": {**NARROW, "bits": 5},
    "var_vqvae": {**NARROW, "codebook_size": 16, "z_channels": 8, "sides": [1, 2, 4], "phis": 3},
    "infinity_vae": {**NARROW, "bits": 4, "sides": [1, 2, 4]},
    "diffusers_vq": {"settings": {"down_block_types": ["DownEncoderBlock2D"] * 2,
                                  "up_block_types": ["UpDecoderBlock2D"] * 2, "block_out_channels": [32, 32],
                                  "latent_channels": 4, "num_vq_embeddings": 16, "vq_embed_dim": 4}}}


def recipe(**changes) -> TokenizerRecipe:
    values = dict(resolution=16, train_batch_size=2, max_train_steps=6, lr_warmup_steps=2, continuous_steps=0,
                  perceptual_weight=0.0, mixed_precision="no", dataloader_num_workers=0, report_to="none")
    return TokenizerRecipe(**{**values, **changes})


def pictures(count: int = 2, side: int = 16) -> Tensor:
    """(N, 3, side, side) uint8."""
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def local(**more) -> Tokenizer:
    torch.manual_seed(1)
    return make_tokenizer("local_vq", {**MODEL_ARGS["local_vq"], **more})


# ---- every network and quantizer ------------------------------------------------------------------------------------

def assert_learns(model: Tokenizer) -> None:
    """One step of the loss reaches every weight; attention's shift of all keys alike changes nothing and is left out.
    """
    task = TokenizerTask(model.train(), recipe())
    task.before_step(0)
    terms = task.losses("model", pictures(), 0)
    assert all(math.isfinite(term.item()) for term in terms.values()) and terms["l1"] > 0
    sum(terms.values(), torch.zeros(())).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.any() or name.endswith((".k.bias", ".to_k.bias")), name
    report = task.report(0)
    assert 0 < report["codebook_usage"] <= 1 and report["codebook_perplexity"] >= 1


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_learns_with_every_quantizer(network, quantizer):
    torch.manual_seed(0)
    assert_learns(compose(network, quantizer, NETWORK_ARGS[network], QUANTIZER_ARGS[quantizer]))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns(name):
    torch.manual_seed(0)
    assert_learns(make_tokenizer(name, MODEL_ARGS[name]))


def test_models_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="There is no model 'vcgan'; there are local_vq"):
        make_tokenizer("vcgan", {})
    with pytest.raises(ConfigError, match="VQGAN has no argument 'width', but codebook_size"):
        make_tokenizer("vqgan", {"width": 3})
    with pytest.raises(ConfigError, match="There is no quantizer 'qv'"):
        compose("vqgan", "qv")
    with pytest.raises(ConfigError, match="There is no network 'unet'"):
        compose("unet", "fsq", {}, {"levels": [3]})
    with pytest.raises(ConfigError, match="LFQ cannot be made of"):
        compose("wetok", "lfq", NARROW, {"bits": "many"})


def test_a_composed_tokenizer_is_saved_and_loaded(tmp_path):
    from vtc.models import load_tokenizer

    for quantizer in ("residual", "multi_scale_vq"):
        torch.manual_seed(0)
        model = compose("local_vq", quantizer, LOCAL, QUANTIZER_ARGS[quantizer]).eval()
        model.save_pretrained(tmp_path / quantizer)
        loaded, again = load_tokenizer(tmp_path / quantizer), load_tokenizer(tmp_path / quantizer)
        tokens = loaded.encode(pictures().float() / 255)
        assert torch.equal(loaded.decode(tokens), again.decode(tokens)) and tokens.layout == model.layout(16, 16)
        assert loaded.fingerprint() == again.fingerprint() == model.fingerprint()


# ---- the discriminator ----------------------------------------------------------------------------------------------

GAN = dict(gan_weight=0.5, gan_start=3, discriminator_channels=4, discriminator_layers=2, discriminator_norm="none")


def test_the_discriminator_joins_at_its_step_and_sees_reconstructions_without_gradient():
    task = TokenizerTask(local(), recipe(**GAN, lecam_weight=0.1, discriminator_learning_rate=2e-4))
    assert "gan" not in task.losses("model", pictures(), 2) and task.losses("discriminator", pictures(), 2) == {}
    terms = task.losses("model", pictures(), 3)
    critic = task.players["discriminator"]
    output, _ = task.reconstruct(pictures().float() / 255, 3)
    fake = critic(output)
    torch.testing.assert_close(terms["gan"], -0.5 * fake.mean(), atol=1e-6, rtol=0)
    judged = task.losses("discriminator", pictures(), 3)
    real = critic(pictures().float() / 255)
    expected = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    torch.testing.assert_close(judged["hinge"], expected, atol=1e-6, rtol=0)
    assert judged["lecam"] > 0
    sum(judged.values(), torch.zeros(())).backward()
    assert all(p.grad is None for p in task.model.parameters())
    shares = [group["share"] for group in task.parameter_groups("discriminator", task.recipe)]
    assert shares == pytest.approx([0.25] * len(shares))
    assert "share" not in task.parameter_groups("model", task.recipe)[0]


def test_a_discriminator_may_learn_before_it_is_heard():
    task = TokenizerTask(local(), recipe(**GAN, discriminator_start=1))
    heard = {step: "gan" in task.losses("model", pictures(), step) for step in (0, 1, 2, 3)}
    assert heard == {0: False, 1: False, 2: False, 3: True}
    for step in (0, 1, 2, 3):
        task.losses("model", pictures(), step)
        assert bool(task.losses("discriminator", pictures(), step)) == (step >= 1)
    with pytest.raises(ConfigError, match="learnt nothing"):
        recipe(**GAN, discriminator_start=4)


@pytest.mark.parametrize("kind", ("patch", "blur", "spectral"))
def test_other_losses_and_networks_of_the_discriminator(kind):
    sizes = {"blur": 32, "patch": 4, "spectral": 64}
    settings = {**GAN, "discriminator": kind, "discriminator_channels": sizes[kind]}
    task = TokenizerTask(local(), recipe(**settings, gan_loss="non_saturating", discriminator_loss="vanilla"))
    terms = task.losses("model", pictures(), 3)
    assert terms["gan"] > 0 and task.losses("discriminator", pictures(), 3)["vanilla"] > 0


def test_the_adaptive_weight_is_the_published_one():
    """At one process, `vtc.tokenizers.losses.adaptive_weight` at the decoder's last convolution; to 1e-5, relative."""
    model = local().eval()  # no codebook moves between the two
    task = TokenizerTask(model, recipe(**GAN, adaptive_weight=True))
    terms = task.losses("model", pictures(), 3)
    images = pictures().float() / 255
    output, _ = task.reconstruct(images, 3)
    opinion = -task.players["discriminator"](output).mean()
    weight = adaptive_weight(3.0 * (output - images).abs().mean(), opinion, model.decoder.head.weight)
    torch.testing.assert_close(terms["gan"], 0.5 * weight * opinion, rtol=1e-5, atol=0)


# ---- the codebook ---------------------------------------------------------------------------------------------------

def test_the_entropy_weight_is_annealed_as_in_wetok():
    model = make_tokenizer("wetok", MODEL_ARGS["wetok"])
    task = TokenizerTask(model, recipe(entropy_boost=3.0, entropy_annealing_steps=100))
    seen = []
    for step in (0, 50, 100, 200):
        task.before_step(step)
        seen.append(model.quantizer.entropy)
    assert seen == pytest.approx([0.4, 0.25, 0.1, 0.1])
    pyramid = make_tokenizer("infinity_vae", MODEL_ARGS["infinity_vae"])
    TokenizerTask(pyramid, recipe(entropy_weight=0.7)).before_step(0)
    assert pyramid.quantizer.bsq.entropy == 0.7


@pytest.mark.parametrize("name", ("local_vq", "pyramid_vq", "vqgan"))
def test_the_codebook_starts_from_latents_after_the_continuous_steps(name):
    torch.manual_seed(0)
    model = make_tokenizer(name, MODEL_ARGS[name])
    task = TokenizerTask(model, recipe(continuous_steps=3, resolution=32))
    before = model.quantizer.codebook.detach().clone()
    for step in range(3):
        task.before_step(step)
        assert "quantizer" not in task.losses("model", pictures(4, 32), step)
        assert task.report(step) == {}
    state = task.state_dict()
    again = TokenizerTask(make_tokenizer(name, MODEL_ARGS[name]), recipe(continuous_steps=3, resolution=32))
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(state["warm"], again._warm, strict=True))
    task.before_step(3)
    assert not torch.equal(model.quantizer.codebook, before)
    assert "quantizer" in task.losses("model", pictures(4, 32), 3)
    report = task.report(3)
    assert report["codebook_usage"] > 0.3 and ("scale_1_perplexity" in report) == (name == "pyramid_vq")


def test_usage_and_perplexity_count_each_scale_and_group():
    model = make_tokenizer("infinity_vae", MODEL_ARGS["infinity_vae"])
    task = TokenizerTask(model, recipe())
    indices = torch.zeros(2, 1 + 4 + 16, 4, dtype=torch.int64)
    indices[:, 5:, 0] = torch.arange(16) % 2  # one bit of the last scale alone moves
    task._count(indices, 16, 16)
    report = task.report(0)
    assert report["codebook_usage"] == pytest.approx((1.0 + 3 * 0.5) / 4)
    assert report["scale_0_perplexity"] == report["scale_1_perplexity"] == 1.0
    assert report["scale_2_perplexity"] == pytest.approx((2 + 3) / 4)


# ---- stage 2 --------------------------------------------------------------------------------------------------------

def test_stage_2_trains_the_decoder_alone_and_its_noise(tmp_path):
    torch.manual_seed(0)
    stage1 = WeTok(**MODEL_ARGS["wetok"])
    model = stage1.to_generative()
    task = TokenizerTask(model, recipe(stage2=True))
    output, _ = task.reconstruct(pictures().float() / 255, 0)
    torch.testing.assert_close(output, stage1(pictures().float() / 255)[0], atol=1e-6, rtol=0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    crops = lambda first, count: (pictures() for _ in range(count))  # noqa: E731
    Loop(task, recipe(stage2=True), Accelerator(cpu=True), crops, tmp_path).train(stop_at=2)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.startswith("decoder.")}
    assert model.decoder.conv_in.weight[:, 8:].any() and not model.encoder.training
    assert task.losses("model", pictures(), 5).keys() == {"l1"}


def test_one_decoder_learns_the_words_of_the_smaller_members_too(tmp_path):
    model = local().eval()
    fewer = model.quantizer.codebook[::4].clone()
    member = with_codebook(model, fewer)
    images = pictures().float() / 255
    drawn = {share: TokenizerTask(model, recipe(stage2=True, family_share=share), codebooks=[fewer]).reconstruct(
        images, 0)[0] for share in (0.5, 1.0)}
    torch.testing.assert_close(drawn[1.0], member(images)[0], atol=1e-6, rtol=0)
    whole = model(images)[0]
    assert not torch.allclose(drawn[1.0], whole, atol=1e-3)
    for one in drawn[0.5]:  # of either kind, not between them
        assert any(torch.allclose(one, other, atol=1e-6) for other in (*whole, *drawn[1.0]))
    for wrong, message in (({"family_share": 0.5}, "needs --stage2"),
                           ({"family_share": 1.5, "stage2": True}, "from 0 to 1")):
        with pytest.raises(ConfigError, match=message):
            recipe(**wrong)
    with pytest.raises(ConfigError, match="needs a model with a family"):
        TokenizerTask(model, recipe(stage2=True, family_share=0.5))
    script = import_module("scripts.train_tokenizer")
    model.save_pretrained(tmp_path)
    TokenizerFamily.of(model, {4: member}).save(tmp_path / FAMILY)
    (stored,) = script.smaller_codebooks(str(tmp_path))
    torch.testing.assert_close(stored.float(), fewer, atol=1e-3, rtol=1e-3)
    with pytest.raises(ConfigError, match="needs --init_from"):
        script.smaller_codebooks(None)


# ---- looking at it --------------------------------------------------------------------------------------------------

def test_a_random_view_is_the_same_for_both_pictures_and_lets_gradients_through():
    torch.manual_seed(0)
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    a, b = RandomView()(image, image)
    assert torch.equal(a, b) and a.shape[-1] == a.shape[-2]
    a.sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
    assert {RandomView()(image)[0].shape[-1] for _ in range(8)} != {32}


@needs_shared("weights")
def test_the_perceptual_loss_is_zero_only_for_equal_pictures():
    loss = PerceptualLoss(LPIPS("squeeze", SHARED / "weights"))
    image = torch.rand(1, 3, 64, 64)
    assert loss(image, image).item() == pytest.approx(0, abs=1e-6)
    assert loss(image, image.flip(2)).item() > 0.05


@needs_shared("weights")
@pytest.mark.parametrize("name", ("local_vq", "infinity_vae"))
def test_validation_measures_whole_pictures(name):
    model = make_tokenizer(name, MODEL_ARGS[name]).eval()
    images = [torch.rand(3, 40, 56), torch.rand(3, 33, 35)]
    result = evaluate(model, images, LPIPS("alex", SHARED / "weights"))
    assert {"psnr", "lpips_alex", "codebook_perplexity", "codebook_usage", "codebook_entropy_bits"} <= result.keys()
    tokens = [model.encode(i[None]) for i in images]
    errors = [((model.decode(t) * 255).round() / 255 - i).square().mean() for t, i in zip(tokens, images, strict=True)]
    assert result["psnr"] == pytest.approx(sum(-10 * math.log10(e.item()) for e in errors) / 2, abs=1e-4)
    task = TokenizerTask(model, recipe(resolution=32), validation=Validation(images, []))
    grid = task.samples(model, 0)
    assert grid is not None and grid.shape == (4, 3, 32, 32)
    assert torch.equal(grid[0], images[0][:, 4:36, 12:44])


def test_validation_goes_through_the_suite_and_tells_what_it_goes_without(tmp_path, caplog, monkeypatch):
    """Numbers of the suite's functions, codebook use by counting; missing weights, failures and few pictures named."""
    monkeypatch.delenv("VTC_LPIPS_WEIGHTS", raising=False)
    model = local().eval()
    images = [torch.rand(3, 40, 56), torch.rand(3, 48, 33), torch.rand(3, 8, 8)]
    measures = validation_measures(["ssim", "lpips", "codebook", "psnr"], Options(lpips_weights=str(tmp_path)))
    assert [measure.alias for measure in measures] == ["psnr", "ssim", "codebook"]
    assert "The validation goes without lpips_alex: " in caplog.text
    found = Validation(images, measures).of_tokenizer(model)
    tokens = [model.encode(image[None]) for image in images]
    rounded = [(model.decode(t) * 255).round() / 255 for t in tokens]
    pairs = list(zip(rounded, (image[None] for image in images), strict=True))
    errors = [(a - b).square().mean().item() for a, b in pairs]
    assert found["psnr"] == pytest.approx(sum(-10 * math.log10(error) for error in errors) / 3, abs=1e-4)
    assert found["ssim"] == pytest.approx(sum(float(structural_similarity(a, b)) for a, b in pairs[:2]) / 2, abs=1e-6)
    counts = torch.cat([t.indices.flatten() for t in tokens]).bincount(minlength=16)
    p = counts[counts > 0] / counts.sum()
    assert found["codebook_usage"] == pytest.approx((counts > 0).float().mean().item())
    assert found["codebook_entropy_bits"] == pytest.approx(-(p * p.log2()).sum().item(), abs=1e-5)
    assert set(found) == {"psnr", "ssim", "codebook_usage", "codebook_entropy_bits", "codebook_perplexity"}

    def fails(image: Tensor) -> Tensor:
        return image[..., 1:]

    assert Validation(images, measures).of_autoencoder(fails, torch.device("cpu")) == {}
    assert "3 of the validation's measurements failed, the first one: 0: the original has 56x40 pixels" in caplog.text
    with pytest.raises(ConfigError, match="There is no metric psnt"):
        validation_measures(["psnt"], Options())


@needs_shared("weights")
def test_a_frechet_distance_of_few_pictures_is_measured_and_said_to_be_one(caplog):
    options = Options(lpips_weights=str(SHARED / "weights"))
    validation = Validation([torch.rand(3, 64, 64) for _ in range(3)], validation_measures(["fd_alexnet"], options))
    assert "fd_alexnet of 3 pictures over 256 features says little" in caplog.text
    same, other = (validation.of_autoencoder(made, torch.device("cpu")) for made in (lambda x: x, lambda x: 1 - x))
    assert same["fd_alexnet"] == pytest.approx(0, abs=1e-3) and other["fd_alexnet"] > 1


# ---- runs -----------------------------------------------------------------------------------------------------------

def _train(folder: Path, output_dir: Path, stops: tuple[int, ...], name: str) -> dict[str, Tensor]:
    """Train to the last of `stops`, each stop a new loop that resumes from the checkpoint of the one before."""
    settings = recipe(resolution=32, continuous_steps=3, perceptual_weight=1.0, checkpointing_steps=2, **GAN)
    perceptual = LPIPS("squeeze", SHARED / "weights")
    for i, stop in enumerate(stops):
        torch.manual_seed(1 if i == 0 else 99)  # a resumed run must not depend on how its process was seeded
        task = TokenizerTask(make_tokenizer(name, MODEL_ARGS[name]), settings, perceptual)
        crops = RandomCrops(image_files(folder), 32, settings.seed)
        loop = Loop(task, settings, Accelerator(cpu=True), crops, output_dir)
        if i:
            loop.resume("latest")
        average = loop.train(stop_at=stop)
    return {**{f"{n}.{k}": v for n, m in task.players.items() for k, v in m.state_dict().items()},
            **{f"average.{k}": v for k, v in average.state_dict().items()},
            **{f"buffer.{k}": v for k, v in task.model.named_buffers()}}


@needs_shared("weights")
@pytest.mark.parametrize("name", ("local_vq", "pyramid_vq"))
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(photographs, tmp_path, name):  # noqa: F811
    """Over the codebook's start and the discriminator's."""
    whole = _train(photographs, tmp_path / "whole", (6,), name)
    resumed = _train(photographs, tmp_path / "resumed", (2, 4, 6), name)
    assert whole.keys() == resumed.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, resumed[key]), key


def test_a_finished_model_starts_the_next_with_fewer_or_more_words(photographs, tmp_path):  # noqa: F811
    script = import_module("scripts.train_tokenizer")
    model = LocalVQ(codebook_size=16, dim=4, encoder_widths=(8, 8, 8), encoder_depths=(1, 1, 1),
                    decoder_widths=(8, 8, 8, 8), decoder_depths=(1, 1, 1, 1), thin=4)
    model.token_frequencies = torch.tensor([[2**20 - 15 * 2**15] + 15 * [2**15]], dtype=torch.int32)
    model.save_pretrained(tmp_path)
    crops = RandomCrops(image_files(photographs), 64, seed=0)
    same = script.started_from(str(tmp_path), 16, crops)
    assert same.training and torch.equal(same.quantizer.codebook, model.quantizer.codebook.half().float())
    smaller = script.started_from(str(tmp_path), 5, crops)
    assert smaller.training and smaller.quantizer.codebook.shape == (5, 4)
    assert smaller.token_frequencies.sum() == 2**20
    assert torch.equal(smaller.decoder.head.weight, same.decoder.head.weight)
    larger = script.started_from(str(tmp_path), 24, crops)
    assert larger.training and larger.quantizer.codebook.shape == (24, 4)
    assert torch.equal(larger.decoder.head.weight, same.decoder.head.weight)
    z = torch.cat([larger.latents(crops[n][None] / 255) for n in range(24)])
    errors = [model.quantizer.loss_terms(z)["commitment"].item() for model in (larger, same)]
    assert errors[0] < 0.5 * errors[1]  # they are words of the pictures; the others were random
    again = script.started_from(str(tmp_path), 24, crops)
    assert torch.equal(larger.quantizer.codebook, again.quantizer.codebook)
    assert not script.started_from(str(tmp_path), 24, None).quantizer.codebook.any()  # a checkpoint brings them


def test_the_networks_of_a_finished_model_get_a_quantizer_of_other_scales(photographs, tmp_path):  # noqa: F811
    script = import_module("scripts.train_tokenizer")
    small = {"codebook_size": 16, "dim": 4, "encoder_widths": [8, 8], "encoder_depths": [1, 1],
             "decoder_widths": [8, 8, 8], "decoder_depths": [1, 1, 1], "thin": 4}
    finished = PyramidVQ(**small, sides=(1, 2, 4))
    finished.save_pretrained(tmp_path)
    crops = RandomCrops(image_files(photographs), 64, seed=0)  # not looked at

    def made(*more: str) -> PyramidVQ:
        words = [f"{k}={v}" for k, v in (small | {"sides": [4], "phis": 0}).items()]
        return script.model_of(script.parse_args([
            "--model", "pyramid_vq", "--model_args", *words, "--train_data_dir", "x", "--output_dir", "y",
            "--init_networks", str(tmp_path), *more]), crops)

    raster = made()
    assert raster.sides == (4,) and not any(k.startswith("quantizer.phi") for k in raster.state_dict())
    for key, tensor in finished.state_dict().items():
        if key.startswith(("encoder.", "decoder.")):
            assert torch.equal(raster.state_dict()[key], tensor.half().float()), key
    with pytest.raises(ConfigError, match="not of the shapes"):
        small["thin"] = 8
        made()
    with pytest.raises(ConfigError, match="give one of them"):
        small["thin"] = 4
        made("--init_from", str(tmp_path))


def test_the_script_trains_resumes_and_refuses(photographs, tmp_path, capsys):  # noqa: F811
    script = import_module("scripts.train_tokenizer")
    debug = ["--config", str(ROOT / "scripts" / "configs" / "tokenizer_debug.yaml"), "--train_data_dir",
             str(photographs), "--output_dir", str(tmp_path), "--report_to", "none"]
    assert script.main(debug) == 0
    assert (tmp_path / "model" / "model.safetensors").is_file() and (tmp_path / "checkpoint-4").is_dir()
    assert next((tmp_path / "samples").glob("*.png")).stat().st_size > 100
    assert script.main([*debug, "--max_train_steps", "6", "--resume_from_checkpoint", "latest"]) == 0
    assert "Going on from checkpoint-4, with max_train_steps 4 -> 6." in capsys.readouterr().err
    assert (tmp_path / "checkpoint-6").is_dir()
    for flags, message in ((["--model", "vcgan"], "no model 'vcgan'"), (["--mixed_precision", "fp16"], "needs a GPU"),
                           (["--train_data_dir", str(tmp_path / "none")], "give a folder"),
                           (["--resume_from_checkpoint", "checkpoint-7"], "is no checkpoint"),
                           (["--seed", "-1"], "--seed is at least 0")):
        assert script.main([*debug, *flags]) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("train_tokenizer: ") and message in last
    with pytest.raises(SystemExit) as stopped:
        script.main([*debug, "--learning_rat", "1", "--model_args", "x"])
    assert stopped.value.code == 2
