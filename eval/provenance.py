"""Under what circumstances a number was made: it goes into every result, so that unlike is not compared with like."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

#: what changes pixels, bytes or scores
PACKAGES = ("vtc", "torch", "numpy", "pillow", "pillow-jxl-plugin", "torchmetrics", "lpips", "constriction", "scipy")


def provenance() -> dict[str, object]:
    """Versions, processor, threads, and the command: what a result file records besides its own settings.

    Absolute paths on the command line are cut down to their last part: where a user keeps things is nobody's business.
    """
    import torch

    command = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv]
    return {"command": command, "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}", "processor": processor(),
            "processors": os.cpu_count(), "threads": torch.get_num_threads(), "packages": versions()}


def versions() -> dict[str, str]:
    """Of the packages above that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def tensors_sha256(module: nn.Module) -> str:
    """Of all tensors of a network by name, type, shape and bytes: which file they came in does not matter."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sha256(path: str | os.PathLike[str]) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
