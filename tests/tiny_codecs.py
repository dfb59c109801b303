"""Small deterministic codecs with what needs more than a tokenizer: a prior, a concealer, a hyperprior."""

from __future__ import annotations

import math

import torch

from tests.tiny_tokenizers import TinyGrid, colours
from vtc.codecs.concealer import Concealer
from vtc.codecs.latent_codec import LatentCodec
from vtc.codecs.prior import TokenPrior
from vtc.codecs.token_codec import TokenCodec
from vtc.tokenizers.local_vq import LocalVQ


def small_prior() -> TokenPrior:
    """A prior of the 64 colours whose tensors are made by whole-number formulas, so that its streams can be golden."""
    def numbers(*shape: int, largest: int, factor: int, kind: torch.dtype = torch.int32) -> torch.Tensor:
        count = math.prod(shape)
        return ((torch.arange(count) * factor % (2 * largest + 1)) - largest).reshape(shape).to(kind)

    def layer(outputs: int, inputs: int, kernel: int, shift: int, factor: int) -> dict[str, torch.Tensor]:
        return {"weight": numbers(outputs, inputs, kernel, kernel, largest=20, factor=factor, kind=torch.int8),
                "shift": torch.full((outputs,), shift, dtype=torch.int32),
                "steps": numbers(6, outputs, largest=90, factor=factor),
                "sizes": numbers(1, outputs, largest=9, factor=7)}

    layers = {f"input.{step}": layer(8, 4 * (step + 1), 3, 4, 31 + step) for step in range(3)}
    layers |= {"wide.0": layer(8, 8, 3, 6, 43), "narrow.0": layer(8, 8, 1, 3, 47), "head": layer(4, 8, 1, 5, 53)}
    tensors = {f"{name}.{part}": tensor for name, parts in layers.items() for part, tensor in parts.items()}
    return TokenPrior({
        **tensors, "codes.64": (colours(4) * 64 - 32).to(torch.int8),
        "word_bias.64": numbers(64, largest=700, factor=91),
        "words.64": numbers(64, 4, largest=40, factor=59, kind=torch.int8),
        "powers": torch.tensor([2**20 >> n for n in range(20) for _ in range(64)], dtype=torch.int32)})


def with_prior() -> TokenCodec:
    """The 64 colours with that prior."""
    return TokenCodec(TinyGrid(), small_prior())


def small_local_vq() -> LocalVQ:
    """Random weights; 64 words of 4 dimensions."""
    torch.manual_seed(0)
    return LocalVQ(codebook_size=64, dim=4, encoder_widths=(4, 4, 4), encoder_depths=(1, 1, 1),
                   decoder_widths=(4, 4, 4, 4), decoder_depths=(1, 1, 1, 1), thin=4).eval()


def with_concealer() -> TokenCodec:
    """That model with a concealer of random weights, so that lost tokens become words of their own."""
    model = small_local_vq()
    return TokenCodec(model, concealer=Concealer(dim=4, width=8, depth=2, heads=2, window=4, key=4).eval())


def latent_codec() -> LatentCodec:
    """Six channels at stride 8, two qualities. Raises ModelError where CompressAI is not installed."""
    from vtc.codecs.hyperprior import Hyperprior
    from vtc.tokenizers.patch_vae import PatchVAE

    torch.manual_seed(0)
    hyperprior = Hyperprior(6, 4, 4, 2)
    with torch.no_grad():
        for name, tensor in hyperprior.h_s.named_buffers():
            numbers = torch.arange(tensor.numel()) * 37 % 101 - 50
            tensor.copy_(torch.full(tensor.shape, 6) if "shift" in name else numbers.view(tensor.shape))
        hyperprior.log_gain.copy_(torch.tensor([[1.0], [3.0]]).expand(2, 6))
    codec = LatentCodec(PatchVAE(6, 8, 1), hyperprior).eval()
    codec.update()
    return codec
