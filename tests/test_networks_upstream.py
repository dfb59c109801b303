"""Checkpoints of the true layouts with random weights: recognised, mapped strictly, read without running anything."""

from __future__ import annotations

import json
import pickle
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.fixtures import Fixture
from tests.shared import SHARED, needs_shared
from vtc.cli.import_checkpoint import main as vtc_import
from vtc.errors import ConfigError, ModelError
from vtc.models import load_tokenizer
from vtc.tokenizers import upstream
from vtc.tokenizers.classes import FAMILIES
from vtc.tokenizers.diffusers_adapters import AUTOENCODERS, DiffusersAutoencoder, DiffusersVQ, VQModel
from vtc.tokenizers.ibq import IBQ
from vtc.tokenizers.infinity_vae import InfinityVAE
from vtc.tokenizers.llamagen_vq import LlamaGenVQ
from vtc.tokenizers.open_magvit2 import OpenMAGVIT2
from vtc.tokenizers.upstream import from_state_dict, import_checkpoint, load_checkpoint, read_pickle
from vtc.tokenizers.var_vqvae import VARVQVAE
from vtc.tokenizers.vqgan import VQGAN
from vtc.tokenizers.wetok import WeTok

FIXTURES = needs_shared("fixtures")
NETWORK: dict[str, Any] = dict(channels=32, channel_multipliers=(1, 1, 2), num_res_blocks=1)


def random_model(cls: type[Any], **config: Any) -> Any:
    torch.manual_seed(0)
    return cls(**{**NETWORK, **config}).eval()


def weights(model: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def with_ema(tensors: dict[str, Tensor], extra: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Lightning's LitEma stores it: live weights are noise here, the averages under dotless names are the model."""
    live = {k: torch.randn_like(v) for k, v in tensors.items()}
    averages = {f"model_ema.{k.replace('.', '')}": v for k, v in {**tensors, **extra}.items()}
    return {**live, **extra, **averages, "model_ema.decay": torch.tensor(0.999),
            "model_ema.num_updates": torch.tensor(7)}


LOSS = {"loss.discriminator.main.0.weight": torch.zeros(2, 3, 4, 4), "loss.perceptual_loss.lin0.model.1.weight":
        torch.zeros(1, 4, 1, 1)}


def taming(model: VQGAN) -> dict[str, Tensor]:
    return {k.replace("quantizer.codebook", "quantize.embedding.weight"): v for k, v in weights(model).items()}


def llamagen(model: LlamaGenVQ) -> dict[str, Tensor]:
    """Written by hand from LlamaGen's modules: `mid` is a list, and the decoder's first level is the coarsest."""
    renamed = {"quantize.codebook_used": torch.zeros(65536)}
    for key, value in taming(model).items():
        for i, name in enumerate(("block_1", "attn_1", "block_2")):
            key = key.replace(f"mid.{name}.", f"mid.{i}.")
        parts = key.split(".")
        if parts[1] in ("down", "up"):
            level = int(parts[2]) if parts[1] == "down" else 2 - int(parts[2])
            parts[1:4] = ["conv_blocks", str(level), {"block": "res"}.get(parts[3], parts[3])]
        renamed[".".join(parts)] = value
    return renamed


def var(model: VARVQVAE) -> dict[str, Tensor]:
    tensors = {k.replace("quantizer.codebook", "quantize.embedding.weight")
               .replace("quantizer.phi.", "quantize.quant_resi.qresi_ls."): v for k, v in weights(model).items()}
    return {**tensors, "quantize.ema_vocab_hit_SV": torch.zeros(len(model.sides), model.vocab[0])}


def infinity(model: InfinityVAE) -> dict[str, Tensor]:
    tensors = {"quantizer.lfq.mask": torch.ones(6), "quantize.lfq.mask": torch.ones(6)}
    for key, value in weights(model).items():
        stem, _, leaf = key.rpartition(".")
        wrapper = "norm" if "norm" in stem.rsplit(".", 1)[-1] else "conv"
        tensors[f"{stem}.{wrapper}.{leaf}"] = value
    return tensors


VQ: dict[str, Any] = dict(codebook_size=16, embed_dim=4, z_channels=8)
CASES: dict[str, tuple[Any, Any, str | None, dict[str, Any]]] = {
    "vqgan": (lambda: random_model(VQGAN, attention_levels=(2,), **VQ), lambda m: {**taming(m), **LOSS}, "state_dict",
              {}),
    "ibq": (lambda: random_model(IBQ, attention_levels=(2,), **VQ), lambda m: with_ema(taming(m), LOSS), "state_dict",
            {}),
    "llamagen": (lambda: random_model(LlamaGenVQ, **VQ), llamagen, "model", {}),
    "wetok": (lambda: random_model(WeTok, groups=4), lambda m: with_ema(weights(m), LOSS), "state_dict", {}),
    "wetok_generative": (lambda: random_model(WeTok, groups=4, generative=True), lambda m: with_ema(weights(m), LOSS),
                         "state_dict", {}),
    "open_magvit2": (lambda: random_model(OpenMAGVIT2), lambda m: with_ema(weights(m), LOSS), "state_dict", {}),
    "var": (lambda: random_model(VARVQVAE, codebook_size=16, z_channels=8, sides=(1, 2, 3)), var, None,
            {"sides": (1, 2, 3)}),
    "infinity": (lambda: random_model(InfinityVAE, bits=6, sides=(1, 2)), infinity, "vae", {"sides": (1, 2)}),
    "infinity_bare": (lambda: random_model(InfinityVAE, bits=6, sides=(1, 2)), weights, "vae", {"sides": (1, 2)}),
}


#: IBQ and VQGAN of other depths than the published ones are told apart with a warning
BY_AVERAGES = pytest.mark.filterwarnings("ignore:VQGAN and IBQ have the same keys")


@BY_AVERAGES
@pytest.mark.parametrize("case", CASES)
def test_published_layouts_come_in_and_go_out(case, tmp_path):
    make, publish, key, settings = CASES[case]
    model = make()
    tensors = publish(model)
    path = tmp_path / "model.ckpt"
    torch.save({key: OrderedDict(tensors), "epoch": 3} if key else tensors, path)
    imported = import_checkpoint(path, tmp_path / "out", **settings)
    assert type(imported) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(imported.state_dict()[name], value), name
    loaded = type(model).from_pretrained(tmp_path / "out")
    again = load_checkpoint(tmp_path / "out")
    for other in (loaded, again):
        assert other.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(other.state_dict()[name], value) for name, value in model.state_dict().items())
        assert other.layout(50, 40) == model.layout(50, 40)
        assert other.fingerprint() == model.fingerprint()
    images = torch.rand(1, 3, 16, 24)
    assert torch.equal(loaded.encode(images).indices, model.encode(images).indices)
    assert {f.name for f in (tmp_path / "out").iterdir()} >= {"config.json", "model.safetensors"}


@BY_AVERAGES
def test_rounding_on_request(tmp_path):
    model = random_model(VQGAN, attention_levels=(2,), **VQ)
    torch.save(taming(model), tmp_path / "model.pt")
    import_checkpoint(tmp_path / "model.pt", tmp_path / "python", exact=False)
    assert vtc_import([str(tmp_path / "model.pt"), str(tmp_path / "command"), "--dtype", "float16", "-q"]) == 0
    for out in ("python", "command"):
        loaded = VQGAN.from_pretrained(tmp_path / out)
        assert all(torch.equal(t.half().float(), loaded.state_dict()[name]) for name, t in weights(model).items())
        assert loaded.fingerprint() == model.fingerprint()  # what float16 rounds away does not count


def test_tensors_are_stored_in_the_least_room_that_keeps_them(tmp_path):
    model = random_model(VQGAN, attention_levels=(2,), **VQ)
    model.decoder.conv_out.bias.data.copy_(torch.tensor([1e6, 1.0, -2.0]))  # beyond float16
    model.encoder.conv_out.bias.data.copy_(torch.arange(8))  # exact in float16
    with pytest.raises(ModelError, match=r"decoder\.conv_out\.bias has values beyond float16"):
        model.save_pretrained(tmp_path / "rounded")
    model.exact_weights = True
    model.save_pretrained(tmp_path / "exact")
    stored = load_file(tmp_path / "exact" / "model.safetensors")
    assert stored["encoder.conv_out.bias"].dtype == torch.float16
    assert stored["decoder.conv_out.bias"].dtype == stored["quantizer.codebook"].dtype == torch.float32
    loaded = VQGAN.from_pretrained(tmp_path / "exact")
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
    assert loaded.fingerprint() == model.fingerprint()
    model.decoder.conv_out.bias.data[0] += 100  # too much for float32 not to see
    assert loaded.fingerprint() != model.fingerprint()
    loaded.save_pretrained(tmp_path / "again")  # what was exact stays exact
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "exact" / "model.safetensors").read_bytes()


@BY_AVERAGES
@pytest.mark.parametrize("case", CASES)
def test_a_missing_and_a_left_over_key_are_named(case):
    make, publish, _, settings = CASES[case]
    tensors = publish(make())
    victim = next(k for k in tensors if k.startswith("decoder") and "conv_out" in k and k.endswith("bias"))
    without = {k: v for k, v in tensors.items() if k != victim and k != f"model_ema.{victim.replace('.', '')}"}
    with pytest.raises(ModelError, match=r"lacks .*decoder\.conv_out\.bias"):
        from_state_dict(without, **settings)
    with pytest.raises(ModelError, match=r"left over .*decoder\.surprise"):
        from_state_dict({**tensors, "decoder.surprise": torch.zeros(1)}, **settings)


@pytest.mark.parametrize(("blocks", "averaged", "family"), [(2, False, "vqgan"), (4, True, "ibq"), (4, False, None),
                                                             (2, True, None)])
def test_vqgan_and_ibq_are_told_apart_or_asked_for(blocks, averaged, family, tmp_path):
    depth: dict[str, Any] = dict(num_res_blocks=blocks, channel_multipliers=(1, 1))
    model = random_model(VQGAN, attention_levels=(1,), **VQ, **depth)
    tensors = with_ema(taming(model), {}) if averaged else taming(model)
    if family:
        assert upstream.recognise(tensors) == family
    else:
        with pytest.raises(ModelError, match=r"may be a VQGAN or an IBQ.* Give the family: vqgan .* or ibq"):
            upstream.recognise(tensors)
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")
    for said, cls in (("vqgan", VQGAN), ("ibq", IBQ)):
        assert type(load_checkpoint(tmp_path / "model.ckpt", said)) is cls
    out = tmp_path / "out"
    assert vtc_import([str(tmp_path / "model.ckpt"), str(out), "--family", "ibq", "-q"]) == 0
    assert type(load_tokenizer(out)) is IBQ


def test_an_unpublished_depth_goes_by_averages_with_a_warning():
    tensors = taming(random_model(VQGAN, attention_levels=(2,), **VQ))
    with pytest.warns(RuntimeWarning, match=r"no averaged weights, 1 .* taken for vqgan"):
        assert upstream.recognise(tensors) == "vqgan"
    with pytest.warns(RuntimeWarning, match=r"\(averaged weights, 1 .* taken for ibq"):
        assert upstream.recognise(with_ema(tensors, {})) == "ibq"


def test_the_names_of_the_families_are_those_that_the_command_knows():
    assert set(FAMILIES) == {*upstream.MAPS, "sc_vae"}


@BY_AVERAGES
def test_wrong_shapes_families_and_settings_are_told():
    tensors = taming(random_model(VQGAN, attention_levels=(2,), **VQ))
    with pytest.raises(ModelError, match=r"other shapes decoder\.conv_out\.bias"):
        from_state_dict({**tensors, "decoder.conv_out.bias": torch.zeros(4)})
    with pytest.raises(ConfigError, match="family"):
        from_state_dict(tensors, family="stylegan")
    with pytest.raises(ConfigError, match="does not take"):
        from_state_dict(tensors, colour=3)
    with pytest.raises(ModelError, match="none of the known families"):
        from_state_dict({"weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"no vqgan: its key quantizer\.codebook is missing"):
        from_state_dict({k: v for k, v in tensors.items() if "embedding" not in k}, family="vqgan")
    with pytest.raises(ModelError, match=r"lacks .*attn\.0\.qkv"):
        from_state_dict(tensors, family="var")
    for key, value in (("encoder.conv_in.weight", torch.zeros(())), ("quantize.embedding.weight", torch.zeros(3)),
                       ("encoder.conv_in.weight", torch.zeros(0, 3, 3, 3))):
        with pytest.raises(ModelError, match="no vqgan: its tensors have other shapes"):
            from_state_dict({**tensors, key: value}, "vqgan")
    for settings in ({"channels": "x"}, {"channels": -32}, {"channel_multipliers": []}):
        with pytest.raises(ConfigError, match="does not take these settings"):
            from_state_dict(tensors, "vqgan", **settings)
    with pytest.raises(ModelError, match=r"not finite in quant_conv\.bias"):
        from_state_dict({**tensors, "quant_conv.bias": torch.full((4,), torch.nan)}, "vqgan")
    assert type(from_state_dict(tensors, family="ibq")) is IBQ
    averaged = with_ema(tensors, {})
    with pytest.raises(ModelError, match="without a parameter: decodersurprise"):
        from_state_dict({**averaged, "model_ema.decodersurprise": torch.zeros(1)})


def test_grouping_that_no_key_tells_must_be_given():
    model = random_model(WeTok, groups=3, bits_per_group=4)
    with pytest.raises(ModelError, match="bits_per_group, groups: give them"):
        from_state_dict(weights(model))
    with pytest.raises(ModelError, match="bits_per_group: give"):
        from_state_dict(weights(model), groups=3)
    assert from_state_dict(weights(model), groups=3, bits_per_group=4).layout(4, 4) == model.layout(4, 4)


@FIXTURES
def test_the_true_key_lists_fit():
    """WeTok f16 g4 and VAR's ch160v4096z32, every name and shape as published, on the meta device."""
    lines = (SHARED / "fixtures" / "wetok_keys_f16_g4.txt").read_text().splitlines()
    wetok = {k: torch.empty(json.loads(shape), device="meta") for k, shape in (line.split("\t") for line in lines)}
    assert upstream.recognise(wetok) == "wetok"
    name, ours, config = upstream.MAPS["wetok"](wetok)
    assert (name, config["groups"], config["channel_multipliers"]) == ("WeTok", 4, (1, 1, 2, 2, 4))
    assert_fits(WeTok, ours, config)

    shapes = json.loads((SHARED / "fixtures" / "var_d16_statedict_shapes.json").read_text())["vae_ch160v4096z32"]
    var_shapes = {k: torch.empty(shape, device="meta") for k, (shape, _) in shapes.items()}
    assert upstream.recognise(var_shapes) == "var"
    _, ours, config = upstream.MAPS["var"](var_shapes)
    assert_fits(VARVQVAE, ours, config)
    defaults = VARVQVAE.__init__.__defaults__
    assert defaults is not None and config["channel_multipliers"] == defaults[3]


def assert_fits(cls: type[Any], ours: dict[str, Tensor], config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = cls(**config)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in ours.items()}


@FIXTURES
def test_upstream_weights_load_by_their_own_keys():
    fixture = Fixture("wetok_ae_tiny")
    config = fixture.config
    model = from_state_dict(fixture.weights(), groups=config["groups"], bits_per_group=config["bits_per_group"])
    tokens = model.encode(fixture["input"] * 0.5 + 0.5)
    assert torch.equal(tokens.indices.flatten(), fixture["indices"])


class Callback:
    """Stands for a Lightning callback: an object of a class that the reader does not have."""

    def __init__(self) -> None:
        self.best = {"score": 1.0}


class Bomb:
    """A pickle of this writes a file when it is loaded the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@BY_AVERAGES
@pytest.mark.parametrize("legacy", [False, True])
def test_lightning_objects_are_inert_and_bombs_do_not_go_off(legacy, tmp_path):
    model = random_model(VQGAN, attention_levels=(2,), **VQ)
    crater = tmp_path / "crater"
    content = {"callbacks": {Callback: Callback(), "list": [Callback(), {3}]}, "bomb": Bomb(crater),
               "state_dict": OrderedDict(taming(model)), "lr": torch.float32, "shape": torch.Size([1, 2])}
    path = tmp_path / "lightning.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    read = read_pickle(path)
    assert not crater.exists()
    assert isinstance(read["bomb"], upstream.Inert)
    assert isinstance(read["callbacks"]["list"][0], upstream.Inert)
    assert read["lr"] is torch.float32 and read["shape"] == (1, 2)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.state_dict()["quantizer.codebook"], model.quantizer.codebook)
    assert not crater.exists()


@BY_AVERAGES
def test_parameters_and_safetensors_are_read(tmp_path):
    model = random_model(VQGAN, attention_levels=(2,), **VQ)
    torch.save({f"module._orig_mod.{k}": v for k, v in taming(model).items()}, tmp_path / "compiled.pth")
    torch.save({k: torch.nn.Parameter(v) for k, v in taming(model).items()}, tmp_path / "parameters.pth")
    save_file(taming(model), tmp_path / "model.safetensors")
    for name in ("parameters.pth", "compiled.pth", "model.safetensors"):
        loaded = load_checkpoint(tmp_path / name)
        assert torch.equal(loaded.state_dict()["quantizer.codebook"], model.quantizer.codebook)


def test_files_that_are_no_checkpoints_say_so(tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "short.safetensors").write_bytes(b"\x00" * 4)
    torch.save([1, 2], tmp_path / "list.pt")
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "program.pt"))
    (tmp_path / "folder").mkdir()
    with tarfile.open(tmp_path / "old.tar", "w") as archive:
        archive.add(tmp_path / "text.ckpt", "storages")
    for name, message in (("text.ckpt", "cannot be read"), ("short.safetensors", "cannot be read"),
                          ("list.pt", "no state dict"), ("old.tar", "before 0.1.10"),
                          ("program.pt", "TorchScript"), ("folder", "config.json"),
                          ("missing.pt", "no checkpoint")):
        with pytest.raises(ModelError, match=message):
            load_checkpoint(tmp_path / name)


def test_the_command_makes_a_folder_that_loads(tmp_path, capsys):
    model = random_model(VARVQVAE, codebook_size=16, z_channels=8, sides=(1, 2, 3))
    torch.save(var(model), tmp_path / "vae.pth")
    out = tmp_path / "new" / "var"
    assert vtc_import([str(tmp_path / "vae.pth"), str(out), "--set", "sides=[1,2,3]", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["class"] == "VARVQVAE"
    assert "VARVQVAE" in printed.err
    assert load_tokenizer(out).layout(12, 12) == model.layout(12, 12)
    assert [p.name for p in out.parent.iterdir()] == ["var"]
    assert vtc_import([str(tmp_path / "vae.pth"), str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "bad.pth").write_text("no")
    assert vtc_import([str(tmp_path / "bad.pth"), str(tmp_path / "never")]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()
    with pytest.raises(SystemExit, match="2"):
        vtc_import(["a", "b", "--set", "sides"])
    with pytest.raises(SystemExit, match="2"):
        vtc_import(["a", "b", "--family", "stylegan"])


BLOCKS: dict[str, Any] = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                              block_out_channels=(8, 16), norm_num_groups=4)
HALF: dict[str, Any] = dict(block_types=("ResBlock", "EfficientViTBlock"), block_out_channels=(8, 16),
                            layers_per_block=(1, 1), qkv_multiscales=((), (5,)))
DIFFUSERS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": BLOCKS, "ScaleConsistentVAE": {**BLOCKS, "alignment": "centered"},
    "AutoencoderDC": dict(latent_channels=4, attention_head_dim=4, downsample_block_type="stride_conv",
                          upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
                          **{f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in HALF.items()})}


@pytest.mark.parametrize("kind", DIFFUSERS)
def test_diffusers_autoencoders_come_in_and_go_out(kind, tmp_path, capsys):
    torch.manual_seed(0)
    model = AUTOENCODERS[kind](**DIFFUSERS[kind])
    model.save_pretrained(tmp_path / "theirs" / ("" if kind == "AutoencoderDC" else "vae"))  # one of a pipeline, too
    out = tmp_path / "ours"
    assert vtc_import([str(tmp_path / "theirs"), str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["class"] == "DiffusersAutoencoder"
    assert {f.name for f in out.iterdir()} >= {"config.json", "model.safetensors"}
    images = torch.rand(1, 3, 13, 18)
    adapter = DiffusersAutoencoder(model)
    for loaded in (DiffusersAutoencoder.from_pretrained(out), load_checkpoint(out)):
        assert isinstance(loaded, DiffusersAutoencoder)
        assert type(loaded.model) is AUTOENCODERS[kind] and not loaded.training
        latents = loaded.encode(images)
        assert torch.equal(latents.values, adapter.encode(images).values)
        assert torch.equal(loaded.decode(latents), adapter.decode(latents))
    with pytest.raises(ModelError, match="DiffusersAutoencoder"):
        load_tokenizer(out)  # it gives no tokens


def test_diffusers_vqmodel_comes_in_and_goes_out(tmp_path):
    torch.manual_seed(0)
    model = VQModel(**BLOCKS, latent_channels=4, num_vq_embeddings=16)
    model.save_pretrained(tmp_path / "theirs" / "vqvae")
    assert vtc_import([str(tmp_path / "theirs"), str(tmp_path / "ours"), "-q"]) == 0
    loaded, images = load_tokenizer(tmp_path / "ours"), torch.rand(1, 3, 13, 18)
    assert isinstance(loaded, DiffusersVQ)
    assert torch.equal(loaded.encode(images).indices, DiffusersVQ.from_vqmodel(model).encode(images).indices)
    for more in (["--family", "vqgan"], ["--set", "groups=3"]):
        assert vtc_import([str(tmp_path / "theirs"), str(tmp_path / "never"), "-q", *more]) == 1


def test_an_autoencoder_with_a_stride_is_sc_vae(tmp_path):
    """The authors' class bears the name AutoencoderKL and has one setting more."""
    torch.manual_seed(0)
    model = AUTOENCODERS["AutoencoderKL"](**BLOCKS)
    model.save_pretrained(tmp_path)
    for family, settings in (("sc_vae", {}), (None, {"stride": 2, "alignment": "centered"})):
        loaded = load_checkpoint(tmp_path, family, **settings)
        assert isinstance(loaded, DiffusersAutoencoder)
        assert type(loaded.model) is AUTOENCODERS["ScaleConsistentVAE"]
        assert loaded.model.config.alignment == settings.get("alignment", "upstream")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "stride": 2}))
    loaded = load_checkpoint(tmp_path)
    assert isinstance(loaded, DiffusersAutoencoder)
    assert loaded.downsample == 4 and loaded.model.stride == 2
    with pytest.raises(ConfigError, match="does not take the settings colour"):
        load_checkpoint(tmp_path, colour=3)
    with pytest.raises(ConfigError, match="says itself"):
        load_checkpoint(tmp_path, "vqgan")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ModelError, match="UNet2DModel"):
        load_checkpoint(tmp_path)
