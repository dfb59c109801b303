"""Linear layers made ready for generation: laid out once for the processor's matrix product, or cast once to bfloat16.

    model = prepare(VAR.from_pretrained("folder"))                     # on a CPU: float32, some 1.3 times as fast
    model = prepare(VAR.from_pretrained("folder"), torch.bfloat16)     # where the CPU or GPU computes in bfloat16

A prepared model computes the same function, up to rounding, and gives the same `state_dict` (in bfloat16: rounded); it
cannot be trained.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)

#: parts of a transformer that compute in the lower precision; modulations, words and the head stay as they are
CAST = ("attention", "cross_attention", "mlp")
#: rows for which a layout is chosen; the one for many rows serves few as well
ROWS = 512


class PreparedLinear(nn.Module):
    """`nn.Linear` for inference: its weight lies as oneDNN's product wants it, and inputs are cast to its type.

    Without the layout each product of a few rows spends more time on arranging the weight than on computing.
    """

    def __init__(self, layer: nn.Linear | PreparedLinear, dtype: torch.dtype, gelu: bool = False) -> None:
        super().__init__()
        weight = layer.weight.detach().to(dtype)
        self.out_features, self.in_features = weight.shape
        self.dtype, self.gelu = dtype, gelu
        self.packed = can_pack(weight)
        # Not a buffer: its memory has no strides, and what handles state dicts would stumble over it.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS) if self.packed else weight
        self.bias: Tensor | None
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().to(dtype))

    @property
    def weight(self) -> Tensor:
        """(out, in), as in `nn.Linear`; a copy where the layout is another."""
        return self._weight.to_dense() if self.packed else self._weight

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) of any float type to (..., out) of the weight's. bias: instead of the layer's own."""
        bias = self.bias if bias is None else bias.to(self.dtype)
        x = x.to(self.dtype)
        if self.packed:
            activation = ("gelu", "tanh") if self.gelu else ("none", "")
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, activation[0], [], activation[1])
        out = F.linear(x, self._weight, bias)
        return F.gelu(out, approximate="tanh") if self.gelu else out

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`to(device)` and the like: a layout does not move, so it is undone first."""
        moved = fn(self.weight)
        self.packed, self._weight, self.dtype = False, moved, moved.dtype
        return super()._apply(fn, recurse)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN is here and computes with such weights on their device."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and
                                             torch.ops.mkldnn._is_mkldnn_bf16_supported())


def bfloat16_is_fast(device: torch.device | str = "cpu") -> bool:
    """Whether the device has instructions for bfloat16 products: AVX512-BF16 or AMX, or a GPU since Ampere."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@torch.no_grad()
def prepare(model: Model, dtype: torch.dtype | None = None) -> Model:
    """The model itself, in eval mode, its linear layers replaced by `PreparedLinear`; it may be prepared again.

    dtype: torch.bfloat16 casts the weights of attention and feed-forward, whose products then run and whose keys are
        then stored in it, while sums over layers, modulations and logits stay float32; None keeps the type.
    Call it when the model lies on its device, and load calibrations before casting: a cast model has another
    fingerprint.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ConfigError(f"Models are prepared in float32 or bfloat16, not {dtype}.")
    _replace(model, dtype, False)
    return model.eval().requires_grad_(False)


def _replace(module: nn.Module, dtype: torch.dtype | None, cast_here: bool) -> None:
    for name, child in list(module.named_children()):
        casting = cast_here or name in CAST
        wanted = dtype if casting and dtype is not None else None
        if isinstance(child, PreparedLinear):
            if wanted is not None and wanted != child.dtype:
                setattr(module, name, PreparedLinear(child, wanted, child.gelu))
        elif isinstance(child, nn.Linear):
            activated = isinstance(module, nn.Sequential) and name.isdigit() and _is_gelu(module, int(name) + 1)
            setattr(module, name, PreparedLinear(child, wanted or child.weight.dtype, activated))
            if activated:
                cast(nn.Sequential, module)[int(name) + 1] = nn.Identity()
        else:
            _replace(child, dtype, casting)


def _is_gelu(layers: nn.Sequential, index: int) -> bool:
    if index >= len(layers):
        return False
    layer = layers[index]
    return isinstance(layer, nn.GELU) and layer.approximate == "tanh"
