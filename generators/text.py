"""Texts to what text-conditional generators read: the last layer of a T5 encoder. Needs the extra `text`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vtc.errors import ConfigError, FileError, ModelError, first_sentence
from vtc.torchvision_guard import ensure_torchvision_imports


@torch.no_grad()
def encode_texts(texts: Sequence[str], encoder: str, width: int, tokens: int = 512,
                 device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Features (B, T, width) float32, T that of the longest text, and where they are text, (B, T) bool.

    encoder: a T5 encoder's folder, or its name on the Hub. Texts are cut after `tokens` tokens, as Infinity's were.
    Raises ConfigError without transformers, or for an encoder of another width, ModelError where it cannot be loaded.
    """
    if not texts or not all(text.strip() for text in texts):
        raise ConfigError("A prompt is a text of at least one word.")
    ensure_torchvision_imports()  # transformers imports torchvision where it is installed
    try:
        from transformers import AutoTokenizer, T5EncoderModel
    except ImportError as error:
        raise ConfigError("Prompts need transformers, the extra `text`: pip install 'vtc[text]'; or give features that "
                          "were made elsewhere by --features.") from error
    try:
        words: Any = AutoTokenizer.from_pretrained(encoder)
        model: Any = T5EncoderModel.from_pretrained(encoder, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"The text encoder {encoder!r} cannot be loaded: {first_sentence(error)}.") from error
    if model.config.d_model != width:
        raise ConfigError(f"The text encoder {encoder!r} gives {model.config.d_model} numbers a token, and the model "
                          f"reads {width}.")
    read = words(list(texts), padding=True, truncation=True, max_length=tokens, return_tensors="pt")
    model = model.to(device).eval()
    mask = read["attention_mask"].to(device)
    features = model(input_ids=read["input_ids"].to(device), attention_mask=mask)["last_hidden_state"]
    return features.float(), mask.bool()


def load_features(path: str | Path, width: int) -> tuple[Tensor, Tensor]:
    """Features (B, T, width) and mask (B, T) of a safetensors file: `features`, (T, width) or (B, T, width), and
    `mask`, where some of it is padding.

    FileError: no such file. ModelError: it is no safetensors file. ConfigError: other tensors, or other shapes.
    """
    if not Path(path).is_file():
        raise FileError(f"There is no file {path}.")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {first_sentence(error)}.") from error
    if "features" not in tensors or set(tensors) - {"features", "mask"}:
        raise ConfigError(f"{path} has the tensors {', '.join(sorted(tensors)) or 'none'}; it takes `features`, and "
                          "perhaps `mask`.")
    features = tensors["features"].float()
    features = features[None] if features.ndim == 2 else features
    mask = tensors.get("mask", torch.ones(features.shape[:2], dtype=torch.bool)).bool()
    mask = mask[None] if mask.ndim == 1 else mask
    if features.ndim != 3 or features.shape[2] != width or mask.shape != features.shape[:2] or not mask.any(1).all():
        raise ConfigError(f"{path} has features of shape {tuple(features.shape)} and a mask of {tuple(mask.shape)}; "
                          f"the model reads (B, T, {width}) and (B, T), at least one token each.")
    return features, mask
