"""Checkpoints of generators as their authors published them: recognised by keys, mapped strictly.

    family     recognised by                 from
    var        word_embed, class_emb         VAR (`var_d16.pth` and so on)
    infinity   text_proj_for_sos             Infinity (`infinity_2b_reg.pth` and so on)
    llamagen   layers, cls_embedding         LlamaGen, class-conditional (`c2i_B_256.pt` and so on)

Sizes are facts of the keys and shapes. What they do not tell is an argument of the class and can be given.
Files are read as those of tokenizers are (`vtc.tokenizers.upstream`): nothing in them is executed. Whole checkpoints of
training are read too, and folders of several files with an index, as Infinity-8B comes.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtc.errors import ConfigError, ModelError, first_sentence
from vtc.tokenizers.upstream import read_tensors

StateDict = dict[str, Tensor]
#: of a state dict of upstream names: the state dict under ours, and the constructor's arguments that it tells
Family = Callable[[StateDict], tuple[StateDict, dict[str, Any]]]

#: the class that each family becomes, and where it is
CLASSES = {"var": ("VAR", "vtc.generators.var"), "infinity": ("Infinity", "vtc.generators.infinity"),
           "llamagen": ("LlamaGen", "vtc.generators.llamagen")}
#: under which names the authors' training put the generator; LlamaGen's own sampling takes "model" before "ema"
INSIDE = ("trainer", "var_wo_ddp", "gpt_wo_ddp", "gpt_fsdp", "model", "module", "state_dict", "ema")
#: what upstream keeps beside its weights: constants, which follow from the sizes
CONSTANTS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "Infinity_visible_kvlen", "Infinity_invisible_qlen",
             "freqs_cis")


def _var(tensors: StateDict) -> tuple[StateDict, dict[str, Any]]:
    rules = [(r"^word_embed\.", "word."), (r"^class_emb\.", "class_embedding."), (r"^pos_start$", "start"),
             (r"^pos_1LC$", "position"), (r"^lvl_embed\.", "level."), (r"\.attn\.mat_qkv\.", ".attention.qkv."),
             (r"\.attn\.scale_mul_1H11$", ".attention.log_scale"), (r"\.attn\.", ".attention."),
             (r"\.ffn\.fc1\.", ".mlp.0."), (r"\.ffn\.fc2\.", ".mlp.2."), (r"\.ada_lin\.1\.", ".adaptive."),
             (r"^head_nm\.adaptive\.", "head_adaptive."), (r"^shared_ada_lin\.1\.", "shared_adaptive."),
             (r"\.ada_gss$", ".offsets")]
    ours = renamed(tensors, rules)
    width = ours["position"].shape[2]
    l2 = "blocks.0.attention.log_scale" in ours
    heads = ours["blocks.0.attention.log_scale"].shape[1] if l2 else width // 64
    steps = torch.bincount(tensors["lvl_1L"].flatten()) if "lvl_1L" in tensors else torch.empty(0)
    return ours, {"depth": count(ours, r"blocks\.(\d+)\."), "width": width, "heads": heads,
                  "mlp_ratio": ours["blocks.0.mlp.0.weight"].shape[0] / width,
                  "classes": ours["class_embedding.weight"].shape[0] - 1, "codebook_size": ours["head.weight"].shape[0],
                  "code_dim": ours["word.weight"].shape[1], "sides": [round(n**0.5) for n in steps.tolist()] or None,
                  "shared_modulation": "shared_adaptive.weight" in ours, "l2_attention": l2}


def _infinity(tensors: StateDict) -> tuple[StateDict, dict[str, Any]]:
    chunks = count(tensors, r"block_chunks\.(\d+)\.") or 1  # a single one is not called a chunk
    per_chunk = count(tensors, r"block_chunks\.0\.module\.(\d+)\.") or count(tensors, r"blocks\.(\d+)\.")
    flat = {re.sub(r"^block_chunks\.(\d+)\.module\.(\d+)\.",
                   lambda m: f"blocks.{int(m[1]) * per_chunk + int(m[2])}.", k): v for k, v in tensors.items()}
    rules = [(r"^word_embed\.", "word."), (r"^pos_start$", "start"), (r"^lvl_embed\.", "level."),
             (r"^cfg_uncond$", "no_text"), (r"^text_proj_for_sos\.ca\.mat_q$", "text_pool.query"),
             (r"^text_proj_for_sos\.ca\.", "text_pool."), (r"^text_proj_for_ca\.", "text_mlp."),
             (r"^shared_ada_lin\.1\.", "shared_adaptive."), (r"^head_nm\.ada_lin\.1\.", "head_adaptive."),
             (r"\.ada_gss$", ".offsets"), (r"\.sa\.mat_qkv\.", ".attention.qkv."),
             (r"\.sa\.scale_mul_1H11$", ".attention.log_scale"), (r"\.sa\.", ".attention."),
             (r"\.ca_norm\.", ".cross_norm."), (r"\.ca\.", ".cross_attention."), (r"\.mat_kv\.", ".kv."),
             (r"\.mat_q\.", ".q."), (r"\.ffn\.fc1\.", ".mlp.0."), (r"\.ffn\.fc2\.", ".mlp.2.")]
    ours = renamed(flat, rules)
    width = ours["word.weight"].shape[0]
    return ours, {"depth": chunks * per_chunk, "width": width, "chunks": chunks,
                  "heads": ours["blocks.0.attention.log_scale"].shape[1],
                  "mlp_ratio": ours["blocks.0.mlp.0.weight"].shape[0] / width, "bits": ours["word.weight"].shape[1],
                  "text_width": ours["text_norm.weight"].shape[0], "text_tokens": ours["no_text"].shape[0],
                  "levels": ours["level.weight"].shape[0], "pool_heads": ours["text_pool.query"].shape[1]}


def _llamagen(tensors: StateDict) -> tuple[StateDict, dict[str, Any]]:
    rules = [(r"^cls_embedding\.embedding_table\.", "class_embedding."), (r"^tok_embeddings\.", "word."),
             (r"^output\.", "head."), (r"^layers\.", "blocks."), (r"\.attention\.wqkv\.", ".attention.qkv."),
             (r"\.attention\.wo\.", ".attention.proj."), (r"\.ffn_norm\.", ".mlp_norm."),
             (r"\.feed_forward\.w1\.", ".mlp.gate."), (r"\.feed_forward\.w3\.", ".mlp.up."),
             (r"\.feed_forward\.w2\.", ".mlp.down.")]
    ours = renamed(tensors, rules)
    codebook_size, width = ours["word.weight"].shape
    return ours, {"depth": count(ours, r"blocks\.(\d+)\."), "width": width, "side": None,  # of 384 px 24, of 256 px 16
                  "heads": 32 if width in (3200, 4096) else width // 64,  # GPT-3B and GPT-7B; the others have 64 a head
                  "hidden": ours["blocks.0.mlp.gate.weight"].shape[0],
                  "classes": ours["class_embedding.weight"].shape[0] - 1, "codebook_size": codebook_size}


FAMILIES: dict[str, Family] = {"var": _var, "infinity": _infinity, "llamagen": _llamagen}


def recognise(tensors: Mapping[str, Tensor]) -> str:
    """The family of a state dict by its keys. ModelError where it is none of them."""
    if "word_embed.weight" in tensors and "class_emb.weight" in tensors:
        return "var"
    if "text_proj_for_sos.ca.mat_q" in tensors:
        return "infinity"
    if "cls_embedding.embedding_table.weight" in tensors and "tok_embeddings.weight" in tensors:
        return "llamagen"
    raise ModelError(f"The keys of this checkpoint are those of none of the known generators: {', '.join(FAMILIES)}.")


def from_state_dict(tensors: Mapping[str, Tensor], family: str | None = None, **settings: Any) -> Any:
    """A generator in eval mode, float32, with the weights of a state dict of upstream names.

    settings: arguments of the class that the keys do not tell, or other than they tell.
    ModelError names keys that are missing or left over.
    """
    family = family or recognise(tensors)
    if family not in FAMILIES:
        raise ConfigError(f"The family is one of {', '.join(FAMILIES)}, not {family!r}.")
    try:
        ours, config = FAMILIES[family](dict(tensors))
    except KeyError as error:
        raise ModelError(f"The checkpoint is no {family}: its key {error.args[0]} is missing.") from error
    config |= settings
    name, module = CLASSES[family]
    kind = getattr(import_module(module), name)
    known = inspect.signature(kind).parameters
    if strange := sorted(settings.keys() - known.keys()):
        raise ConfigError(f"{name} has no setting {strange[0]!r}: it has {', '.join(known)}.")
    if unknown := sorted(k for k, v in config.items() if v is None):
        raise ModelError(f"The checkpoint does not tell {name}'s {', '.join(unknown)}: give them as settings.")
    model = kind(**config)
    expected = model.state_dict()
    for what, keys in (("lacks", expected.keys() - ours.keys()), ("has left over", ours.keys() - expected.keys()),
                       ("has in other shapes", {k for k in expected.keys() & ours.keys()
                                                if expected[k].shape != ours[k].shape})):
        if keys:
            some = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise ModelError(f"The checkpoint does not fit {name}: it {what} {some}.")
    model.load_state_dict({k: v.float() for k, v in ours.items()})
    return model.eval()


def load_generator_checkpoint(source: str | Path, family: str | None = None, **settings: Any) -> Any:
    """A generator in eval mode from a file (.pth, .pt, .ckpt, .bin, .safetensors) or a folder of some with an index."""
    path = Path(source)
    if path.is_dir():
        return from_state_dict(_read_shards(path), family, **settings)
    if not path.is_file():
        raise ModelError(f"There is no checkpoint at {path}.")
    return from_state_dict(read_tensors(path, INSIDE), family, **settings)


def _read_shards(folder: Path) -> StateDict:
    """All tensors of a folder of files and the one *.index.json that says which tensor lies in which."""
    indexes = sorted(folder.glob("*.index.json"))
    if len(indexes) != 1:
        raise ModelError(f"{folder} has {len(indexes) or 'no'} files *.index.json; a checkpoint in parts has one.")
    try:
        where = json.loads(indexes[0].read_bytes())["weight_map"]
        files = sorted({str(name) for name in where.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{indexes[0]} cannot be read as an index of files ({first_sentence(error)}).") from error
    tensors: StateDict = {}
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{indexes[0]} names the file {name!r}, which is not in its folder.")
        tensors |= read_tensors(folder / name, ())
    if lost := sorted(where.keys() - tensors.keys()):
        raise ModelError(f"The files of {folder} lack {lost[0]}, which their index names.")
    return tensors


def renamed(tensors: StateDict, rules: Sequence[tuple[str, str]]) -> StateDict:
    """Every key after all the rules, in turn, without `CONSTANTS`; ModelError where two become one."""
    out: StateDict = {}
    for key, tensor in tensors.items():
        if key.endswith(CONSTANTS):
            continue
        new = key
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new in out:
            raise ModelError(f"Two keys of the checkpoint mean {new}.")
        out[new] = tensor
    return out


def count(tensors: StateDict, pattern: str) -> int:
    """One more than the largest number that the pattern finds at the beginning of a key."""
    return 1 + max((int(m[1]) for m in (re.match(pattern, k) for k in tensors) if m), default=-1)
