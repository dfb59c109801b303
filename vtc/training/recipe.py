"""Hyper-parameters as a dataclass, and as the command line and the configuration file of a script.

    @dataclass
    class MyRecipe(Recipe):
        l1_weight: float = flag(1.0, "of the absolute error")

    parser = argparse.ArgumentParser(...)
    add_recipe_flags(parser, MyRecipe)                     # --l1_weight, --learning_rate, ..., --config
    args = parse_recipe_args(parser, arguments)            # the file's values first, the command line's over them
    recipe = recipe_from(MyRecipe, args)

Nothing here imports torch, so that `--help` and a usage error answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from vtc.errors import ConfigError

AnyRecipe = TypeVar("AnyRecipe", bound="Recipe")


def flag(default: Any, help: str, choices: Sequence[Any] | None = None) -> Any:
    """A field of a recipe, with what `--help` says of it."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Recipe:
    """What every training run can be told; a kind of training adds fields of its own.

    Steps are steps of the optimizer. A step sees train_batch_size x gradient_accumulation_steps x processes samples.
    """

    max_train_steps: int = flag(10_000, "steps of the whole run; the schedule ends there")
    train_batch_size: int = flag(8, "samples of one process at a time")
    gradient_accumulation_steps: int = flag(1, "batches whose gradients make one step")
    learning_rate: float = flag(1e-4, "after the warm-up")
    final_learning_rate: float = flag(0.0, "at the end of the schedule")
    lr_scheduler: str = flag("cosine", "from the first rate to the last", ("cosine", "linear", "constant"))
    lr_warmup_steps: int = flag(0, "steps of linear warm-up")
    optimizer: str = flag("adamw", "of the model; muon: for its convolutions and linear layers, AdamW for the rest",
                          ("adamw", "muon"))
    adam_beta1: float = flag(0.9, "decay of Adam's first moments")
    adam_beta2: float = flag(0.99, "decay of Adam's second moments")
    weight_decay: float = flag(0.0, "of AdamW, on tensors of two and more dimensions")
    max_grad_norm: float = flag(1.0, "gradients of each player are scaled down to this norm; 0: never")
    mixed_precision: str = flag("no", "type of the forward pass; fp16 needs a GPU", ("no", "bf16", "fp16"))
    ema_decay: float = flag(0.999, "of the average of the weights that is validated and saved; 0: no average")
    seed: int = flag(0, "all randomness of a step comes from this, its number and the process")
    dataloader_num_workers: int = flag(1, "processes that read pictures, for each training process")
    checkpointing_steps: int = flag(500, "steps between checkpoints")
    checkpoints_total_limit: int = flag(2, "older checkpoints are deleted; 0: none is")
    validation_steps: int = flag(1000, "steps between validations and sample grids; 0: only at the end")
    logging_steps: int = flag(20, "steps between lines of the log, and looks at whether the loss is a number")
    report_to: str = flag("auto", "tracker beside train.jsonl; auto: TensorBoard where it is installed",
                          ("auto", "none", "tensorboard", "wandb", "all"))
    tracker_project_name: str = flag("vtc", "project of wandb; folder of TensorBoard below OUTPUT_DIR/logs")
    gradient_checkpointing: bool = flag(False, "compute activations again in the backward pass: less memory")
    compile: bool = flag(False, "torch.compile the forward passes; another random state than without")
    shard: bool = flag(False, "share the weights of the model's blocks out over the processes (FSDP 2)")
    reshard_after_forward: bool = flag(True, "with --shard, let whole weights go between the passes: less memory")
    shard_classes: tuple[str, ...] = flag((), "with --shard, classes of the blocks; default: those that the task knows")
    collapse_usage: float = flag(0.01, "a codebook of which a smaller share is used is said to have collapsed")
    stop_on_collapse: bool = flag(False, "stop then, instead of saying so")

    def __post_init__(self) -> None:
        least = {"seed": 0, "max_train_steps": 1, "train_batch_size": 1, "gradient_accumulation_steps": 1,
                 "lr_warmup_steps": 0, "checkpointing_steps": 1, "validation_steps": 0, "logging_steps": 1,
                 "checkpoints_total_limit": 0, "dataloader_num_workers": 0, "learning_rate": 0,
                 "final_learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if not lowest <= value < math.inf:
                raise ConfigError(f"--{name} is at least {lowest}, not {value}.")
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--{name} lies in [0, 1), not {getattr(self, name)}.")
        for field in dataclasses.fields(self):
            choices = field.metadata.get("choices")
            if choices and getattr(self, field.name) not in choices:
                raise ConfigError(f"--{field.name} is one of {', '.join(map(str, choices))}, not "
                                  f"{getattr(self, field.name)!r}.")
        if self.optimizer == "muon" and self.shard:
            raise ConfigError("--optimizer muon and --shard exclude one another: a step needs the whole of a weight.")

    @property
    def total_steps(self) -> int:
        """Of the whole run; a recipe of several phases adds them up."""
        return self.max_train_steps

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then by `lr_scheduler` down to the final rate."""
        return self.scheduled(self.learning_rate, step, self.max_train_steps, self.lr_warmup_steps)

    def scheduled(self, peak: float, step: int, steps: int, warmup: int) -> float:
        """The learning rate of a phase of so many steps."""
        if step < warmup:
            return peak * (step + 1) / warmup
        if self.lr_scheduler == "constant":
            return peak
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        left = 1 - progress if self.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_learning_rate + (peak - self.final_learning_rate) * left


#: flags that change what is seen of a run, and not its result
_SEEN = ("checkpointing_steps", "checkpoints_total_limit", "validation_steps", "logging_steps", "report_to", "compile",
         "gradient_checkpointing", "shard", "reshard_after_forward", "shard_classes", "dataloader_num_workers",
         "collapse_usage", "stop_on_collapse", "tracker_project_name")


def result_settings(recipe: Recipe) -> dict[str, Any]:
    """The fields that a run's result depends on."""
    return {name: value for name, value in dataclasses.asdict(recipe).items() if name not in _SEEN}


def add_recipe_flags(parser: argparse.ArgumentParser, recipe: type[Recipe], output_dir: Sequence[str] = ("output_dir",),
                     **defaults: Any) -> None:
    """A flag for each field, `--config`, `--output_dir` and `--resume_from_checkpoint`; `defaults` of this script.

    output_dir: further names of that flag, where a script has always called it otherwise.
    """
    parser.add_argument("--config", type=Path, help="YAML or JSON file of flags; the command line overrides it")
    names = [f"--{name}" for name in dict.fromkeys(("output_dir", *output_dir))]
    parser.add_argument(*names, type=Path, default=Path("runs"), help="takes checkpoints, logs, the model")
    parser.add_argument("--resume_from_checkpoint", metavar="latest|PATH", help="go on from there, to the bit")
    group, types = parser.add_argument_group("recipe"), get_type_hints(recipe)
    for field in dataclasses.fields(recipe):
        default, kind = defaults.get(field.name, field.default), types[field.name]
        text = f"{field.metadata.get('help', '')} (default: %(default)s)".strip()
        if kind is bool:
            group.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            several = isinstance(default, tuple)
            kind = type(default[0] if several and default else "" if several else default)
            group.add_argument(f"--{field.name}", type=kind, default=default, help=text, nargs="*" if several else None,
                               choices=field.metadata.get("choices"))


def parse_recipe_args(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, with the values of `--config` in the place of the defaults; an unknown name in it is a usage error.

    Required flags may stand in the file as well.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    file = first.parse_known_args(arguments)[0].config
    if file is not None:
        actions = {action.dest: action for action in parser._actions}
        try:
            values = read_config(file)
            for name, value in values.items():
                if name not in actions or name in ("help", "config"):
                    raise ConfigError(f"{file} sets {name!r}, which this script does not have; see --help.")
                values[name] = _of_action(actions[name], value, file)
                actions[name].required = False
        except ConfigError as error:
            parser.error(str(error))
        parser.set_defaults(**values)
    return parser.parse_args(arguments)


def _of_action(action: argparse.Action, value: Any, file: Path) -> Any:
    """A file's value as the flag would have read it."""
    if value is None or isinstance(value, dict):
        return value
    if isinstance(action, argparse.BooleanOptionalAction | argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise ConfigError(f"{file} sets {action.dest} to {value!r}; it is true or false.")
        return value
    kind = action.type if callable(action.type) else str
    try:
        values = [kind(v if isinstance(v, str) else repr(v)) for v in (value if isinstance(value, list) else [value])]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} sets {action.dest} to {value!r}, which does not fit: {error}.") from error
    for v in values:
        if action.choices is not None and v not in action.choices:
            allowed = ", ".join(map(str, action.choices))
            raise ConfigError(f"{file} sets {action.dest} to {v!r}; it is one of {allowed}.")
    return values if action.nargs in ("*", "+") or isinstance(action, argparse._AppendAction) else values[0]


class NameValue(argparse.Action):
    """`--model_args name=value name=value`: a mapping; values are JSON where they can be read as such, else text."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        mapping = dict(getattr(namespace, self.dest) or {})
        for text in values if isinstance(values, list) else [values]:
            name, equals, value = text.partition("=")
            if not equals:
                parser.error(f"{option_string} takes name=value, not {text!r}.")
            try:
                mapping[name] = json.loads(value)
            except json.JSONDecodeError:
                mapping[name] = value
        setattr(namespace, self.dest, mapping)


def read_config(file: str | Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; a run's own `recipe.json` is one. ConfigError."""
    import yaml  # type: ignore[import-untyped]  # accelerate brings it along

    try:
        text = Path(file).read_text()
        values = json.loads(text) if Path(file).suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The configuration {file} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"The configuration {file} is no list of 'name: value'.")
    return values


def recipe_from(recipe: type[AnyRecipe], args: argparse.Namespace) -> AnyRecipe:
    """The recipe that the parsed flags say. ConfigError where a value cannot be."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(args, field.name)
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return recipe(**values)
