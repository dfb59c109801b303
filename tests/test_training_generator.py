"""Training of generators: every kind learns four pictures by heart, goes on to the bit, and sees the right noise."""

from __future__ import annotations

import io
from importlib import import_module

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file

from vtc.errors import ConfigError, FileError, ModelError
from vtc.generators.infinity import Infinity
from vtc.generators.llamagen import LlamaGen
from vtc.generators.pretrained import LoadedGenerator
from vtc.generators.var import VAR
from vtc.tokenizers.infinity_vae import InfinityVAE
from vtc.tokenizers.multi_scale_binary import MultiScaleBinaryQuantizer
from vtc.tokenizers.pyramid_vq import PyramidVQ
from vtc.training.generator import (
    GeneratorRecipe,
    InfinityTask,
    RasterTask,
    TextFeatures,
    TrainingPictures,
    VARTask,
)
from vtc.training.labelled import labelled_images
from vtc.training.loop import Loop
from vtc.training.token_shards import TokenShards, TrainingTokens
from vtc.training.tokenizing import DatasetTokenizer

script = import_module("scripts.train_generator")

SIDES = (1, 2, 4)


def pyramid(sides=SIDES) -> PyramidVQ:
    torch.manual_seed(0)
    tokenizer = PyramidVQ(16, 4, (8, 8), (1, 1), (8, 8, 8), (1, 1, 1), 4, sides).eval()
    with torch.no_grad():
        tokenizer.quantizer.codebook.normal_()  # untrained words lie at nothing, and every token is the same one
    return tokenizer


@pytest.fixture
def pack(tmp_path):
    """Two classes of two smooth pictures each in both splits, packed."""
    rng, arrays = np.random.default_rng(0), {}
    for split in ("train", "val"):
        files = []
        for _ in range(4):
            coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
            stream = io.BytesIO()
            coarse.resize((32, 40), Image.Resampling.BICUBIC).save(stream, "PNG")
            files.append(stream.getvalue())
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{split}_labels"] = np.array([0, 0, 1, 1])
    np.savez(tmp_path / "pack.npz", classes=np.array(["cat", "dog"]), **arrays)
    return tmp_path / "pack.npz"


def shards(pack, tokenizer, folder) -> TokenShards:
    DatasetTokenizer(labelled_images(pack), tokenizer, folder, 32, views="flip").run(quiet=True)
    return TokenShards(folder, tokenizer, labels=True)


@pytest.fixture
def text_file(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "text.safetensors"
    save_file({"features": torch.randn(2, 3, 8), "mask": torch.tensor([[True, True, False], [True] * 3])}, path)
    return path


def build(kind: str, pack, tmp_path, text_file, recipe: GeneratorRecipe):
    """(task, data) of a tiny model."""
    if kind == "infinity":
        images = labelled_images(pack)
        texts = TextFeatures(text_file, len(images), 2)
        torch.manual_seed(0)
        vae = InfinityVAE(4, 32, (1, 1, 1, 1), 1, sides=SIDES).eval()
        bitwise = Infinity(2, 32, 4, bits=4, text_width=8, text_tokens=3, pool_heads=2, chunks=1)
        return (InfinityTask(bitwise, vae, recipe, vae.scales(32, 32)),
                TrainingPictures(images, texts, 32, recipe.seed, flip=False))
    tokenizer = pyramid(SIDES if kind == "var" else (4,))
    tokens = shards(pack, tokenizer, tmp_path / f"tokens-{kind}")
    torch.manual_seed(0)
    if kind == "var":
        model = VAR(2, 32, 4, classes=2, codebook_size=16, code_dim=4, sides=SIDES)
        return VARTask(model, tokenizer, recipe, tokens), TrainingTokens(tokens, recipe.seed)
    raster = LlamaGen(2, 32, 4, 64, classes=2, codebook_size=16, side=4)
    return RasterTask(raster, tokenizer, recipe, tokens), TrainingTokens(tokens, recipe.seed)


def recipe(steps: int, **more) -> GeneratorRecipe:
    return GeneratorRecipe(**{"max_train_steps": steps, "train_batch_size": 4, "learning_rate": 3e-3,
                              "dataloader_num_workers": 0, "report_to": "none", "validation_steps": 0,
                              "checkpointing_steps": 3, "class_dropout": 0.0, "noise_strength": 0.0,
                              "sample_classes": 0, "ema_decay": 0.5, **more})


@pytest.mark.parametrize("kind", ["var", "llamagen", "infinity"])
def test_four_pictures_are_learned_by_heart(kind, pack, tmp_path, text_file):
    chosen = recipe(60)
    task, data = build(kind, pack, tmp_path, text_file, chosen)
    loop = Loop(task, chosen, Accelerator(cpu=True), data, tmp_path / "run")
    batch = torch.utils.data.default_collate([data[i] for i in range(4)])
    with torch.no_grad():
        before = task.losses("generator", batch, 0)["cross_entropy"].item()
    loop.train()
    with torch.no_grad():
        after = task.losses("generator", batch, 0)["cross_entropy"].item()
    assert before == pytest.approx(np.log(2 if kind == "infinity" else 16), abs=0.25)  # knows nothing yet
    assert after < 0.75 * before


@pytest.mark.parametrize("kind", ["var", "llamagen", "infinity"])
def test_a_stopped_run_goes_on_to_the_bit(kind, pack, tmp_path, text_file):
    chosen = recipe(6, class_dropout=0.3, noise_strength=0.3, short_scales=2)
    states = []
    for name, stops in (("whole", (6,)), ("resumed", (3, 6))):
        for i, stop in enumerate(stops):
            torch.manual_seed(i)
            task, data = build(kind, pack, tmp_path, text_file, chosen)
            torch.manual_seed(90 + i)  # nothing may hang on how a process was seeded
            loop = Loop(task, chosen, Accelerator(cpu=True), data, tmp_path / name)
            if i:
                loop.resume("latest")
            loop.train(stop_at=stop)
        states.append({**loop.task.model.state_dict(), **{f"average.{k}": v for k, v in
                                                          loop.averaged.state_dict().items()}})
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), key


def test_the_first_scales_alone_have_the_logits_that_they_have_among_all():
    torch.manual_seed(0)
    model = VAR(2, 32, 4, classes=2, codebook_size=16, code_dim=4, sides=SIDES)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    labels, codes = torch.tensor([0, 2]), torch.randn(2, 20, 4)
    whole = model(labels, codes)
    for count, tokens in ((0, 1), (4, 5)):
        torch.testing.assert_close(model(labels, codes[:, :count]), whole[:, :tokens], rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="not those of whole scales"):
        model(labels, codes[:, :7])


def test_the_validation_loss_is_the_mean_over_pictures_and_scales(pack, tmp_path, text_file):
    chosen = recipe(1, train_batch_size=3, validation_samples=0)
    task, _ = build("var", pack, tmp_path, text_file, chosen)
    with torch.no_grad():
        for p in task.model.parameters():
            p.normal_(0, 0.3)
        found = task.validate(task.model.eval(), 0)
        wanted = []
        for n in range(4):  # one picture at a time, in probabilities
            indices, label = task.validation[n]
            codes = task.quantizer.teacher_inputs(indices[None, :, 0])
            p = task.model(torch.tensor([label]), codes)[0].double().softmax(-1)
            wanted.append(-p[torch.arange(21), indices[:, 0]].log())
    wanted = torch.stack(wanted).mean(0)
    assert found["cross_entropy"] == pytest.approx(wanted.mean().item(), rel=1e-5)
    for i, (start, end) in enumerate(((0, 1), (1, 5), (5, 21))):
        assert found[f"cross_entropy_scale_{i + 1}"] == pytest.approx(wanted[start:end].mean().item(), rel=1e-5)


def test_self_correction_is_what_a_loop_over_single_bits_finds():
    """Flipped inputs, mended targets, by plain loops over cells and bits; the flips themselves from the same draws."""
    torch.manual_seed(0)
    quantizer = MultiScaleBinaryQuantizer(3, SIDES, token_bits=(1, 1, 1))
    z = torch.randn(2, 3, 4, 4)
    inputs, targets = quantizer.self_correction(z, 0.4, noisy_scales=2, generator=torch.Generator().manual_seed(5))
    draws = torch.Generator().manual_seed(5)
    total, shown, wanted, flipped = torch.zeros_like(z), [], [], 0
    for number, side in enumerate(SIDES):
        cell = 4 // side
        bits = torch.zeros(2, 3, side, side, dtype=torch.bool)
        for b, d, i, j in np.ndindex(2, 3, side, side):
            rest = (z - total)[b, d, i * cell : (i + 1) * cell, j * cell : (j + 1) * cell]
            bits[b, d, i, j] = rest.mean() > 0
        wanted.append(bits)
        if number < 2:
            percent = int(torch.randint(41, (), generator=draws))
            flips = torch.rand(bits.shape, generator=draws) * 100 < percent
            flipped += int(flips.sum())
            bits = bits ^ flips
        code = torch.where(bits, 1.0, -1.0) / 3**0.5
        total = total + (code if side == 4 else F.interpolate(code, (4, 4), mode="bilinear"))
        if number + 1 < len(SIDES):
            after = SIDES[number + 1]
            shown.append(total if after == 4 else F.interpolate(total, (after, after), mode="bilinear"))
    assert flipped > 0
    torch.testing.assert_close(inputs, torch.cat([s.flatten(2) for s in shown], 2).transpose(1, 2), rtol=0, atol=1e-6)
    assert torch.equal(targets, torch.cat([w.flatten(2) for w in wanted], 2).transpose(1, 2).long())


def test_labels_are_dropped_at_their_share(pack, tmp_path, text_file):
    task, _ = build("var", pack, tmp_path, text_file, recipe(1, class_dropout=0.1))
    torch.manual_seed(0)
    dropped = task.without_class(torch.zeros(20_000, dtype=torch.int64), 2)
    share = (dropped == 2).double().mean().item()
    assert abs(share - 0.1) < 4 * (0.09 / 20_000) ** 0.5  # four standard deviations
    assert set(dropped.tolist()) == {0, 2}


def test_the_script_trains_from_pictures_to_a_folder_that_draws(pack, tmp_path):
    pyramid().save_pretrained(tmp_path / "tokenizer")
    script.main(["--tokenizer", str(tmp_path / "tokenizer"), "--train_data_dir", str(pack), "--depth", "1", "--width",
                 "16", "--heads", "2", "--output_dir", str(tmp_path / "run"), "--max_train_steps", "2",
                 "--train_batch_size", "2", "--dataloader_num_workers", "0", "--report_to", "none", "--sample_classes",
                 "1", "--short_scales", "2"])
    model = VAR.from_pretrained(tmp_path / "run" / "model")
    loaded = LoadedGenerator(model, PyramidVQ.from_pretrained(tmp_path / "run" / "model" / "tokenizer"))
    _, images = loaded.model.generate(torch.tensor([1]), loaded.tokenizer)
    assert images.shape == (1, 3, 32, 32) and images.isfinite().all()
    assert (tmp_path / "run" / "model" / "generation_config.json").read_text().count("dog") == 1
    assert (tmp_path / "run" / "validation.jsonl").read_text().count("cross_entropy_scale_3") == 1


def test_mistakes_are_said(pack, tmp_path, text_file):
    with pytest.raises(ConfigError, match="There is no"):
        labelled_images(tmp_path / "nothing")
    with pytest.raises(FileError, match="split 'test'"):
        labelled_images(pack, "test")
    with pytest.raises(ConfigError, match="2 texts"):
        TextFeatures(text_file, 7, 5)
    with pytest.raises(ModelError, match="no text features"):
        TextFeatures(pack, 7, 5)
    with pytest.raises(ConfigError, match="share from 0 to 1"):
        recipe(1, class_dropout=1.5)
    with pytest.raises(ConfigError, match="short_scales"):
        build("var", pack, tmp_path, text_file, recipe(1, short_scales=4))


def test_infinity_is_trained_on_the_grids_that_it_will_draw():
    assert [script.drawn_size(side, 16) for side in (256, 512, 1024)] == ["0.06M", "0.25M", "1M"]
    assert script.drawn_size(1024, 8 * 2) == "1M"  # patches of 2 x 2 cells
    with pytest.raises(ConfigError, match="squares of 256, 512, 768, 1024 pixels"):
        script.drawn_size(300, 16)


def test_classes_of_train_and_val_have_the_same_names(tmp_path):
    for split, names in (("train", ("ant", "cat", "dog")), ("val", ("cat", "dog"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    with pytest.raises(ConfigError, match="3 and 2; their folders"):
        script.held_out(tmp_path, labelled_images(tmp_path).classes)


def test_a_broken_picture_of_an_infinity_run_is_named_and_skipped(tmp_path, text_file, caplog):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for n in range(2):
            Image.new("RGB", (32, 32), (90 * n, 60, 30)).save(tmp_path / "train" / name / f"{n}.png")
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"no picture")
    images = labelled_images(tmp_path)
    pictures = TrainingPictures(images, TextFeatures(text_file, len(images), 2), 32, flip=False)
    assert all(pictures[n][0].shape == (3, 32, 32) for n in range(8))
    (record,) = caplog.records  # once, though two epochs met it
    assert "cat/1.png is skipped: " in record.getMessage()


def test_class_folders_and_a_pack_give_the_same_pictures(pack, tmp_path):
    packed = labelled_images(pack)
    for n in range(len(packed)):
        _, label, data = packed.read(n)
        folder = tmp_path / "folders" / "train" / packed.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n}.png").write_bytes(data)
    folders = labelled_images(tmp_path / "folders")
    assert folders.classes == packed.classes == ("cat", "dog")
    assert folders.labels.tolist() == packed.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(folders.pictures(32), packed.pictures(32))
    assert folders.pictures(32).shape == (4, 3, 32, 32)
    with pytest.raises(ConfigError, match="no classes"):
        labelled_images(tmp_path / "folders" / "train" / "cat")
