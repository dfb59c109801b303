"""The models against second writings of their formulas, at settings that no fixture has.

Random checkpoints with the authors' names go in at the front door; plain functions of these names say what comes out.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vtc.errors import ConfigError
from vtc.generators.generate import Scale
from vtc.generators.infinity import INFINITY_SCALES, scales_for
from vtc.generators.kv_cache.cache import KVCache
from vtc.generators.sampling import Guidance, Sampling
from vtc.generators.upstream import from_state_dict
from vtc.tokenizers.infinity_vae import InfinityVAE
from vtc.tokenizers.local_vq import LocalVQ
from vtc.tokenizers.var_vqvae import VARVQVAE

GREEDY = Sampling(top_k=1)
Weights = dict[str, Tensor]


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Weights large enough that heads differ and attention is far from uniform."""
    g = torch.Generator().manual_seed(seed)
    out = {name: torch.randn(shape, generator=g) * (0.3 if len(shape) == 1 or "pos" in name or "emb" in name or
                                                    "gss" in name else 1.2 / shape[-1] ** 0.5)
           for name, shape in shapes.items()}
    return {k: v + (math.log(4) if "scale_mul" in k else k.endswith("norm.weight")) for k, v in out.items()}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def soft(logits: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention over what the mask leaves, its heads joined again."""
    return (logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


def normed(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift


def block_causal(sizes: list[int]) -> Tensor:
    step = torch.tensor([i for i, n in enumerate(sizes) for _ in range(n)])
    return step[:, None] >= step[None]


# ---- VAR


def var_shapes(depth: int, width: int, heads: int, sides: tuple[int, ...], shared: bool, l2: bool) -> dict[str, Any]:
    first, total = sides[0] ** 2, sum(s * s for s in sides)
    shapes: dict[str, tuple[int, ...]] = {
        "pos_start": (1, first, width), "pos_1LC": (1, total, width), "word_embed.weight": (width, 6),
        "word_embed.bias": (width,), "class_emb.weight": (8, width), "lvl_embed.weight": (len(sides), width),
        "head_nm.ada_lin.1.weight": (2 * width, width), "head_nm.ada_lin.1.bias": (2 * width,),
        "head.weight": (24, width), "head.bias": (24,)}
    if shared:
        shapes |= {"shared_ada_lin.1.weight": (6 * width, width), "shared_ada_lin.1.bias": (6 * width,)}
    for i in range(depth):
        b = f"blocks.{i}."
        shapes |= {b + "attn.q_bias": (width,), b + "attn.v_bias": (width,), b + "attn.proj.bias": (width,),
                   b + "attn.mat_qkv.weight": (3 * width, width), b + "attn.proj.weight": (width, width),
                   b + "ffn.fc1.weight": (3 * width, width), b + "ffn.fc1.bias": (3 * width,),
                   b + "ffn.fc2.weight": (width, 3 * width), b + "ffn.fc2.bias": (width,)}
        shapes |= {b + "ada_gss": (1, 1, 6, width)} if shared else {
            b + "ada_lin.1.weight": (6 * width, width), b + "ada_lin.1.bias": (6 * width,)}
        shapes |= {b + "attn.scale_mul_1H11": (1, heads, 1, 1)} if l2 else {}
    return shapes


def var_logits(w: Weights, labels: Tensor, codes: Tensor, sides: tuple[int, ...], heads: int) -> Tensor:
    """Section 1 of the spec, all scales at once under a mask."""
    width, sizes = w["pos_1LC"].shape[2], [s * s for s in sides]
    sos = w["class_emb.weight"][labels][:, None].expand(-1, sizes[0], -1) + w["pos_start"]
    level = torch.tensor([i for i, n in enumerate(sizes) for _ in range(n)])
    x = torch.cat([sos, linear(w, "word_embed", codes)], 1) + w["pos_1LC"] + w["lvl_embed.weight"][level]
    c = F.silu(w["class_emb.weight"][labels])
    for i in range(1 + max(int(k.split(".")[1]) for k in w if k.startswith("blocks."))):
        b = f"blocks.{i}."
        if b + "ada_gss" in w:
            ada = linear(w, "shared_ada_lin.1", c).view(-1, 1, 6, width) + w[b + "ada_gss"]
        else:
            ada = linear(w, b + "ada_lin.1", c).view(-1, 1, 6, width)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = ada.unbind(2)
        qkv = normed(x, scale1, shift1) @ w[b + "attn.mat_qkv.weight"].T
        q, k, v = (heads_of(part, heads) for part in (qkv + torch.cat(
            [w[b + "attn.q_bias"], torch.zeros(width), w[b + "attn.v_bias"]])).split(width, 2))
        if b + "attn.scale_mul_1H11" in w:
            factor = w[b + "attn.scale_mul_1H11"].clamp(max=math.log(100)).exp()
            q, k = q / q.norm(dim=-1, keepdim=True) * factor, k / k.norm(dim=-1, keepdim=True)
        else:
            q = q * 0.25 / (width / heads) ** 0.5
        x = x + gamma1 * linear(w, b + "attn.proj", soft(q @ k.transpose(2, 3), v, block_causal(sizes)))
        hidden = F.gelu(linear(w, b + "ffn.fc1", normed(x, scale2, shift2)), approximate="tanh")
        x = x + gamma2 * linear(w, b + "ffn.fc2", hidden)
    scale, shift = linear(w, "head_nm.ada_lin.1", c).view(-1, 1, 2, width).unbind(2)
    return linear(w, "head", normed(x, scale, shift))


@pytest.mark.parametrize(("depth", "heads", "sides", "shared", "l2", "guidance"), [
    (1, 1, (1, 2), False, True, Guidance(1.0)), (3, 3, (1, 3, 5), True, False, Guidance(2.5, ramp=True)),
    (2, 4, (2, 3, 4), False, False, Guidance(0.5)), (3, 2, (1, 2, 3, 5, 7), True, True, Guidance(5.0, ramp=True)),
    (2, 2, (1, 2, 4), False, True, Guidance(weights=(1.0, 3.0, 2.0)))])
def test_var(depth: int, heads: int, sides: tuple[int, ...], shared: bool, l2: bool, guidance: Guidance) -> None:
    width = 12 * heads
    w = random_weights(var_shapes(depth, width, heads, sides, shared, l2))
    # What upstream stores beside: constants, of which one tells the sides.
    steps = torch.tensor([i for i, s in enumerate(sides) for _ in range(s * s)])
    extra = {"lvl_1L": steps[None], "attn_bias_for_masking": torch.zeros(1, 1, len(steps), len(steps)),
             **{f"blocks.{i}.attn.zero_k_bias": torch.zeros(width) for i in range(depth)}}
    settings: dict[str, Any] = {} if l2 else {"heads": heads}
    model = from_state_dict(w | extra, **settings)
    assert (model.sides, model.heads, model.depth, model.classes) == (sides, heads, depth, 7)
    torch.manual_seed(1)
    tokenizer = VARVQVAE(24, 6, 32, (1, 1), 1, sides, attention=False, mid_attention=False).eval()
    labels, heard = torch.tensor([2, 0, 6]), list[Scale]()
    cache = KVCache(model.schedule())
    tokens, _ = model.generate(labels, tokenizer, GREEDY, guidance, cache, callback=heard.append)
    codes = tokenizer.quantizer.teacher_inputs(tokens.indices[..., 0])
    conditional = var_logits(w, labels, codes, sides, heads)
    unconditional = var_logits(w, torch.full_like(labels, 7), codes, sides, heads)
    with torch.no_grad():
        torch.testing.assert_close(model(labels, codes), conditional, rtol=1e-4, atol=1e-4)
    start = 0
    for i, scale in enumerate(heard):
        here = slice(start, start := start + sides[i] ** 2)
        if guidance.weights:
            t = guidance.weights[i] - 1
        else:
            t = (guidance.weight - 1) * (i / (len(sides) - 1) if guidance.ramp else 1)
        expected = (1 + t) * conditional[:, here] - t * unconditional[:, here]
        torch.testing.assert_close(scale.logits, expected, rtol=1e-4, atol=3e-4)
        assert torch.equal(scale.indices, tokens.indices[:, here, 0])
    assert cache.kept(0) == [sum(s * s for s in sides[:-1])] * heads


# ---- Infinity


def infinity_shapes(depth: int, width: int, heads: int, bits: int, chunks: int) -> dict[str, Any]:
    text, ca, hidden = 20, "text_proj_for_sos.ca.", 256
    shapes: dict[str, tuple[int, ...]] = {
        "cfg_uncond": (7, text), "pos_start": (1, 1, width), "text_norm.weight": (text,), ca + "v_bias": (width,),
        ca + "mat_q": (1, 2, width // 2), ca + "mat_kv.weight": (2 * width, text), ca + "proj.weight": (width, width),
        ca + "proj.bias": (width,), "text_proj_for_ca.0.weight": (width, text), "text_proj_for_ca.0.bias": (width,),
        "text_proj_for_ca.2.weight": (width, width), "text_proj_for_ca.2.bias": (width,),
        "lvl_embed.weight": (15, width), "word_embed.weight": (width, bits), "word_embed.bias": (width,),
        "shared_ada_lin.1.weight": (6 * width, width), "shared_ada_lin.1.bias": (6 * width,),
        "head_nm.ada_lin.1.weight": (2 * width, width), "head_nm.ada_lin.1.bias": (2 * width,),
        "head.weight": (2 * bits, width), "head.bias": (2 * bits,)}
    for i in range(depth):
        b = block_name(i, depth, chunks)
        shapes |= {b + "ada_gss": (1, 1, 6, width), b + "sa.scale_mul_1H11": (1, heads, 1, 1),
                   b + "sa.q_bias": (width,), b + "sa.v_bias": (width,), b + "sa.mat_qkv.weight": (3 * width, width),
                   b + "sa.proj.weight": (width, width), b + "sa.proj.bias": (width,), b + "ca_norm.weight": (width,),
                   b + "ca_norm.bias": (width,), b + "ca.v_bias": (width,), b + "ca.mat_q.weight": (width, width),
                   b + "ca.mat_q.bias": (width,), b + "ca.mat_kv.weight": (2 * width, width),
                   b + "ca.proj.weight": (width, width), b + "ca.proj.bias": (width,),
                   b + "ffn.fc1.weight": (hidden, width), b + "ffn.fc1.bias": (hidden,),
                   b + "ffn.fc2.weight": (width, hidden), b + "ffn.fc2.bias": (width,)}
    return shapes


def block_name(i: int, depth: int, chunks: int) -> str:
    """Upstream's: blocks of several chunks are members of these."""
    each = depth // chunks
    return f"blocks.{i}." if chunks == 1 else f"block_chunks.{i // each}.module.{i % each}."


def turned(x: Tensor, scales: Any, frame: tuple[int, int]) -> Tensor:
    """RoPE2d, number by number: half of the pairs by the row, half by the column, of positions in the frame."""
    width, out = x.shape[3], x.clone()
    places = torch.tensor([(round(i * frame[0] / h), round(j * frame[1] / w)) for h, w in scales for i in range(h)
                           for j in range(w)])
    for pair in range(width // 2):
        axis, j = divmod(pair, width // 4)
        angle = places[:, axis] * 10000 ** (-2 * j / (width // 2))
        a, b = x[..., 2 * pair], x[..., 2 * pair + 1]
        out[..., 2 * pair] = a * angle.cos() - b * angle.sin()
        out[..., 2 * pair + 1] = a * angle.sin() + b * angle.cos()
    return out


def infinity_outputs(w: Weights, text: list[Tensor], codes: Tensor, scales: Any, frame: tuple[int, int], heads: int,
                     chunks: int, depth: int, every_chunk: bool, mix: Any = None) -> Tensor:
    """Section 2 of the spec, all scales at once; text: (T, C) of each row. mix: of a block's output and its number."""
    width, sizes = w["pos_start"].shape[2], [h * w_ for h, w_ in scales]
    normal = [t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["text_norm.weight"] for t in text]
    pooled, ca = [], "text_proj_for_sos.ca."
    for t in normal:
        k, v = ((t @ w[ca + "mat_kv.weight"].T) + torch.cat([torch.zeros(width), w[ca + "v_bias"]])).split(width, 1)
        k, v = (p.unflatten(1, (2, -1)).transpose(0, 1) for p in (k, v))  # two heads
        a = (w[ca + "mat_q"][0][:, None] @ k.transpose(1, 2) / (width // 2) ** 0.5).softmax(-1)
        pooled.append(linear(w, ca + "proj", (a @ v).flatten()))
    c = torch.stack(pooled)
    read = [linear(w, "text_proj_for_ca.2", F.gelu(linear(w, "text_proj_for_ca.0", t), approximate="tanh"))
            for t in normal]
    x = torch.cat([c[:, None] + w["pos_start"], linear(w, "word_embed", codes)], 1)
    level = w["lvl_embed.weight"][torch.tensor([i for i, n in enumerate(sizes) for _ in range(n)])]
    for i in range(depth):
        b = block_name(i, depth, chunks)
        if i == 0 or (every_chunk and i % (depth // chunks) == 0):
            x = x + level
        ada = linear(w, "shared_ada_lin.1", F.silu(c)).view(-1, 1, 6, width) + w[b + "ada_gss"]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = ada.unbind(2)
        qkv = normed(x, scale1, shift1) @ w[b + "sa.mat_qkv.weight"].T
        q, k, v = (heads_of(p, heads) for p in (qkv + torch.cat(
            [w[b + "sa.q_bias"], torch.zeros(width), w[b + "sa.v_bias"]])).split(width, 2))
        q = q / q.norm(dim=-1, keepdim=True) * w[b + "sa.scale_mul_1H11"].clamp(max=math.log(100)).exp()
        q, k = turned(q, scales, frame), turned(k / k.norm(dim=-1, keepdim=True), scales, frame)
        x = x + gamma1 * linear(w, b + "sa.proj", soft(q @ k.transpose(2, 3), v, block_causal(sizes)))
        asking = linear(w, b + "ca.mat_q", normed(x, torch.zeros(()), torch.zeros(())) * w[b + "ca_norm.weight"]
                        + w[b + "ca_norm.bias"])
        answers = []
        for row, t in zip(asking, read, strict=True):
            bias = torch.cat([torch.zeros(width), w[b + "ca.v_bias"]])
            k, v = (t @ w[b + "ca.mat_kv.weight"].T + bias).split(width, 1)
            q, k, v = (heads_of(p[None], heads) for p in (row, k, v))
            answers.append(soft(q @ k.transpose(2, 3) / (width // heads) ** 0.5, v, torch.tensor(True))[0])
        x = x + linear(w, b + "ca.proj", torch.stack(answers))
        hidden = F.gelu(linear(w, b + "ffn.fc1", normed(x, scale2, shift2)), approximate="tanh")
        x = x + gamma2 * linear(w, b + "ffn.fc2", hidden)
        if mix is not None:
            x = mix(x, i)
    scale, shift = linear(w, "head_nm.ada_lin.1", F.silu(c)).view(-1, 1, 2, width).unbind(2)
    return linear(w, "head", normed(x, scale, shift))


@pytest.mark.parametrize(("depth", "heads", "chunks", "every", "scales", "guidance"), [
    (2, 2, 1, False, scales_for(1.0, "0.06M")[:5], Guidance(1.0)),
    (4, 2, 2, True, scales_for(1.5, "0.06M"), Guidance(3.0)),
    (2, 1, 2, False, scales_for(0.5, "0.06M"), Guidance(weights=(1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0))),
    (3, 2, 3, True, ((1, 1), (2, 3), (5, 2)), Guidance(2.0, layer=-1)),
    (4, 2, 2, False, ((1, 1), (3, 2), (4, 6)), Guidance(4.0, layer=-3))])
def test_infinity(depth: int, heads: int, chunks: int, every: bool, scales: Any, guidance: Guidance) -> None:
    width, bits = 16 * heads, 4
    w = random_weights(infinity_shapes(depth, width, heads, bits, chunks))
    zeros = {k[: -len("v_bias")] + "zero_k_bias": v for k, v in w.items() if k.endswith("v_bias")}
    model = from_state_dict(w | zeros, level_every_chunk=every)
    assert (model.depth, model.heads, model.bits) == (depth, heads, bits)
    torch.manual_seed(1)
    tokenizer = InfinityVAE(bits, 32, (1, 1), 1, sides=(1, 2)).eval()
    text = [torch.randn(5, 20), torch.randn(3, 20)]
    padded = torch.zeros(2, 5, 20)
    for row, t in zip(padded, text, strict=True):
        row[: len(t)] = t
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    heard = list[Scale]()
    tokens, _ = model.generate(padded, mask, tokenizer, scales, GREEDY, guidance, callback=heard.append)
    codes = tokenizer.quantizer.teacher_inputs(tokens.indices, scales)
    whole = [grids for grids in INFINITY_SCALES.values() if grids[: len(scales)] == tuple(scales)]
    frame = whole[0][-1] if whole and len(scales) == 7 else scales[-1]
    weights = guidance.weights or (guidance.weight,) * len(scales)
    weight = torch.tensor([weights[i] for i, (h, w_) in enumerate(scales) for _ in range(h * w_)])[:, None]

    def guided(x: Tensor) -> Tensor:
        conditional, unconditional = x.chunk(2)
        return weight * conditional + (1 - weight) * unconditional

    def mixed(x: Tensor, layer: int) -> Tensor:
        return guided(x).repeat(2, 1, 1) if guidance.layer == layer - depth else x

    both = [*text, *(w["cfg_uncond"][: len(t)] for t in text)]
    out = infinity_outputs(w, both, codes.repeat(2, 1, 1), scales, frame, heads, chunks, depth, every, mixed)
    expected = out[:2] if guidance.layer else guided(out)
    torch.testing.assert_close(torch.cat([s.logits for s in heard], 1).flatten(2), expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        forced = model(padded, mask, codes, scales).flatten(2)
    alone = infinity_outputs(w, text, codes, scales, frame, heads, chunks, depth, every)
    torch.testing.assert_close(forced, alone, rtol=1e-3, atol=1e-3)


def test_guidance_at_a_block_is_infinitys_alone() -> None:
    w = random_weights(var_shapes(1, 12, 1, (1, 2), False, True)) | {"lvl_1L": torch.tensor([[0, 1, 1, 1, 1]])}
    model = from_state_dict(w)
    tokenizer = VARVQVAE(24, 6, 32, (1, 1), 1, (1, 2), attention=False, mid_attention=False)
    with pytest.raises(ConfigError, match="Infinity's"):
        model.generate(torch.tensor([1]), tokenizer, guidance=Guidance(2.0, layer=-1))
    with pytest.raises(ConfigError, match="3 weights of guidance do not fit 2 steps"):
        model.generate(torch.tensor([1]), tokenizer, guidance=Guidance(weights=(1, 2, 3)))
    infinity = from_state_dict(random_weights(infinity_shapes(2, 16, 1, 4, 2)))
    text, mask = torch.randn(1, 2, 20), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ConfigError, match="block 3 from the end"):
        infinity.generate(text, mask, InfinityVAE(4, 32, (1, 1), 1, sides=(1, 2)), ((1, 1), (2, 2)),
                          guidance=Guidance(2.0, layer=-3))


# ---- LlamaGen


def llama_shapes(depth: int, width: int, hidden: int) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_embedding.embedding_table.weight": (6, width), "tok_embeddings.weight": (20, width),
        "norm.weight": (width,), "output.weight": (20, width)}
    for i in range(depth):
        b = f"layers.{i}."
        shapes |= {b + "attention.wqkv.weight": (3 * width, width), b + "attention.wo.weight": (width, width),
                   b + "feed_forward.w1.weight": (hidden, width), b + "feed_forward.w3.weight": (hidden, width),
                   b + "feed_forward.w2.weight": (width, hidden), b + "attention_norm.weight": (width,),
                   b + "ffn_norm.weight": (width,)}
    return shapes


def llama_logits(w: Weights, labels: Tensor, words: Tensor, side: int, heads: int, base: float) -> Tensor:
    """The spec's LlamaGen, causal and all at once; the class token's rotation is by zeros."""
    x = torch.cat([w["cls_embedding.embedding_table.weight"][labels][:, None], w["tok_embeddings.weight"][words]], 1)
    count, half = x.shape[1], x.shape[2] // heads // 2
    speed = base ** (-torch.arange(0, half, 2) / half)
    turns = torch.zeros(count, half, dtype=torch.complex64)
    for n in range(1, count):
        row, column = divmod(n - 1, side)
        turns[n] = torch.polar(torch.ones(half), torch.cat([row * speed, column * speed]))

    def root(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"]

    def rotated(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(3, (-1, 2)).contiguous()) * turns).flatten(3)

    for i in range(1 + max(int(k.split(".")[1]) for k in w if k.startswith("layers."))):
        b = f"layers.{i}."
        q, k, v = (heads_of(p, heads) for p in
                   linear(w, b + "attention.wqkv", root(x, b + "attention_norm")).split(x.shape[2], 2))
        logits = rotated(q) @ rotated(k).transpose(2, 3) / (2 * half) ** 0.5
        x = x + linear(w, b + "attention.wo", soft(logits, v, torch.ones(count, count).tril().bool()))
        h = root(x, b + "ffn_norm")
        x = x + linear(w, b + "feed_forward.w2",
                       F.silu(linear(w, b + "feed_forward.w1", h)) * linear(w, b + "feed_forward.w3", h))
    return linear(w, "output", root(x, "norm"))


@pytest.mark.parametrize(("depth", "heads", "hidden", "side", "base", "weight"), [
    (1, 1, 12, 2, 10000.0, 1.0), (3, 2, 40, 5, 10000.0, 4.0), (2, 4, 32, 3, 100.0, 0.0)])
def test_llamagen(depth: int, heads: int, hidden: int, side: int, base: float, weight: float) -> None:
    w = random_weights(llama_shapes(depth, 8 * heads, hidden))
    model = from_state_dict(w | {"freqs_cis": torch.zeros(3)}, heads=heads, side=side, rope_base=base)
    torch.manual_seed(0)
    tokenizer = LocalVQ(20, 8, (8, 8, 8), (1, 1, 1), (8, 8, 8, 8), (1, 1, 1, 1), thin=4).eval()
    labels = torch.tensor([4, 0, 2])
    tokens, _ = model.generate(labels, tokenizer, GREEDY, Guidance(weight))
    words = tokens.indices[..., 0]
    conditional = llama_logits(w, labels, words[:, :-1], side, heads, base)
    unconditional = llama_logits(w, torch.full_like(labels, 5), words[:, :-1], side, heads, base)
    with torch.no_grad():
        torch.testing.assert_close(model(labels, words[:, :-1]), conditional, rtol=1e-4, atol=1e-4)
    assert torch.equal((unconditional + weight * (conditional - unconditional)).argmax(-1), words)
