"""Checkpoints as they are published: every layout of file, hostile ones, and keys that are missing or strange."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.test_generator_oracles import infinity_shapes, llama_shapes, random_weights, var_shapes
from vtc.errors import ConfigError, ModelError
from vtc.generators.upstream import load_generator_checkpoint

Weights = dict[str, Tensor]


def var() -> Weights:
    return random_weights(var_shapes(2, 24, 2, (1, 2, 3), False, True)) | {
        "lvl_1L": torch.tensor([[0] + [1] * 4 + [2] * 9])}


def infinity() -> Weights:
    return random_weights(infinity_shapes(4, 32, 2, 4, 2))


def llama() -> Weights:
    return random_weights(llama_shapes(2, 32, 40))


LAYOUTS: dict[str, Any] = {
    "plain": lambda w: w,
    "training of VAR": lambda w: {"epoch": 3, "trainer": {"config": {}, "var_wo_ddp": w, "vae_local": {
        "x": torch.zeros(1)}}, "args": {"depth": 2}},
    "training of Infinity": lambda w: {"trainer": {"vae_local": {"x": torch.zeros(1)}, "gpt_fsdp": w}},
    "training of LlamaGen": lambda w: {"model": w, "optimizer": {"state": {}}, "steps": 7, "ema": {
        k: v + 1 for k, v in w.items()}},
    "DeepSpeed": lambda w: {"module": w, "dp_world_size": 8}, "Lightning": lambda w: {"state_dict": w},
    "compiled and distributed": lambda w: {f"module._orig_mod.{k}": v for k, v in w.items()},
    "half": lambda w: {k: v.half() if v.is_floating_point() else v for k, v in w.items()}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("make", "settings", "key"), [
    (var, {}, "word_embed.weight"), (infinity, {}, "word_embed.weight"),
    (llama, {"heads": 4, "side": 3}, "tok_embeddings.weight")])
def test_every_layout_of_a_file(layout: str, make: Any, settings: dict[str, Any], key: str, tmp_path: Path) -> None:
    weights = make()
    torch.save(LAYOUTS[layout](weights), tmp_path / "a.pth")
    model = load_generator_checkpoint(tmp_path / "a.pth", **settings)
    wanted = weights[key].half().float() if layout == "half" else weights[key]
    assert torch.equal(model.state_dict()["word.weight"], wanted)
    assert not model.training and all(t.dtype == torch.float32 for t in model.parameters())


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_folder_of_parts(suffix: str, tmp_path: Path) -> None:
    weights = infinity()
    names = sorted(weights)
    where = {name: f"part-{i % 3}{suffix}" for i, name in enumerate(names)}
    for part in sorted(set(where.values())):
        tensors = {name: weights[name] for name in names if where[name] == part}
        save_file(tensors, tmp_path / part) if suffix == ".safetensors" else torch.save(tensors, tmp_path / part)
    with pytest.raises(ModelError, match=r"has no files \*\.index\.json"):
        load_generator_checkpoint(tmp_path)
    index = tmp_path / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    model = load_generator_checkpoint(tmp_path)
    assert torch.equal(model.state_dict()["blocks.3.mlp.0.weight"],
                       weights["block_chunks.1.module.1.ffn.fc1.weight"])
    for content, why in (("{", "cannot be read as an index"), ("[]", "cannot be read as an index"),
                         ('{"weight_map": 3}', "cannot be read as an index"),
                         (json.dumps({"weight_map": where | {"x": "../a.pth"}}), "not in its folder"),
                         (json.dumps({"weight_map": where | {"x": "part-9.bin"}}), "not in its folder"),
                         (json.dumps({"weight_map": where | {"x": f"part-0{suffix}"}}), "lack x")):
        index.write_text(content)
        with pytest.raises(ModelError, match=why):
            load_generator_checkpoint(tmp_path)


class Bomb:
    """What runs a command when an ordinary unpickler reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrapped", [True, False])
def test_nothing_in_a_file_is_executed(wrapped: bool, tmp_path: Path) -> None:
    bomb, weights = Bomb(tmp_path / "boom"), llama()
    torch.save({"model": weights, "args": bomb} if wrapped else weights | {"args": bomb}, tmp_path / "a.pt")
    model = load_generator_checkpoint(tmp_path / "a.pt", heads=4, side=3)  # the tensors are there, the rest is inert
    assert torch.equal(model.word.weight, weights["tok_embeddings.weight"])
    (tmp_path / "b.pt").write_bytes(pickle.dumps(bomb))
    for name, content in (("b.pt", None), ("c.pt", b""), ("d.pt", b"\x80\x04."), ("e.safetensors", b"x" * 40),
                          ("f.pth", (tmp_path / "a.pt").read_bytes()[:3000])):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError):
            load_generator_checkpoint(tmp_path / name)
    assert not (tmp_path / "boom").exists()
    with pytest.raises(ModelError, match="There is no checkpoint"):
        load_generator_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize(("make", "settings", "key", "ours"), [
    (var, {}, "blocks.1.attn.proj.bias", r"blocks\.1\.attention\.proj\.bias"),
    (infinity, {}, "block_chunks.1.module.0.ca.mat_q.bias", r"blocks\.2\.cross_attention\.q\.bias"),
    (infinity, {}, "text_proj_for_ca.2.weight", r"text_mlp\.2\.weight"),
    (llama, {"heads": 4, "side": 3}, "layers.0.feed_forward.w3.weight", r"blocks\.0\.mlp\.up\.weight")])
def test_keys_that_are_missing_strange_or_of_other_shapes_are_named(make: Any, settings: dict[str, Any], key: str,
                                                                    ours: str, tmp_path: Path) -> None:
    weights = make()
    for changed, why in (({k: v for k, v in weights.items() if k != key}, f"lacks {ours}"),
                         (weights | {"odd.one": torch.zeros(2)}, r"has left over odd\.one"),
                         (weights | {key: torch.zeros(3, 7)}, f"in other shapes {ours}")):
        torch.save(changed, tmp_path / "a.pt")
        with pytest.raises(ModelError, match=why):
            load_generator_checkpoint(tmp_path / "a.pt", **settings)
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="has no setting 'sides_of'"):
        load_generator_checkpoint(tmp_path / "a.pt", **settings, sides_of=3)
    with pytest.raises(ModelError):
        load_generator_checkpoint(tmp_path / "a.pt", "llamagen" if make is not llama else "var")


def test_what_a_file_does_not_tell_is_asked_for(tmp_path: Path) -> None:
    weights = var()
    del weights["lvl_1L"]
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="does not tell VAR's sides"):
        load_generator_checkpoint(tmp_path / "a.pt")
    assert load_generator_checkpoint(tmp_path / "a.pt", sides=(1, 2, 3)).sides == (1, 2, 3)
