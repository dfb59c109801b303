"""Small random generators with tokenizers that fit them, for what is built around them. No weights are learned."""

from __future__ import annotations

from typing import Any

import torch

from vtc.generators.infinity import Infinity
from vtc.generators.llamagen import LlamaGen
from vtc.generators.pretrained import GenerationConfig, LoadedGenerator
from vtc.generators.sampling import Guidance, Sampling
from vtc.generators.var import VAR
from vtc.tokenizers.infinity_vae import InfinityVAE
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.var_vqvae import VARVQVAE

SIDES = (1, 2, 3, 4, 6)
NAMES = ("tench", "parachute", "golf ball", "church", "Gas Pump")


def tiny_var(seed: int = 0) -> LoadedGenerator:
    """Five classes with names, five scales of 66 tokens, 12 x 12 pixels."""
    torch.manual_seed(seed)
    tokenizer = VARVQVAE(16, 8, 32, (1, 1), 1, SIDES, attention=False, mid_attention=False)
    model = VAR(3, 32, 4, classes=5, codebook_size=16, code_dim=8, sides=SIDES)
    return _finished(LoadedGenerator(_louder(model), tokenizer, GenerationConfig(
        NAMES, Sampling(top_k=8), Guidance(1.5, ramp=True))))


def tiny_infinity(seed: int = 0) -> LoadedGenerator:
    """Texts of sixteen dimensions, the seven published scales of its smallest size, 32 x 32 pixels."""
    torch.manual_seed(seed)
    tokenizer = InfinityVAE(4, 32, (1, 1), 1, sides=(1, 2, 4, 6, 8, 12, 16))
    model = Infinity(2, 32, 4, bits=4, text_width=16, text_tokens=6, pool_heads=2, chunks=1)
    return _finished(LoadedGenerator(_louder(model), tokenizer, GenerationConfig(size="0.06M")))


def tiny_llamagen(seed: int = 0) -> LoadedGenerator:
    """Five classes without names, 4 x 4 tokens, 64 x 64 pixels, and a draft of one layer."""
    torch.manual_seed(seed)
    tokenizer = LocalVQ(16, 8, (8, 8, 8), (1, 1, 1), (8, 8, 8, 8), (1, 1, 1, 1), thin=4)
    model, draft = (LlamaGen(depth, 32, 4, 32, classes=5, codebook_size=16, side=4) for depth in (2, 1))
    return _finished(LoadedGenerator(_louder(model), tokenizer, draft=_louder(draft)))


def _louder(model: Any) -> Any:
    """Random weights large enough that attention is far from uniform and classes differ."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "log_scale" not in name:
                p.normal_(0, 1.5 / p.shape[-1] ** 0.5)
    return model


def _finished(generator: LoadedGenerator) -> LoadedGenerator:
    """In eval mode, with the weights that its files hold: those of float16."""
    for part in (generator.model, generator.tokenizer, generator.draft):
        if part is not None:
            part.eval()
            with torch.no_grad():
                for tensor in part.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.copy_(tensor.half())
    return generator


TINY_GENERATORS = {"var": tiny_var, "infinity": tiny_infinity, "llamagen": tiny_llamagen}
