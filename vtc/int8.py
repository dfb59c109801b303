"""Model files of half the size: weights as int8, with one scale for each output channel.

    quantize_weights(model)                          rounds the weights where they are
    model.save_pretrained(folder)                    config.json says "weights": "int8"
    type(model).from_pretrained(folder)              the same numbers again, in float32

    in the file     conv.weight int8 (O, ...), conv.weight_scale float32 (O,)
    in the model    weight = float16(q s), q = round(w / s) in -127..127, s = max |w| / 127 over the output channel

Every weight that a model computes with is exact in float16, as in any other of our files. So the fingerprint is that of
a float16 copy, the largest weight of a channel stays what it was, and a quantized model that is saved again gives the
same bytes. Biases, norms, codebooks and tables stay as they are: they are small, or searched for nearest neighbours.

`train_quantized` lets a network learn with these roundings, whose gradient is taken to be 1 (Jacob et al., 1712.05877).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError, ModelError

#: what config.json says under "weights"
FORMAT = "int8"
#: of the scales' names
SUFFIX = "_scale"
LARGEST = 127

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, ...) weights to int8 (O, ...) and float32 scales (O,). ModelError for values beyond float16."""
    weight = weight.detach().half().float()  # so that the largest of a channel comes back as it is
    largest = weight.flatten(1).abs().amax(1)
    if not torch.isfinite(largest).all():
        raise ModelError("A weight that is to become int8 is no number of float16.")
    scale = largest / LARGEST
    # a channel of zeros has the scale 0
    q = (weight / _broadcast(torch.where(scale > 0, scale, torch.ones_like(scale)), weight)).round()
    return q.clamp(-LARGEST, LARGEST).to(torch.int8), scale


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """The float16 weights that int8 (O, ...) and scales (O,) stand for."""
    return (q.float() * _broadcast(scale, q)).half()


def rounded(weight: Tensor) -> Tensor:
    """The weights as `quantize` and `dequantize` leave them, in their own type; the gradient passes unchanged."""
    return weight + (dequantize(*quantize(weight)).to(weight.dtype) - weight).detach()


def _broadcast(scale: Tensor, like: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (like.ndim - 1))


def _weights(model: nn.Module, prefixes: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """(name of the weight, its module) of plain convolutions and linear layers below the prefixes."""
    found = False
    for name, module in model.named_modules():
        if type(module) in (nn.Conv2d, nn.Linear) and f"{name}.weight".startswith(prefixes):
            found = True
            yield f"{name}.weight", module
    if not found:
        raise ConfigError(f"{type(model).__name__} has no convolution and no linear layer whose name begins with "
                          f"{' or '.join(prefixes) or 'nothing'}.")


@torch.no_grad()
def quantize_weights(model: nn.Module, prefixes: tuple[str, ...] = ("",)) -> frozenset[str]:
    """Round the weights of convolutions and linear layers in place; `save_pretrained` then stores them as int8.

    Layers of classes of their own stay as they are, since what else they do with a weight is not known here.
    prefixes: of their names, such as "decoder."; by default all. Returns the names. ConfigError where there are none.
    """
    names = []
    for name, module in _weights(model, prefixes):
        weight = cast(Tensor, module.weight)
        weight.copy_(dequantize(*quantize(weight)))
        names.append(name)
    cast(Any, model).int8_weights = frozenset(names)
    return frozenset(names)


class RoundedConv2d(nn.Conv2d):
    """A convolution that computes with rounded weights."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, rounded(self.weight), self.bias)


class RoundedLinear(nn.Linear):
    """A linear layer that computes with rounded weights."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, rounded(self.weight), self.bias)


_ROUNDED: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: RoundedConv2d, nn.Linear: RoundedLinear}


def train_quantized(model: nn.Module, prefixes: tuple[str, ...] = ("",)) -> None:
    """From now on the layers of `quantize_weights` compute with rounded weights, and learn the exact ones behind them.

    The layers change their class and nothing else, so state dicts are as before.
    """
    for _, module in _weights(model, prefixes):
        module.__class__ = _ROUNDED[type(module)]


def trained_quantized(model: AnyModule) -> AnyModule:
    """A copy of a model after `train_quantized` that is an ordinary one, with int8 weights to be saved."""
    model = deepcopy(model)
    plain = {after: before for before, after in _ROUNDED.items()}
    names = []
    for name, module in model.named_modules():
        if type(module) in plain:
            module.__class__ = plain[type(module)]
            names.append(f"{name}.weight")
    quantize_weights(model, tuple(names))
    return model


def unpack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], frozenset[str]]:
    """The tensors of a file with int8 weights as float16, and the names of those that were int8. ModelError."""
    names = frozenset(name for name, tensor in tensors.items() if tensor.dtype == torch.int8)
    if not names:
        raise ModelError("its configuration says that weights are int8, and none is")
    unpacked = {name: tensor for name, tensor in tensors.items()
                if name not in names and name.removesuffix(SUFFIX) not in names}
    for name in names:
        scale, q = tensors.get(name + SUFFIX), tensors[name]
        if scale is None or q.ndim < 2 or scale.shape != q.shape[:1] or scale.dtype != torch.float32:
            raise ModelError(f"the int8 tensor {name} has no float32 scale for each output channel")
        if not (torch.isfinite(scale).all() and (scale >= 0).all() and q.min() >= -LARGEST):
            raise ModelError(f"the int8 tensor {name} or its scale has a value that is not allowed")
        unpacked[name] = dequantize(q, scale)
    return unpacked, names
