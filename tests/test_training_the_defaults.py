"""docs/training-the-defaults.md and what it leans on: its configurations, and starting from a finished model."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from tests.shared import ROOT
from tests.test_training_data import photographs  # noqa: F401  # a fixture
from vtc.models import load_tokenizer
from vtc.tokenizers.local_vq import LocalVQ
from vtc.training.recipe import read_config, recipe_from
from vtc.training.tokenizer_recipe import TokenizerRecipe

CONFIGS = sorted((ROOT / "scripts/configs").glob("localvq_*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_each_configuration_is_a_recipe_that_ends_low_and_is_launched_by_the_page(path):
    script = import_module("scripts.train_tokenizer")
    recipe = recipe_from(TokenizerRecipe, script.parse_args(["--config", str(path)]))
    assert recipe.learning_rate_at(recipe.max_train_steps) == pytest.approx(recipe.final_learning_rate)
    assert recipe.discriminator_norm != "batch" or not recipe.gan_weight  # several processes share a batch
    assert set(read_config(path)) >= {"learning_rate", "max_train_steps", "l1_weight", "continuous_steps"}
    assert f"--config scripts/configs/{path.name}" in (ROOT / "docs/training-the-defaults.md").read_text()


def test_a_finished_model_keeps_its_words_whatever_the_continuous_steps(photographs, tmp_path):  # noqa: F811
    """With the default of 300 continuous steps the first ones would pass latents by, and K-means would follow."""
    torch.manual_seed(0)
    start = LocalVQ(codebook_size=16, dim=4, encoder_widths=(8, 8, 8), encoder_depths=(1, 1, 1),
                    decoder_widths=(8, 8, 8, 8), decoder_depths=(1, 1, 1, 1), thin=4)
    start.save_pretrained(tmp_path / "start")
    script = import_module("scripts.train_tokenizer")
    assert script.main(["--init_from", str(tmp_path / "start"), "--train_data_dir", str(photographs), "--output_dir",
                        str(tmp_path / "run"), "--resolution", "32", "--train_batch_size", "2", "--max_train_steps",
                        "3", "--perceptual_weight", "0", "--report_to", "none", "--dataloader_num_workers", "0",
                        "--mixed_precision", "no", "--continuous_steps", "2", "--learning_rate", "0",
                        "--final_learning_rate", "0", "--weight_decay", "0"]) == 0
    before, after = (load_tokenizer(tmp_path / path).quantizer.codebook for path in ("start", "run/model"))
    assert before.shape == after.shape
    # words that follow their latents by a hundredth a step stay near; those that K-means made are anywhere
    near = (after - before).norm(dim=1) / before.norm(dim=1)
    assert near.median() < 0.1
