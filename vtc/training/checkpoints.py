"""Checkpoints of a run: whole or not there.

    output_dir/checkpoint-500/
        model.safetensors          every player's tensors, those that a finished model does not store included
        discriminator.safetensors
        average.safetensors        the moving average of the first player
        training.pt                optimizers, loss scale, what the task remembers (read with weights_only)
        state.json                 step, data position, recipe, versions; written last

A checkpoint is written under a temporary name and renamed, so a kill, a full disk or a lost power line at any moment
leaves the one before intact.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vtc import __version__
from vtc.errors import ModelError, TrainingError, first_sentence
from vtc.files import save_tensors, write_file
from vtc.training.sharding import cut_like, whole

STATE, TRAINING, AVERAGE = "state.json", "training.pt", "average"
_NAME = re.compile(r"checkpoint-(\d+)")


def versions() -> dict[str, str]:
    """Of what a run's numbers depend on."""
    found = {"vtc": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("accelerate", "numpy", "pillow", "diffusers", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def all_checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints in a folder, in the order in which they were written.

    By the time in them and not by their steps: a new run in an old one's folder begins with small numbers again.
    """
    found = [(_written(path), int(match[1]), path) for path in output_dir.glob("checkpoint-*")
             if (match := _NAME.fullmatch(path.name)) and (path / STATE).is_file()]
    return [path for _, _, path in sorted(found)]


def _written(path: Path) -> float:
    try:
        return float(json.loads((path / STATE).read_text())["time"])
    except (OSError, ValueError, KeyError, TypeError):  # damaged: reading it says so
        return 0.0


def find_checkpoint(output_dir: Path, wanted: str | Path) -> Path | None:
    """The newest for "latest", None where there is none yet; else that folder. TrainingError where it is none."""
    if str(wanted) == "latest":
        found = all_checkpoints(output_dir)
        return found[-1] if found else None
    path = next((p for p in (Path(wanted), output_dir / wanted) if (p / STATE).is_file()), None)
    if path is None:
        there = ", ".join(p.name for p in all_checkpoints(output_dir)) or "none"
        raise TrainingError(f"{wanted} is no checkpoint; {output_dir} has {there}.")
    return path


def all_tensors(module: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """The state dict and the buffers that it leaves out, such as moving averages of a quantizer; on the CPU.

    Of a sharded module, all processes ask together; those that do not `keep` the tensors get none.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in {**dict(module.named_buffers()), **module.state_dict()}.items():
        if isinstance(tensor, Tensor):
            together = whole(tensor.detach(), keep)
            if keep:
                found[name] = together.cpu()
    return found


@torch.no_grad()
def set_tensors(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """The inverse of `all_tensors`, strict. ModelError says what does not fit."""
    stored, parameters = module.state_dict().keys(), dict(module.named_parameters())
    try:
        module.load_state_dict({name: cut_like(tensor, parameters[name]) if name in parameters else tensor
                                for name, tensor in tensors.items() if name in stored})
        # after it: loading a codebook resets the averages that follow it
        for name, buffer in module.named_buffers():
            buffer.copy_(tensors[name])
        extra = tensors.keys() - stored - dict(module.named_buffers()).keys()
        if extra:
            raise KeyError(f"{sorted(extra)[0]} is not a tensor of this model")
    except (RuntimeError, KeyError) as error:
        raise ModelError(f"{what} is of another model: {' '.join(str(error).split())[:300]}") from error


def write_checkpoint(output_dir: Path, step: int, modules: dict[str, dict[str, Tensor]], training: dict[str, Any],
                     state: dict[str, Any], total_limit: int) -> Path:
    """Write `checkpoint-{step}`, then delete the oldest beyond `total_limit` (0: none). TrainingError, nothing half.

    modules: tensors by file name. training: plain values and tensors. state: what JSON holds.
    """
    target, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for stale in output_dir.glob(".checkpoint-*.tmp"):  # of runs that were killed
            shutil.rmtree(stale)
        temporary.mkdir()
        for name, tensors in modules.items():
            save_tensors(_separate(tensors), temporary / f"{name}.safetensors")
        torch.save(training, temporary / TRAINING)
        facts = {"step": step, "time": time.time(), **state, "versions": versions()}
        (temporary / STATE).write_text(json.dumps(facts, indent=1, default=str) + "\n")
        for path in temporary.iterdir():
            _to_disk(path)
        if target.exists():  # of a run that went on from before it
            shutil.rmtree(target)
        os.replace(temporary, target)
        if os.name == "posix":
            _to_disk(output_dir)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingError(not_written(f"The checkpoint of step {step}", output_dir, error)) from error
    for old in all_checkpoints(output_dir)[:-total_limit] if total_limit else []:
        if old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return result


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def not_written(what: str, output_dir: Path, error: BaseException) -> str:
    """One sentence: why `what` could not be written, what is safe, how to go on."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    why = "the disk is full" if full else first_sentence(error)
    last = all_checkpoints(output_dir)
    safe = f"{last[-1].name} is whole" if last else "there is no earlier one"
    return (f"{what} could not be written to {output_dir}: {why}; {safe}. Make room, then go on with "
            "--resume_from_checkpoint latest.")


def forget_after(log: Path, step: int) -> None:
    """Take the lines of later steps out of a log: the run that goes on from `step` writes them anew."""
    if not log.is_file():
        return
    lines = log.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line).get("step", 0) <= step]
    if len(kept) < len(lines):
        write_file(log, b"".join(kept))


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any]]:
    """(tensors by name, training, state) of a checkpoint. TrainingError where a file of it is damaged."""
    try:
        state = json.loads((path / STATE).read_text())
        modules = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        training = torch.load(path / TRAINING, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, EOFError) as error:
        raise TrainingError(f"The checkpoint {path} cannot be read: {first_sentence(error)}; delete it and resume from "
                            "the one before.") from error
    return modules, training, state
