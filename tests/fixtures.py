"""Reading the fixtures of upstream code: tensors, weights, and the JSON beside them."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.shared import SHARED


class Fixture:
    """SHARED/fixtures/NAME.safetensors and .json: `fixture["input"]`, `fixture.config`, `fixture.weights()`."""

    def __init__(self, name: str) -> None:
        folder = SHARED / "fixtures"
        self.tensors: dict[str, Tensor] = load_file(folder / f"{name}.safetensors")
        path = folder / f"{name}.json"
        self.facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def config(self) -> dict[str, Any]:
        return self.facts["config"]

    def weights(self, prefix: str = "sd.") -> dict[str, Tensor]:
        """Tensors whose names begin with `prefix`, without it; half precision as float32."""
        return {name.removeprefix(prefix): tensor.float() if tensor.dtype == torch.float16 else tensor
                for name, tensor in self.tensors.items() if name.startswith(prefix)}


def diffusers_case(name: str) -> dict[str, Any]:
    """What scvae/diffusers_vae.json says of one of its models: class, config, ..."""
    cases: dict[str, Any] = json.loads((SHARED / "fixtures" / "scvae" / "diffusers_vae.json").read_text())["cases"]
    return cases[name]
