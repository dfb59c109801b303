"""Folders of generators: what is saved is loaded, by name, path or Hub, and nothing that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny_generators import NAMES, TINY_GENERATORS, tiny_llamagen, tiny_var
from vtc import hub
from vtc.errors import ConfigError, FileError, ModelError
from vtc.generators.classes import GENERATOR_CLASSES
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.kv_cache.calibration import Recorder
from vtc.generators.pretrained import GenerationConfig, LoadedGenerator
from vtc.generators.sampling import Guidance, Sampling, seeded
from vtc.generators.var import PUBLISHED_GUIDANCE, PUBLISHED_SAMPLING
from vtc.models import load_generator, load_tokenizer


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation with a tiny random generator; returns the folder of models."""
    monkeypatch.setattr(hub, "BUNDLED", tmp_path / "pretrained")
    tiny_var().save(hub.BUNDLED / "var-d6-128")
    return hub.BUNDLED


@pytest.mark.parametrize("kind", TINY_GENERATORS)
def test_what_is_saved_is_loaded(kind: str, tmp_path: Path) -> None:
    made = TINY_GENERATORS[kind]()
    made.save(tmp_path / "g")
    found = load_generator(tmp_path / "g")
    assert (found.kind, found.config, found.folder) == (kind, made.config, tmp_path / "g")
    assert (found.draft is None) == (made.draft is None)
    for part, saved in ((found.model, made.model), (found.tokenizer, made.tokenizer), (found.draft, made.draft)):
        if part is not None and saved is not None:
            assert not part.training
            assert part.state_dict().keys() == saved.state_dict().keys()
            assert all(torch.equal(v, saved.state_dict()[k]) for k, v in part.state_dict().items())


def test_a_bundled_name_a_path_and_the_hub_in_this_order(bundled: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    tiny_var(1).save(tmp_path / "var-d6-128")  # in the working directory, where the bundled name must not reach
    tiny_llamagen().save(tmp_path / "snapshot")
    assert load_generator().folder == bundled / "var-d6-128"
    assert load_generator("./var-d6-128").folder == Path("var-d6-128")
    assert not asked
    assert load_generator("someone/something").kind == "llamagen"
    ((repository, patterns),) = asked
    assert repository == "someone/something"
    assert "tokenizer/model.safetensors" in patterns and not any("*" in p for p in patterns)
    with pytest.raises(ModelError, match=r"No model 'no/such': not bundled \(var-d6-128\), not a folder, and the"):
        load_generator("no/such", allow_download=False)
    monkeypatch.chdir(tmp_path / "snapshot")
    assert load_generator(".").kind == "llamagen"


def test_the_tokenizer_of_a_bundled_generator_has_a_name(bundled: Path) -> None:
    tokenizer = load_tokenizer("var-d6-128/tokenizer", allow_download=False)
    assert tokenizer.fingerprint() == load_generator().tokenizer.fingerprint()


def test_defaults_are_the_files_else_the_published_ones(tmp_path: Path) -> None:
    made = tiny_var()
    assert (made.sampling, made.guidance) == (Sampling(top_k=8), Guidance(1.5, ramp=True))
    assert json.loads(made.config.to_json()) == {
        "class_names": list(NAMES), "sampling": {"top_k": 8}, "guidance": {"weight": 1.5, "ramp": True}}
    made.save(tmp_path / "g")
    (tmp_path / "g" / "generation_config.json").unlink()
    plain = load_generator(tmp_path / "g")
    assert plain.config == GenerationConfig()
    assert (plain.sampling, plain.guidance) == (PUBLISHED_SAMPLING, PUBLISHED_GUIDANCE)


def test_classes_by_name_and_number() -> None:
    made = tiny_var()
    assert [made.label(c) for c in ("golf ball", "GOLF BALL", "gas pump", "2", 4)] == [2, 2, 4, 2, 4]
    with pytest.raises(ConfigError, match=r"no class 'trout': the classes are tench, parachute, golf ball"):
        made.label("trout")
    with pytest.raises(ConfigError, match="no class 5: they go from 0 to 4"):
        made.label(5)
    with pytest.raises(ConfigError, match="no class 'tench': this model's have no names but the numbers 0 to 4"):
        tiny_llamagen().label("tench")
    with pytest.raises(ConfigError, match="from texts and has no classes"):
        TINY_GENERATORS["infinity"]().label(0)


def test_a_calibration_lies_in_the_folder_of_its_model(tmp_path: Path) -> None:
    made = tiny_var()
    recorder = Recorder()
    made.model.generate(torch.tensor([0]), made.tokenizer, cache=KVCache(made.model.schedule(), recorder),  # type: ignore[call-arg, arg-type]
                        generators=seeded([0]))
    recorder.calibration(made.model).save(tmp_path / "kv.safetensors")
    for seed in (0, 1):
        folder = tmp_path / f"g{seed}"
        tiny_var(seed).save(folder)
        assert load_generator(folder).calibration() is None
        (folder / "kv.safetensors").write_bytes((tmp_path / "kv.safetensors").read_bytes())
    found = load_generator(tmp_path / "g0").calibration()
    assert found is not None and found.samples == 1
    with pytest.raises(ModelError, match="measured on another model"):
        load_generator(tmp_path / "g1").calibration()
    with pytest.raises(FileError, match="no file"):
        load_generator(tmp_path / "g1").calibration(tmp_path / "none")


def test_a_tokenizer_may_be_that_of_a_bundled_model_and_of_no_other(bundled: Path, tmp_path: Path) -> None:
    made = tiny_var()
    config = GenerationConfig(tokenizer="var-d6-128/tokenizer")
    LoadedGenerator(made.model, made.tokenizer, config).save(tmp_path / "g")
    assert not (tmp_path / "g" / "tokenizer").exists()
    assert load_generator(tmp_path / "g").tokenizer.fingerprint() == made.tokenizer.fingerprint()
    (tmp_path / "g" / "generation_config.json").write_text(json.dumps({"tokenizer": str(tmp_path / "pretrained")}))
    with pytest.raises(ModelError, match="which is not bundled"):
        load_generator(tmp_path / "g")


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    var, llama = tiny_var(), tiny_llamagen()
    with pytest.raises(ConfigError, match="and LocalVQ has none"):
        LoadedGenerator(var.model, llama.tokenizer)
    with pytest.raises(ConfigError, match="This generator draws"):
        LoadedGenerator(llama.model, var.tokenizer)
    with pytest.raises(ConfigError, match="2 names do not fit a model of 5 classes"):
        LoadedGenerator(var.model, var.tokenizer, GenerationConfig(("a", "b")))
    with pytest.raises(ConfigError, match="A draft is for raster models"):
        LoadedGenerator(var.model, var.tokenizer, draft=llama.draft)
    with pytest.raises(ConfigError, match="the same name"):
        GenerationConfig(("a", "a"))
    var.save(tmp_path / "g")
    llama.tokenizer.save_pretrained(tmp_path / "g" / "tokenizer")  # type: ignore[operator]
    with pytest.raises(ModelError, match="does not fit together: VAR draws scales"):
        load_generator(tmp_path / "g")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"colour": 3}', '{"sampling": {"top_k": -1}}', '{"guidance": 3}',
                                  '{"class_names": "abc"}', '{"class_names": [1, 2]}', '{"tokenizer": 3}',
                                  '{"size": "9M"}', "\xff"])
def test_a_damaged_configuration_is_one_sentence(text: str, tmp_path: Path) -> None:
    tiny_var().save(tmp_path / "g")
    (tmp_path / "g" / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        load_generator(tmp_path / "g")


def test_a_folder_that_lacks_something_or_is_no_generator(tmp_path: Path) -> None:
    tiny_var().save(tmp_path / "g")
    with pytest.raises(ModelError, match="the generators that vtc knows are VAR, Infinity, LlamaGen"):
        load_generator(tmp_path / "g" / "tokenizer")
    config = tmp_path / "g" / "config.json"
    config.write_text(config.read_text().replace('"depth": 3', '"depth": 2'))
    with pytest.raises(ModelError, match="does not fit VAR"):
        load_generator(tmp_path / "g")
    config.unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_generator(tmp_path / "g")
    tiny_var().save(tmp_path / "h")
    (tmp_path / "h" / "tokenizer" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        load_generator(tmp_path / "h")
    tiny_var().save(tmp_path / "i")
    (tmp_path / "i" / "draft").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_generator(tmp_path / "i")


def test_the_table_of_classes_is_right() -> None:
    from importlib import import_module

    for name, module in GENERATOR_CLASSES.items():
        assert hasattr(getattr(import_module(module), name), "from_pretrained")


@pytest.mark.parametrize("kind", TINY_GENERATORS)
def test_a_generator_of_bfloat16_draws(kind: str) -> None:
    generator = TINY_GENERATORS[kind]().to("cpu", torch.bfloat16)
    assert {p.dtype for p in generator.model.parameters()} == {torch.bfloat16}
    schedule = generator.schedule()
    condition = (torch.randn(1, 6, 16), torch.ones(1, 6, dtype=torch.bool)) if kind == "infinity" else torch.tensor([1])
    _, images = generator.generate(condition, KVCache(schedule), generators=seeded([0]))
    assert images.dtype == torch.float32 and images.isfinite().all()
