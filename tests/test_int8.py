"""Weights as int8: what is rounded and by how much, what is stored, what is refused, and learning with it."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.test_training_data import photographs  # noqa: F401  # a fixture
from vtc.errors import ConfigError, ModelError
from vtc.int8 import dequantize, quantize, quantize_weights, rounded, train_quantized, trained_quantized
from vtc.models import load_tokenizer
from vtc.tokenizers.local_vq import LocalVQ


def small(seed: int = 0) -> LocalVQ:
    torch.manual_seed(seed)
    return LocalVQ(codebook_size=32, dim=8, encoder_widths=(8, 8, 8), encoder_depths=(1, 1, 1),
                   decoder_widths=(8, 8, 8, 8), decoder_depths=(1, 1, 1, 1), thin=4).eval()


def wide_weights() -> torch.Tensor:
    """(20, 5, 3, 3) whose channels differ by six powers of ten, the first one all zero."""
    weights = torch.randn(20, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    return weights * torch.logspace(-4, 2, 20)[:, None, None, None] * (torch.arange(20) > 0)[:, None, None, None]


def test_a_weight_is_off_by_half_a_step_at_most():
    """The bound: half of max / 127 of its channel, and float16's rounding (2^-11 relative) before and after."""
    weights = wide_weights()
    q, scale = quantize(weights)
    assert q.dtype == torch.int8 and q.abs().max() == 127 and scale.shape == (20,)
    error = (dequantize(q, scale).double() - weights.double()).abs().numpy()
    w = weights.double().numpy()
    largest = np.abs(w).reshape(20, -1).max(1)[:, None, None, None]
    bound = largest * (1 + 2**-11) / 127 / 2 + 2 * np.abs(w) * 2**-11 + 2**-24
    assert (error <= bound).all()
    assert (error > 0.4 * largest / 127)[1:].any()  # and the bound is not an idle one
    assert (dequantize(q, scale)[0] == 0).all()


def test_rounding_twice_is_rounding_once():
    weights = wide_weights()
    once = dequantize(*quantize(weights))
    assert torch.equal(dequantize(*quantize(once.float())), once)
    flat, half = once.flatten(1), weights.half().flatten(1)
    assert torch.equal(flat.abs().amax(1), half.abs().amax(1))  # the largest of a channel stays


def test_the_gradient_passes():
    weights = wide_weights().requires_grad_()
    factor = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))
    (rounded(weights) * factor).sum().backward()
    assert torch.equal(weights.grad, factor)
    torch.testing.assert_close(rounded(weights), dequantize(*quantize(weights)).float(), rtol=1e-6, atol=1e-9)


def test_a_model_is_stored_in_half_the_bytes_and_loads_to_the_same_numbers(tmp_path):
    model, plain = small(), small()
    plain.save_pretrained(tmp_path / "float16")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = quantize_weights(model)
    model.save_pretrained(tmp_path / "int8")
    assert json.loads((tmp_path / "int8/config.json").read_text())["weights"] == "int8"
    assert names == {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    stored = load_file(tmp_path / "int8/model.safetensors")
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.int8} == names
    for name, tensor in model.state_dict().items():  # what is no convolution's weight stays
        assert (name in names) or torch.equal(tensor, before[name]), name

    loaded = load_tokenizer(tmp_path / "int8")
    assert isinstance(loaded, LocalVQ) and loaded.int8_weights == names
    for name in names:
        assert torch.equal(loaded.state_dict()[name], model.state_dict()[name]), name
        assert loaded.state_dict()[name].dtype == torch.float32
    images = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.encode(images).indices, load_tokenizer(tmp_path / "int8").encode(images).indices)


def test_the_fingerprint_is_that_of_a_float16_copy_and_saving_again_gives_the_same_bytes(tmp_path):
    model = small()
    plain = model.fingerprint()
    quantize_weights(model)
    assert model.fingerprint() != plain
    model.save_pretrained(tmp_path / "a")
    loaded = LocalVQ.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    copy = small()
    copy.load_state_dict({k: v.half() if v.is_floating_point() else v for k, v in loaded.state_dict().items()})
    copy.save_pretrained(tmp_path / "float16")
    assert len({LocalVQ.from_pretrained(tmp_path / f).fingerprint() for f in ("a", "b", "float16")}) == 1


def test_a_part_of_a_model(tmp_path):
    model, before = small(), small()
    names = quantize_weights(model, ("decoder.",))
    assert names and all(name.startswith("decoder.") for name in names)
    assert torch.equal(model.encoder.stem.weight, before.encoder.stem.weight)
    model.save_pretrained(tmp_path)
    loaded = LocalVQ.from_pretrained(tmp_path)
    assert loaded.int8_weights == names
    assert torch.equal(loaded.encoder.stem.weight, before.encoder.stem.weight.half().float())
    with pytest.raises(ConfigError, match=r"begins with nowhere\."):
        quantize_weights(model, ("nowhere.",))


def test_shapes_alone_need_no_weights(tmp_path):
    model = small()
    quantize_weights(model)
    model.save_pretrained(tmp_path)
    assert LocalVQ.without_weights(tmp_path).encoder.stem.weight.is_meta


def damaged(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a file, named with __ for a dot; None takes one out."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name) if tensor is None else tensors.__setitem__(name, tensor)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(("changes", "message"), [
    ({"encoder__stem__weight_scale": None}, "no float32 scale"),
    ({"encoder__stem__weight_scale": torch.ones(7)}, "no float32 scale"),
    ({"encoder__stem__weight_scale": torch.ones(8).half()}, "no float32 scale"),
    ({"encoder__stem__weight_scale": torch.full((8,), torch.nan)}, "not allowed"),
    ({"encoder__stem__weight_scale": -torch.ones(8)}, "not allowed"),
    ({"encoder__stem__weight": torch.full((8, 48, 3, 3), -128, dtype=torch.int8)}, "not allowed"),
    ({"encoder__stem__weight": torch.ones(8, 48, 1, 1, dtype=torch.int8)}, "does not fit"),
    ({"encoder__stem__bias": None}, "does not fit"),
])
def test_a_damaged_file_is_refused(tmp_path, changes, message):
    model = small()
    quantize_weights(model)
    model.save_pretrained(tmp_path)
    damaged(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        LocalVQ.from_pretrained(tmp_path)


def test_a_configuration_that_does_not_say_what_the_file_holds_is_refused(tmp_path):
    model = small()
    model.save_pretrained(tmp_path / "float16")
    quantize_weights(model)
    model.save_pretrained(tmp_path / "int8")
    configs = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("float16", "int8")}
    (tmp_path / "float16/config.json").write_text(json.dumps(configs["int8"]))
    with pytest.raises(ModelError, match="weights are int8, and none is"):
        LocalVQ.from_pretrained(tmp_path / "float16")
    (tmp_path / "int8/config.json").write_text(json.dumps(configs["float16"]))
    with pytest.raises(ModelError, match=r"does not fit LocalVQ: .*weight_scale"):
        LocalVQ.from_pretrained(tmp_path / "int8")
    (tmp_path / "int8/config.json").write_text(json.dumps({**configs["int8"], "weights": "int3"}))
    with pytest.raises(ModelError, match="'int3' weights, which this vtc cannot read"):
        LocalVQ.from_pretrained(tmp_path / "int8")


def test_weights_beyond_float16_are_refused():
    with pytest.raises(ModelError, match="no number of float16"):
        quantize(torch.full((2, 2), 1e6))


def test_a_network_that_learns_with_rounded_weights_computes_as_the_one_that_is_saved(tmp_path):
    model, reference = small(), small()
    quantize_weights(reference)
    train_quantized(model)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images)[0], reference(images)[0], atol=1e-6, rtol=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output, quantized = model.train()(images)
    (output.square().mean() + quantized.loss).backward()
    assert model.encoder.stem.weight.grad.abs().sum() > 0
    optimizer.step()
    finished = trained_quantized(model.eval())
    assert [type(m) for m in finished.modules()] == [type(m) for m in reference.modules()]
    assert [type(m) for m in model.modules()] != [type(m) for m in reference.modules()]  # the copy alone is plain
    finished.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(LocalVQ.from_pretrained(tmp_path)(images)[0], model(images)[0], atol=2e-3, rtol=0)
        assert (model(images)[0] - reference(images)[0]).abs().max() > 5e-3  # it did learn


def test_the_training_script_trains_and_resumes_with_int8(photographs, tmp_path):  # noqa: F811
    script = import_module("scripts.train_tokenizer")

    def run(output: str, *more: str) -> int:
        sizes = ["codebook_size=16", "dim=4", "encoder_widths=[8,8,8]", "encoder_depths=[1,1,1]",
                 "decoder_widths=[8,8,8,8]", "decoder_depths=[1,1,1,1]", "thin=4"]
        return script.main([
            "--model_args", *sizes, "--train_data_dir", str(photographs), "--output_dir", str(tmp_path / output),
            "--resolution", "32", "--train_batch_size", "2", "--max_train_steps", "4", "--continuous_steps", "1",
            "--perceptual_weight", "0", "--gan_weight", "0.1", "--adaptive_weight", "--discriminator_channels", "4",
            "--discriminator_layers", "1", "--discriminator_norm", "none", "--report_to", "none", "--int8",
            "--dataloader_num_workers", "0", "--checkpointing_steps", "2", "--mixed_precision", "no", *more])

    assert run("whole") == 0
    model = load_tokenizer(tmp_path / "whole/model")
    assert isinstance(model, LocalVQ) and "decoder.head.weight" in model.int8_weights
    for path in ("checkpoint-4", "model"):
        folder = tmp_path / "resumed" / path
        assert not folder.exists()
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole/checkpoint-2").rename(tmp_path / "resumed/checkpoint-2")
    assert run("resumed", "--resume_from_checkpoint", "latest") == 0
    assert ((tmp_path / "resumed/model/model.safetensors").read_bytes()
            == (tmp_path / "whole/model/model.safetensors").read_bytes())
    assert run("plain", "--no-int8", "--init_from", str(tmp_path / "whole/model")) == 0
    assert "weights" not in json.loads((tmp_path / "plain/model/config.json").read_text())
    assert run("sharded", "--shard") == 1


def test_the_script_quantizes_and_measures(photographs, tmp_path, capsys, monkeypatch):  # noqa: F811
    script = import_module("scripts.quantize_weights")
    small().save_pretrained(tmp_path / "model")
    assert script.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "int8"), "--json",
                        "--layers", "decoder."]) == 0
    facts = json.loads(capsys.readouterr().out)
    before, after = facts["bytes"]
    assert after < before and facts["fingerprint"][1] == load_tokenizer(tmp_path / "int8").fingerprint().hex()
    assert script.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "x"), "--layers", "no"]) == 1
    assert "no convolution" in capsys.readouterr().err and not (tmp_path / "x").exists()
