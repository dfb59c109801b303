"""Recipes cannot rot: every configuration and every launch line of the documents goes through its script's parser."""

from __future__ import annotations

import re
import shlex
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

from tests.shared import ROOT
from vtc.errors import ConfigError
from vtc.models import load_generator, load_tokenizer
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.vqgan import VQGAN
from vtc.training.codebook import CodebookRecipe
from vtc.training.codebook_task import CodebookTaskRecipe, clustered
from vtc.training.concealer import ConcealerRecipe
from vtc.training.generator import GeneratorRecipe
from vtc.training.prior import PriorRecipe
from vtc.training.recipe import recipe_from
from vtc.training.token_shards import TokenShards
from vtc.training.tokenizer import make_tokenizer
from vtc.training.tokenizer_recipe import TokenizerRecipe
from vtc.training.vae_recipe import KLRecipe, ScaleConsistentRecipe
from vtc.training.wlf_recipe import WLFRecipe

RECIPES = ROOT / "docs/recipes"
PAGES = sorted([*RECIPES.glob("*.md"), ROOT / "docs/training.md", ROOT / "docs/training-the-defaults.md"])
SYSTEMS = ("wetok", "finetuned_vqgan", "sc_vae", "var", "infinity")


def launch_lines(text: str) -> list[list[str]]:
    """The words of every command in a page's bash blocks that runs one of our scripts."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return [words for line in blocks.splitlines() if "scripts/" in line for words in [shlex.split(line, comments=True)]
            if words]


LINES = [(page.name, words) for page in PAGES for words in launch_lines(page.read_text())]


def parsed(words: list[str]):
    """(name of the script, its parsed arguments)."""
    place = next(i for i, word in enumerate(words) if word.startswith("scripts/") and word.endswith(".py"))
    name = words[place].removeprefix("scripts/").removesuffix(".py")
    return name, import_module(f"scripts.{name}").parse_args(words[place + 1 :])


def recipe_of(name: str, args) -> type:
    objective = ScaleConsistentRecipe if getattr(args, "objective", "") == "scale_consistent" else KLRecipe
    return {"train_tokenizer": TokenizerRecipe, "train_generator": GeneratorRecipe, "train_vae": objective,
            "finetune_wlf": WLFRecipe, "finetune_vqgan_codebook": CodebookTaskRecipe, "train_prior": PriorRecipe,
            "train_concealer": ConcealerRecipe, "finetune_codebook": CodebookRecipe}[name]


#: scripts that train nothing, and so have no recipe
WITHOUT_RECIPE = ("tokenize_dataset", "bench_training", "fit_tables", "calibrate_kv", "quantize_weights",
                  "shard_pictures", "contact_sheet")


@pytest.mark.parametrize(("page", "words"), LINES, ids=[f"{page}-{n}" for n, (page, _) in enumerate(LINES)])
def test_a_launch_line_is_what_its_script_takes(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "scripts")  # some scripts import their neighbours
    name, args = parsed(words)
    if name not in WITHOUT_RECIPE:
        recipe_from(recipe_of(name, args), args)
    if name == "train_tokenizer" and not args.init_from:
        with torch.device("meta"):
            make_tokenizer(args.model, args.model_args)


def test_every_system_has_a_page_and_every_configuration_a_launch_line():
    assert {page.stem for page in RECIPES.glob("*.md")} >= set(SYSTEMS)
    used = {word.removeprefix("docs/recipes/") for _, words in LINES for word in words if word.endswith(".yaml")}
    assert {path.name for path in RECIPES.glob("*.yaml")} <= used
    for system in SYSTEMS:
        text = (RECIPES / f"{system}.md").read_text()
        assert re.search(r"accelerate launch --num_processes 8 ", text), system
        for heading in ("## Launch", "## Hyper-parameters", "## Cost", "## Missing upstream"):
            assert heading in text, (system, heading)


def test_the_number_of_processes_is_the_one_that_the_configurations_are_for():
    """Batches of 8 processes, as the pages say: 128 (WeTok), 256 (SC-VAE), 768 (VAR-d16)."""
    for config, batch in (("wetok_f16", 128), ("sc_vae_flux", 256), ("var_d16", 768), ("finetuned_vqgan", 64)):
        values = dict(re.findall(r"^(\w+): *([\d.]+)", (RECIPES / f"{config}.yaml").read_text(), re.MULTILINE))
        per_step = int(values["train_batch_size"]) * int(values.get("gradient_accumulation_steps", 1)) * 8
        assert per_step == batch, config


@pytest.fixture
def photographs(tmp_path):
    for n in range(6):
        file = tmp_path / f"photographs/class{n % 2}/{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(file)
    return tmp_path / "photographs"


def test_the_debug_configurations_go_from_pictures_to_a_generator(photographs, tmp_path):
    def run(script: str, config: str, *arguments: str) -> None:
        module = import_module(f"scripts.{script}")
        result = module.main(["--config", str(ROOT / "scripts/configs" / config), *arguments])
        assert result in (0, None)

    run("train_tokenizer", "tokenizer_debug.yaml", "--train_data_dir", str(photographs), "--output_dir",
        str(tmp_path / "tokenizer"))
    tokenizer = str(tmp_path / "tokenizer/model")
    run("tokenize_dataset", "tokenize_debug.yaml", "--tokenizer", tokenizer, "--train_data_dir", str(photographs),
        "--output_dir", str(tmp_path / "tokens"), "--quiet")
    tokens = TokenShards(tmp_path / "tokens", load_tokenizer(tokenizer), labels=True)
    assert tokens.labels.tolist() == [0, 0, 0, 1, 1, 1] and tokens.facts.views == 2
    run("train_generator", "generator_debug.yaml", "--tokenizer", tokenizer, "--tokens", str(tmp_path / "tokens"),
        "--output_dir", str(tmp_path / "var"))
    generator = load_generator(str(tmp_path / "var/model"))
    assert generator.model.sides == (1, 2, 4, 8) and generator.model.classes == 2


@pytest.mark.parametrize(("script", "config", "needs"), [
    ("train_tokenizer", "tokenizer", []), ("train_generator", "generator", ["--tokenizer", "x"]),
    ("tokenize_dataset", "tokenize", ["--tokenizer", "x", "--output_dir", "x"]), ("train_vae", "vae_kl", []),
    ("train_vae", "vae_eq", []), ("train_vae", "vae_patch", []), ("train_vae", "vae_sc", []),
    ("finetune_wlf", "wlf", ["--vae", "x", "--prompt_embeddings", "x"]),
    ("finetune_vqgan_codebook", "codebook", ["--model", "x"]),
    ("finetune_codebook", "family", ["--model", "x", "--train_data_dir", "x"]),
    ("train_prior", "prior", ["--model", "x", "--train_data_dir", "x", "--output", "x"]),
    ("train_concealer", "concealer", ["--model", "x", "--train_data_dir", "x"]),
    ("train_hyperprior", "hyperprior", ["--train_data_dir", "x", "--output", "x"])])
def test_every_training_script_has_a_debug_configuration_that_fits(script, config, needs):
    args = import_module(f"scripts.{script}").parse_args(
        ["--config", str(ROOT / f"scripts/configs/{config}_debug.yaml"), *needs])
    assert getattr(args, "max_train_steps", 1) <= 6


def test_the_debug_configurations_of_a_localvq_s_companions_and_of_the_hyperprior(photographs, tmp_path):
    torch.manual_seed(0)
    model = LocalVQ(codebook_size=16, dim=6, encoder_widths=(8, 8, 8), encoder_depths=(1, 1, 1),
                    decoder_widths=(8, 8, 8, 8), decoder_depths=(1, 1, 1, 1), thin=4)
    model.save_pretrained(tmp_path / "model")
    common = ["--model", str(tmp_path / "model"), "--train_data_dir", str(photographs)]

    def run(script: str, config: str, *arguments: str) -> None:
        config = str(ROOT / "scripts/configs" / config)
        assert import_module(f"scripts.{script}").main(["--config", config, *arguments]) == 0

    run("train_prior", "prior_debug.yaml", *common, "--output_dir", str(tmp_path / "prior"), "--output",
        str(tmp_path / "prior.safetensors"))
    run("train_concealer", "concealer_debug.yaml", *common, "--output_dir", str(tmp_path / "concealer"))
    run("train_hyperprior", "hyperprior_debug.yaml", "--train_data_dir", str(photographs), "--output_dir",
        str(tmp_path / "hyper"), "--output", str(tmp_path / "codec"))
    assert (tmp_path / "prior.safetensors").is_file() and (tmp_path / "codec").is_dir()


def small_vqgan() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(codebook_size=12, embed_dim=4, channels=32, channel_multipliers=(1, 1), num_res_blocks=1,
                 z_channels=4, attention_levels=()).eval()


def test_a_clustered_codebook_is_tuned_and_the_networks_stay(photographs, tmp_path):
    base = small_vqgan()
    base.save_pretrained(tmp_path / "vqgan")
    script = import_module("scripts.finetune_vqgan_codebook")
    assert script.main(["--config", str(ROOT / "scripts/configs/codebook_debug.yaml"), "--model",
                        str(tmp_path / "vqgan"), "--train_data_dir", str(photographs), "--output_dir",
                        str(tmp_path / "out")]) == 0
    tuned, start = load_tokenizer(tmp_path / "out/model"), clustered(base, 4)
    assert tuned.quantizer.codebook.shape == (4, 4)
    for name, tensor in tuned.state_dict().items():
        moved = not torch.allclose(tensor, start.state_dict()[name], atol=1e-3)
        assert moved <= name.startswith(("quantizer.", "quant_conv.", "post_quant_conv.")), name
    assert not torch.allclose(tuned.post_quant_conv.weight, start.post_quant_conv.weight, atol=1e-4)


def test_a_tokenizer_without_a_codebook_between_convolutions_is_refused():
    with pytest.raises(ConfigError, match=r"finetune_codebook\.py"):
        clustered(load_tokenizer(), 8)


@pytest.mark.parametrize("case", ["vae", "generator"])
def test_a_case_of_the_benchmark_is_measured_and_written_up(photographs, case):
    bench = import_module("scripts.bench_training")
    args = bench.parse_args(["--train_data_dir", str(photographs), "--tiny", "--steps", "1", "--warmup", "0",
                             "--workers", "0", "--threads", "1", "--worker", case, "--peak_tflops", "1"])
    result = bench.measure(args)
    numbers = ("memory", "pictures", "loader", "reading_cpu", "gib", "flops", "parameters")
    assert min(result[name] for name in numbers) > 0
    result |= {"memory": 0.5, "memory_cpu": 0.4, "batch": 4, "reading_cpu": 0.1, "flops": 2e11, "device": "cpu"}
    row = bench.page([result], args).splitlines()[-1]
    assert "| 8.00 |" in row and "| 0.250 |" in row
    assert row.endswith("| 40.0% |")  # 0.2 TFLOP in half a second, where 1 TFLOP/s is the peak
