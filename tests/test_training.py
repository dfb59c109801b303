"""The training loop: numbered crops, resuming to the bit, the recipe's learning rate."""

from importlib import import_module

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from tests.shared import SHARED, needs_shared
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.lpips import LPIPS
from vtc.training.data import RandomCrops, image_files
from vtc.training.perceptual import PerceptualLoss, RandomView
from vtc.training.tokenizer import TokenizerRecipe, TokenizerTrainer


@pytest.fixture
def photographs(tmp_path):
    """Four pictures of noise with an edge; one smaller than the crop."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(80, 100), (64, 64), (90, 70), (40, 60)]):
        pixels = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
        pixels[:, width // 2 :] += 150
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_a_numbered_crop_is_always_the_same_and_every_epoch_shows_every_picture(photographs):
    crops = RandomCrops(image_files(photographs), 32, seed=3)
    first = crops[5]
    assert first.shape == (3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, RandomCrops(image_files(photographs), 32, seed=3)[5])
    assert not torch.equal(first, RandomCrops(image_files(photographs), 32, seed=4)[5])
    epoch = [np.random.default_rng((3, e)).permutation(4).tolist() for e in range(2)]
    assert all(sorted(e) == [0, 1, 2, 3] for e in epoch)


def test_the_learning_rate_warms_up_and_ends_at_its_floor():
    recipe = TokenizerRecipe(max_train_steps=100, lr_warmup_steps=10, learning_rate=1e-3, final_learning_rate=1e-5)
    assert recipe.learning_rate_at(0) == pytest.approx(1e-4)
    assert recipe.learning_rate_at(9) == recipe.learning_rate_at(10) == pytest.approx(1e-3)
    assert recipe.learning_rate_at(55) == pytest.approx((1e-3 + 1e-5) / 2)
    assert recipe.learning_rate_at(100) == pytest.approx(1e-5)


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


def _train(photographs, output_dir, stops: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Train to the last of `stops`, each stop a new trainer that resumes from the checkpoint of the one before."""
    recipe = TokenizerRecipe(resolution=32, train_batch_size=2, max_train_steps=6, lr_warmup_steps=2,
                             continuous_steps=3)
    perceptual = LPIPS("squeeze", SHARED / "weights")
    for i, stop in enumerate(stops):
        torch.manual_seed(1 if i == 0 else 99)  # a resumed run must not depend on how its process was seeded
        accelerator = Accelerator(cpu=True)
        model = LocalVQ(codebook_size=16, dim=4, encoder_widths=(8, 8, 8), encoder_depths=(1, 1, 1),
                        decoder_widths=(8, 8, 8, 8), decoder_depths=(1, 1, 1, 1), thin=4)
        output_dir.mkdir(exist_ok=True)
        trainer = TokenizerTrainer(model, recipe, accelerator, image_files(photographs), output_dir, perceptual,
                                   judge=None, validation=[])
        if i:
            accelerator.load_state(str(output_dir / "checkpoint"))
        average = trainer.train(checkpointing_steps=2, validation_steps=100, stop_at=stop)
    return {**trainer.model.state_dict(), **{f"average.{k}": v for k, v in average.state_dict().items()}}


@needs_shared("weights")
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(photographs, tmp_path):
    whole = _train(photographs, tmp_path / "whole", (6,))
    resumed = _train(photographs, tmp_path / "resumed", (2, 4, 6))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_finished_model_starts_the_next_with_a_smaller_codebook(tmp_path):
    train_tokenizer = import_module("scripts.train_tokenizer")
    model = LocalVQ(codebook_size=16, dim=4, encoder_widths=(8, 8, 8), encoder_depths=(1, 1, 1),
                    decoder_widths=(8, 8, 8, 8), decoder_depths=(1, 1, 1, 1), thin=4)
    model.token_frequencies = torch.tensor([[2**20 - 15 * 2**15] + 15 * [2**15]], dtype=torch.int32)
    model.save_pretrained(tmp_path)
    same = train_tokenizer.started_from(str(tmp_path), 16)
    assert same.training and torch.equal(same.quantizer.codebook, model.quantizer.codebook.half().float())
    smaller = train_tokenizer.started_from(str(tmp_path), 5)
    assert smaller.training and smaller.quantizer.codebook.shape == (5, 4)
    assert smaller.token_frequencies.sum() == 2**20
    assert torch.equal(smaller.decoder.head.weight, same.decoder.head.weight)
