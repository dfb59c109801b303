"""The registry of bundled models, and that no file or stream decides what is imported or opened."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from vtc import hub
from vtc.errors import ModelError
from vtc.models import DEFAULT_MODEL, FINGERPRINTS, MODEL_IDS, RETIRED_IDS, TOKENIZER_CLASSES, load_tokenizer, name_of
from vtc.tokenizers.local_vq import LocalVQ


def tiny(seed: int = 0) -> LocalVQ:
    torch.manual_seed(seed)
    return LocalVQ(codebook_size=16, dim=4, encoder_widths=(4, 4, 4), encoder_depths=(1, 1, 1),
                   decoder_widths=(4, 4, 4, 4), decoder_depths=(1, 1, 1, 1), thin=4)


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation whose default model is a tiny random one; returns the folder of models."""
    monkeypatch.setattr(hub, "BUNDLED", tmp_path / "pretrained")
    tiny().save_pretrained(hub.BUNDLED / DEFAULT_MODEL)
    return hub.BUNDLED


def test_the_numbers_in_streams_never_change() -> None:
    assert [MODEL_IDS[f"localvq-f16-8192-r3{member}"] for member in ("", "-s8", "-s512", "-s4096")] == [33, 34, 40, 43]
    assert [name_of(number) for number in (1, 2, 10)] == ["localvq-f16-2560", "localvq-f16-2560-s8",
                                                         "localvq-f16-2560-s2048"]
    assert [name_of(number) for number in (11, 12, 21)] == ["localvq-f16-8192", "localvq-f16-8192-s8",
                                                           "localvq-f16-8192-s4096"]
    assert [name_of(number) for number in (22, 23, 32)] == ["localvq-f16-8192-r2", "localvq-f16-8192-r2-s8",
                                                           "localvq-f16-8192-r2-s4096"]
    assert DEFAULT_MODEL in MODEL_IDS
    numbers = [*MODEL_IDS.values(), *RETIRED_IDS.values()]
    assert sorted(numbers) == list(range(1, 44))
    assert name_of(0) is None and name_of(2**31) is None


def test_the_fingerprints_are_those_of_the_bundled_models() -> None:
    if not (hub.BUNDLED / DEFAULT_MODEL).is_dir():
        pytest.skip(f"{DEFAULT_MODEL} is not in this checkout")
    assert set(FINGERPRINTS) == set(MODEL_IDS)
    assert len(set(FINGERPRINTS.values())) == len(MODEL_IDS)
    for name, fingerprint in FINGERPRINTS.items():
        tokenizer = load_tokenizer(name)
        assert (tokenizer.fingerprint().hex(), tokenizer.model_id) == (fingerprint, MODEL_IDS[name])
        assert name_of(tokenizer.model_id) == name


def test_a_bundled_name_has_its_number_and_a_folder_has_none(bundled: Path) -> None:
    by_name, by_path = load_tokenizer(), load_tokenizer(bundled / DEFAULT_MODEL)
    assert (by_name.model_id, by_path.model_id) == (MODEL_IDS[DEFAULT_MODEL], 0)
    assert LocalVQ.model_id == 0  # the class was not touched
    assert not by_name.training and by_name.fingerprint() == by_path.fingerprint()


def test_a_bundled_name_is_not_looked_for_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "BUNDLED", tmp_path / "nothing")
    monkeypatch.setattr(hub, "hf_hub_download", pytest.fail)
    monkeypatch.chdir(tmp_path)
    tiny().save_pretrained(tmp_path / DEFAULT_MODEL)  # in the working directory, where a bundled name must not reach
    with pytest.raises(ModelError, match="missing from this installation"):
        load_tokenizer(DEFAULT_MODEL)


@pytest.mark.skipif(os.name != "posix", reason="mode bits are POSIX's")
def test_a_saved_model_is_read_by_whom_the_umask_lets_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        tiny().save_pretrained(tmp_path / "model")
    finally:
        assert os.umask(before) == 0o027
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()} == {0o640}


def test_no_download_where_it_is_not_allowed(bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hf_hub_download", pytest.fail)
    with pytest.raises(ModelError, match="No model 'someone/something': the bundled ones are localvq-f16-8192-r3, and"):
        load_tokenizer("someone/something", allow_download=False)


def test_the_hub_is_asked_for_other_names(bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        return str(bundled / DEFAULT_MODEL / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert load_tokenizer("someone/something").model_id == 0
    assert set(asked) == {("someone/something", "config.json"), ("someone/something", "model.safetensors")}


@pytest.mark.parametrize("kind", ["os", "Container", "vtc.tokenizers.local_vq.LocalVQ", None, ["LocalVQ"], 3])
def test_a_file_cannot_make_us_import(kind: object, bundled: Path) -> None:
    path = bundled / DEFAULT_MODEL / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "class": kind}))
    with pytest.raises(ModelError, match="the tokenizers that vtc knows are LocalVQ"):
        load_tokenizer()


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff\xfe"])
def test_a_damaged_configuration_is_one_sentence(text: str, bundled: Path) -> None:
    (bundled / DEFAULT_MODEL / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match="localvq-f16-8192-r3"):
        load_tokenizer()


def test_missing_and_damaged_weights(bundled: Path) -> None:
    weights = bundled / DEFAULT_MODEL / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged"):
        load_tokenizer()
    weights.unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        load_tokenizer()


def test_a_model_that_claims_another_number(bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalVQ, "model_id", 9)
    with pytest.raises(ModelError, match=f"says its number is 9, not {MODEL_IDS[DEFAULT_MODEL]};"):
        load_tokenizer()


def test_the_table_of_classes_is_right() -> None:
    from importlib import import_module

    from vtc.tokenizers.base import Tokenizer

    for name, module in TOKENIZER_CLASSES.items():
        kind = getattr(import_module(module), name)
        assert issubclass(kind, Tokenizer) and hasattr(kind, "from_pretrained")
