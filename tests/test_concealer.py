"""The concealer: what it promises of tokens, grids, codebooks and files, and how it is trained."""

from importlib import import_module

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file

from tests.shared import ROOT, SHARED, needs_shared
from vtc.codecs import concealer as concealer_module
from vtc.codecs.concealer import CONCEALER, Concealer, WindowAttention
from vtc.errors import ConfigError, FileError, ModelError
from vtc.images import load_image
from vtc.models import DEFAULT_MODEL, load_tokenizer
from vtc.tokenizers.base import Tokenizer, TokenLayout, Tokens
from vtc.tokenizers.extra_words import with_extra_words
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.lpips import LPIPS
from vtc.tokenizers.vector_quantizer import GradientVectorQuantizer, VectorQuantizer
from vtc.training.concealer import BatchNumbers, ConcealerRecipe, ConcealerTask, random_losses, soft_targets
from vtc.training.data import image_files
from vtc.training.loop import Loop
from vtc.training.perceptual import PerceptualLoss
from vtc.training.tokens import TokenGrids


def tiny(seed: int = 0, **config: int) -> Concealer:
    """Random weights, large enough to make predictions differ; window 4."""
    torch.manual_seed(seed)
    model = Concealer(**({"dim": 6, "width": 24, "depth": 3, "heads": 2, "window": 4, "key": 8} | config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def case(rows: int, columns: int, words: int = 11, batch: int = 1, share: float = 0.3, seed: int = 0):
    """Indices, lost, grid, codebook."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(words, (batch, rows * columns), generator=generator)
    lost = torch.rand(batch, rows * columns, generator=generator) < share
    return indices, lost, (rows, columns), torch.randn(words, 6, generator=generator)


# Inference


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 9), (7, 5), (16, 16), (13, 70)])
def test_only_lost_tokens_change_and_their_old_values_are_not_read(rows, columns):
    model = tiny()
    indices, lost, grid, codebook = case(rows, columns, batch=2)
    lost[0, 0] = True
    filled = model.conceal(indices, lost, grid, codebook)
    assert filled.dtype == torch.int64 and filled.shape == indices.shape
    assert torch.equal(filled[~lost], indices[~lost])
    assert filled.min() >= 0 and filled.max() < len(codebook)
    nonsense = torch.where(lost, 10**6, indices)  # beyond the codebook: reading it would fail
    assert torch.equal(model.conceal(nonsense, lost, grid, codebook), filled)
    codes = model.conceal_codes(nonsense, lost, grid, codebook)
    assert torch.equal(codes[~lost], codebook[indices[~lost]])


def test_all_lost_and_nothing_lost():
    model = tiny()
    indices, lost, grid, codebook = case(5, 6)
    assert torch.equal(model.conceal(indices, torch.zeros_like(lost), grid, codebook), indices)
    assert model.conceal(indices, torch.ones_like(lost), grid, codebook).max() < len(codebook)


def test_pictures_of_a_batch_do_not_see_one_another():
    model = tiny()
    indices, lost, grid, codebook = case(6, 9, batch=3)
    together = model.conceal_codes(indices, lost, grid, codebook)
    for n in range(3):
        alone = model.conceal_codes(indices[n : n + 1], lost[n : n + 1], grid, codebook)
        torch.testing.assert_close(together[n : n + 1], alone, rtol=0, atol=1e-5)


def test_words_are_known_by_their_codewords_alone():
    """Another order of the words gives the same codes and the reordered indices."""
    model = tiny()
    indices, lost, grid, codebook = case(9, 8, words=13)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    place = order.argsort()  # word w is now word place[w]
    torch.testing.assert_close(model.conceal_codes(place[indices], lost, grid, codebook[order]),
                               model.conceal_codes(indices, lost, grid, codebook), rtol=0, atol=1e-5)
    assert torch.equal(model.conceal(place[indices], lost, grid, codebook[order]),
                       place[model.conceal(indices, lost, grid, codebook)])


def test_mean_codewords_are_the_mean_under_the_softmax_of_the_logits():
    model = tiny()
    indices, lost, grid, codebook = case(6, 7)
    with torch.no_grad():
        logits = model(codebook[indices].unflatten(1, grid), lost.unflatten(1, grid), codebook)
    for model.temperature, model.gain in ((1.0, 1.0), (1.5, 0.5)):
        p = logits.div(model.temperature).softmax(1)
        expected = model.gain * sum(share[:, None] * word for share, word in zip(p.T, codebook, strict=True))
        codes = model.conceal_codes(indices, lost, grid, codebook)
        torch.testing.assert_close(codes[lost], expected, rtol=0, atol=1e-5)
    assert torch.equal(model.conceal(indices, lost, grid, codebook)[lost], logits.argmax(1))


def test_tiles_give_what_the_whole_gives(monkeypatch):
    """Two blocks with windows of 4 reach 2 x (1 + 3) positions at most, and the halo is 8."""
    model = tiny(depth=2)
    indices, lost, grid, codebook = case(37, 45)
    whole = model.conceal_codes(indices, lost, grid, codebook)
    calls = []
    monkeypatch.setattr(concealer_module, "TILE", 16)
    monkeypatch.setattr(concealer_module, "HALO", 8)
    model.register_forward_pre_hook(lambda _, arguments: calls.append(arguments[0].shape[1:3]))
    torch.testing.assert_close(model.conceal_codes(indices, lost, grid, codebook), whole, rtol=0, atol=1e-5)
    assert len(calls) == 9 and max(max(shape) for shape in calls) <= 32
    lost[:] = False
    lost[0, 0] = True
    calls.clear()
    model.conceal(indices, lost, grid, codebook)
    assert len(calls) == 1, "tiles without losses are not looked at"


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (5, 11), (1, 3)])
def test_window_attention_against_loops(shift, rows, columns):
    """Every position attends to those of its window, by the dot product and the bias of the relative place."""
    torch.manual_seed(0)
    attention = WindowAttention(12, heads=3, window=4, shift=shift)
    torch.nn.init.normal_(attention.bias)
    x = torch.randn(1, rows, columns, 12)
    q, k, v = attention.qkv(x)[0].unflatten(-1, (3, 3, 4)).unbind(2)  # (rows, columns, heads, 4)
    out = torch.zeros(rows, columns, 3, 4)
    for y, x_ in np.ndindex(rows, columns):
        window = [(a, b) for a, b in np.ndindex(rows, columns)
                  if (a + shift) // 4 == (y + shift) // 4 and (b + shift) // 4 == (x_ + shift) // 4]
        for head in range(3):
            bias = attention.bias[head].view(7, 7)
            scores = torch.stack([q[y, x_, head] @ k[a, b, head] / 2 + bias[y - a + 3, x_ - b + 3] for a, b in window])
            out[y, x_, head] = sum(w * v[a, b, head] for w, (a, b) in zip(scores.softmax(0), window, strict=True))
    torch.testing.assert_close(attention(x)[0], attention.proj(out.flatten(2)), rtol=0, atol=1e-5)


def test_wrong_codewords_and_shapes_are_named():
    model = tiny()
    indices, lost, grid, codebook = case(4, 4)
    with pytest.raises(ModelError, match="6 dimensions"):
        model.conceal(indices, lost, grid, codebook[:, :5])
    with pytest.raises(ConfigError, match="4x5"):
        model.conceal(indices, lost, (4, 5), codebook)
    with pytest.raises(ConfigError):
        model.conceal(indices, lost[:, 1:], grid, codebook)


# Vectors that are no words


@pytest.mark.parametrize("quantizer", [VectorQuantizer, GradientVectorQuantizer])
def test_extra_words_are_drawn_as_the_vectors_that_they_are(quantizer):
    model = tiny_tokenizers()[16].eval()
    model.quantizer = quantizer(16, 6)
    with torch.no_grad():
        model.quantizer.codebook.copy_(torch.randn(16, 6))
    words = torch.randn(3, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    longer = with_extra_words(model, words)
    indices = torch.tensor([[0, 16, 5, 18, 15, 17]])
    layout = TokenLayout(((2, 3),), longer.quantizer.vocab)
    drawn = longer.decode(Tokens(indices[..., None], layout, 32, 48))
    codes = torch.cat([model.quantizer.codebook, words])[indices]
    expected = model.reconstruct(codes.unflatten(1, (2, 3)).permute(0, 3, 1, 2)).clamp(0, 1)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)
    assert model.quantizer.codebook_size == 16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert longer.decoder is model.decoder and not longer.training


def test_extra_words_need_a_codebook_of_their_dimension():
    model = tiny_tokenizers()[16]
    with pytest.raises(ConfigError, match=r"\(N, 6\)"):
        with_extra_words(model, torch.zeros(2, 5))
    with pytest.raises(ConfigError, match="no codebook"):
        with_extra_words(Tokenizer(), torch.zeros(2, 6))


# Files


def test_a_file_brings_back_the_same_concealer(tmp_path):
    model = tiny()
    model.temperature, model.gain = 1.25, 0.75
    model.save(tmp_path / CONCEALER, base="abc")
    loaded = Concealer.load(tmp_path / CONCEALER)
    assert loaded.config == model.config and (loaded.temperature, loaded.gain) == (1.25, 0.75) and not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileError):
        Concealer.load(tmp_path / "none.safetensors")
    (tmp_path / "noise").write_bytes(b"\xff" * 100)
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    save_file({"a": torch.zeros(1)}, tmp_path / "damaged", {"format": concealer_module.FORMAT, "config": "{}"})
    save_file({}, tmp_path / "config", {"format": concealer_module.FORMAT, "config": '{"width": -1}'})
    for name in ("noise", "other", "damaged", "config"):
        with pytest.raises(ModelError):
            Concealer.load(tmp_path / name)


def test_the_bundled_concealer_beats_neighbours_and_mean():
    """A photograph that nothing was trained on, 20 % of its tokens lost, by the error of codewords and of pixels."""
    path = ROOT / "vtc" / "pretrained" / DEFAULT_MODEL / CONCEALER
    assert path.stat().st_size <= 4 * 2**20
    model, tokenizer = Concealer.load(path), load_tokenizer()
    image = load_image(ROOT / "docs" / "images" / "coffee.png").tensor()[None]
    tokens = tokenizer.encode(image)
    indices, (grid,), codebook = tokens.indices[..., 0], tokens.layout.scales, tokenizer.codewords
    lost = torch.rand(indices.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    lost[:, 0] = False
    true = codebook[indices][lost]

    def error(codes: torch.Tensor) -> float:
        return (codes - true).square().sum(1).mean().item()

    mean = tokenizer.token_frequencies[0].float() / tokenizer.token_frequencies.sum() @ codebook
    source = torch.arange(indices.shape[1]).masked_fill(lost[0], 0).cummax(0).values  # the last received before it
    filled = model.conceal(indices, lost, grid, codebook)
    assert error(model.conceal_codes(indices, lost, grid, codebook)[lost]) < 0.75 * error(mean)
    assert error(model.conceal_codes(indices, lost, grid, codebook)[lost]) < 0.75 * error(
        codebook[indices[:, source]][lost])
    assert (filled == indices)[lost].float().mean() > 0.04  # one of 8,192


# Training


def test_soft_targets_are_probabilities_that_fall_with_the_distance():
    codebook = torch.tensor([[0.0], [1.0], [3.0]])
    target = soft_targets(torch.tensor([0, 2]), codebook, share=0.4, width=1.0)
    torch.testing.assert_close(target.sum(1), torch.ones(2))
    near = np.exp(-np.array([0, 1, 9]) / 2)
    expected = 0.4 * near / near.sum() + [0.6, 0, 0]
    np.testing.assert_allclose(target[0].numpy(), expected, atol=1e-6)


def test_random_losses_leave_something_and_take_something():
    shares = []
    for seed in range(300):
        lost = random_losses(np.random.default_rng(seed), 9, 12)
        assert lost.shape == (9, 12) and lost.dtype == torch.bool
        shares.append(lost.float().mean().item())
    assert min(shares) > 0 and max(shares) < 1
    assert 0.15 < np.mean(shares) < 0.45
    assert random_losses(np.random.default_rng(0), 1, 2).sum() == 1


def tiny_tokenizers() -> dict[int, LocalVQ]:
    """A model of 16 words and a member of 5."""
    torch.manual_seed(0)
    return {size: LocalVQ(codebook_size=size, dim=6, encoder_widths=(8, 8, 8), encoder_depths=(1, 1, 1),
                          decoder_widths=(8, 8, 8, 8), decoder_depths=(1, 1, 1, 1), thin=4) for size in (5, 16)}


def stripes(words: int, views: int = 1) -> TokenGrids:
    """Grids in which each column has one word: a lost token is known from those above and below."""
    rng = np.random.default_rng(0)
    grids = [np.broadcast_to(rng.integers(words, size=12), (10, 12)) for _ in range(views * 16)]
    return TokenGrids(np.array([g.shape for g in grids], np.int32),
                      {words: np.concatenate([g.reshape(-1) for g in grids]).astype(np.int16)})


def run_in(output_dir, recipe: ConcealerRecipe, members, views, files=(), loss=None, validation=None) -> Loop:
    torch.manual_seed(0)
    model = Concealer(6, width=24, depth=2, heads=2, window=4, key=16)
    task = ConcealerTask(model, recipe, members, views, list(files), loss, validation)
    return Loop(task, recipe, Accelerator(cpu=True), BatchNumbers(), output_dir)


def test_it_learns_to_look_along_stripes(tmp_path):
    members = {16: tiny_tokenizers()[16]}
    members[16].quantizer.codebook.copy_(torch.randn(16, 6))
    recipe = ConcealerRecipe(max_train_steps=80, picture_steps=0, tokens_per_step=360, lr_warmup_steps=10,
                             learning_rate=5e-3, label_smoothing=0.0, mixed_precision="no", validation_steps=0)
    model = run_in(tmp_path / "run", recipe, members, [stripes(16)], validation=stripes(16)).train()
    indices = torch.from_numpy(stripes(16).tokens[16].reshape(16, -1).astype(np.int64))
    lost = torch.rand(indices.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    filled = model.conceal(indices, lost, (10, 12), members[16].codewords)
    assert (filled == indices)[lost].float().mean() > 0.6  # chance is one of 16
    assert (tmp_path / "run" / "validation.jsonl").read_text().count("\n") == 1


@needs_shared("weights")
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    """Three token steps and three picture steps, stopped in each part."""
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (60, 70, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    members = tiny_tokenizers()
    grids = stripes(16)
    grids = TokenGrids(grids.shapes, grids.tokens | {5: grids.tokens[16] % 5})
    recipe = ConcealerRecipe(max_train_steps=3, picture_steps=3, tokens_per_step=240, train_batch_size=2, resolution=48,
                             lr_warmup_steps=1, mixed_precision="no", checkpointing_steps=2)
    loss = PerceptualLoss(LPIPS("squeeze", SHARED / "weights"))
    ends = {}
    for name, stops in {"whole": [6], "resumed": [2, 4, 6]}.items():
        for stop in stops:
            files = [path for path in image_files(tmp_path) if path.parent == tmp_path]
            run = run_in(tmp_path / name, recipe, members, [grids], files, loss)
            if stop != stops[0]:
                assert run.resume("latest")
            average = run.train(stop)
        ends[name] = {**run.task.model.state_dict(), **{f"average.{k}": v for k, v in average.state_dict().items()}}
    for key, tensor in ends["whole"].items():
        assert torch.equal(tensor, ends["resumed"][key]), key


def test_picture_steps_need_the_perceptual_network(tmp_path):
    with pytest.raises(ConfigError, match="lpips_weights"):
        run_in(tmp_path / "run", ConcealerRecipe(), tiny_tokenizers(), [stripes(16)])


def test_the_script_trains_from_a_folder_of_photographs(tmp_path):
    script = import_module("scripts.train_concealer")
    rng = np.random.default_rng(0)
    (tmp_path / "photographs").mkdir()
    for i in range(2):
        Image.fromarray(rng.integers(0, 255, (100, 120, 3), dtype=np.uint8)).save(tmp_path / "photographs" / f"{i}.png")
    tiny_tokenizers()[16].save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--train_data_dir", str(tmp_path / "photographs"), "--output_dir",
                 str(tmp_path / "run"), "--views", "2", "--width", "16", "--depth", "1", "--heads", "2",
                 "--max_train_steps", "2", "--picture_steps", "0", "--mixed_precision", "no"]
    assert script.main(arguments) == 0
    model = Concealer.load(tmp_path / "run" / CONCEALER)
    assert model.config["dim"] == 6 and model.config["depth"] == 1
    assert script.main([*arguments, "--resume_from_checkpoint", "latest"]) == 0


@needs_shared("weights")
def test_the_evaluation_writes_a_table_and_does_not_measure_twice(tmp_path, monkeypatch):
    script = import_module("scripts.evaluate_concealment")
    rng = np.random.default_rng(0)
    (tmp_path / "photographs").mkdir()
    Image.fromarray(rng.integers(0, 255, (64, 80, 3), dtype=np.uint8)).save(tmp_path / "photographs" / "a.png")
    tiny_tokenizers()[16].save_pretrained(tmp_path / "model")
    tiny().save(tmp_path / "model" / CONCEALER)
    arguments = ["--model", str(tmp_path / "model"), "--images", str(tmp_path / "photographs"), "--output",
                 str(tmp_path / "out"), "--lpips_weights", str(SHARED / "weights"), "--quiet"]
    assert script.main([*arguments, "--patterns", "20 % singly", "--picture",
                        str(tmp_path / "photographs" / "a.png")]) == 0
    first = (tmp_path / "out" / "results.md").read_text()
    assert "| 20 % singly | concealer |" in first and "## 16 words" in first
    assert load_image(tmp_path / "out" / "sheet.jpg").pixels.shape == (128, 400, 3)
    drawn = []
    original = script.drawn
    monkeypatch.setattr(script, "drawn", lambda *given: drawn.append(1) or original(*given))
    assert script.main([*arguments, "--patterns", "20 % singly", "1 of 8 chunks (12.5 %)", "--fillings", "mean"]) == 0
    assert len(drawn) == 1, "only the new pattern is measured"
    tiny(seed=1).save(tmp_path / "model" / CONCEALER)
    assert script.main([*arguments, "--patterns", "20 % singly", "--fillings", "mean", "words"]) == 0
    assert len(drawn) == 2, "another concealer is measured anew, the mean is not"


def test_both_phases_follow_the_schedule_that_is_asked_for() -> None:
    chosen = ConcealerRecipe(max_train_steps=10, picture_steps=10, lr_warmup_steps=5, learning_rate=1.0,
                             picture_learning_rate=0.5, final_learning_rate=0.1, lr_scheduler="linear")
    rates = [chosen.learning_rate_at(step) for step in range(20)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0]) and rates[9] == pytest.approx(0.28)
    assert rates[10:12] == pytest.approx([0.5, 0.5]) and rates[19] == pytest.approx(0.5 - 0.4 * 8 / 9)
    assert chosen.learning_rate_at(20) == pytest.approx(0.1)
