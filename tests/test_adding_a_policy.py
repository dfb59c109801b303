"""The code of docs/adding-a-kv-policy.md runs, and the policy that it adds passes the matrix."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests import test_kv_cache as matrix
from tests.kv_models import MODELS, POLICIES, SIDES
from tests.shared import ROOT
from vtc.errors import ConfigError
from vtc.generators.kv_cache import specs
from vtc.generators.var import VAR
from vtc.tokenizers.var_vqvae import VARVQVAE

PAGE = (ROOT / "docs" / "adding-a-kv-policy.md").read_text()


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's code makes; its lines in the matrix and among the words go into copies."""
    monkeypatch.setattr(specs, "POLICIES", dict(specs.POLICIES))
    torch.manual_seed(0)
    model = VAR(2, 32, 2, classes=5, codebook_size=16, code_dim=4, sides=SIDES).eval()
    names: dict[str, Any] = {
        "model": model, "tokenizer": VARVQVAE(16, 4, 32, (1, 1), 1, sides=SIDES).eval(), "__name__": "page",
        "labels": torch.tensor([1, 2]), "POLICIES": dict(POLICIES)}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs/adding-a-kv-policy.md", "exec", dont_inherit=True), names)
    return names


def test_the_page_has_six_steps_and_its_policy_generates(added: dict[str, Any]) -> None:
    assert re.findall(r"^## (\d)\.", PAGE, re.MULTILINE) == list("123456")
    cache = added["cache"]
    assert cache.kept(0) == [12, 12]
    assert added["images"].shape == (2, 3, 12, 12)
    newest = set(range(cache.schedule.starts[3], cache.schedule.starts[4]))
    assert set(cache.groups[0][0].tokens[0, 0].tolist()) < newest  # sixteen in the newest stored scale, twelve stay


@pytest.mark.parametrize("model", MODELS)
def test_the_new_policy_passes_the_matrix(model: str, added: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policies = added["POLICIES"]
    assert "longest-keys" in policies
    monkeypatch.setattr(matrix, "POLICIES", policies)
    tiny = {model: MODELS[model]()}
    full = {model: tiny[model].run(matrix.KVCache(tiny[model].schedule))}
    matrix.test_no_head_ever_keeps_more_than_its_budget(model, "longest-keys", False, tiny, full)
    matrix.test_a_budget_of_everything_changes_nothing(model, "longest-keys", tiny, full)
    for storage in (torch.bfloat16, "int8"):
        matrix.test_storage_goes_with_every_policy_and_model(
            model, "longest-keys", storage, tiny, lambda m, p: matrix.ran(tiny[m], p, None), full)


def test_the_new_policy_has_a_word(added: dict[str, Any]) -> None:
    schedule, kind = added["model"].schedule(), added["LongestKeys"]
    assert specs.parse_policy("longest-keys:12t+int8").build(schedule) == (kind(12), "int8")
    assert specs.parse_policy("longest-keys:0.3").build(schedule)[0] == kind.from_ratio(schedule, 0.3) == kind(9)
    assert kind.from_ratio(schedule, 0.3, of="all") == kind(20)
    with pytest.raises(ConfigError, match="too small"):
        kind(0)
