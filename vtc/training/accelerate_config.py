"""What a file of `accelerate config` asks for, and what of it this loop does: plain processes, or FSDP 2 as `--shard`.

`accelerate launch --config_file fsdp.yaml` starts the processes and hands the file's settings to them in environment
variables. The loop averages gradients by itself and never wraps a model, so nothing of Accelerate's own plugins would
act; here their settings become those of the recipe, and what has no counterpart is refused by its name. The files that
are known to work are scripts/configs/ddp.yaml and fsdp.yaml.

    fsdp_version                        2, and no other
    fsdp_reshard_after_forward          --reshard_after_forward
    fsdp_activation_checkpointing       --gradient_checkpointing
    fsdp_transformer_layer_cls_to_wrap  --shard_classes; by default a task knows its blocks
    fsdp_auto_wrap_policy               TRANSFORMER_BASED_WRAP, which is what happens without it as well
    fsdp_state_dict_type                either: checkpoints hold whole tensors, written by the main process
    fsdp_cpu_ram_efficient_loading      either: each process reads the model, the first one's weights count
    fsdp_offload_params, fsdp_forward_prefetch, fsdp_activation_checkpointing_offload, fsdp_ignored_modules,
    parallelism_config, DeepSpeed, Megatron-LM                                                 refused
    mixed_precision, gradient_accumulation_steps, dynamo_config    the script's own flags count; a difference is told
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from vtc.errors import ConfigError
from vtc.training.recipe import Recipe

#: variables that switch on what does another loop's work, and what they are called in the questionnaire
_OTHER_LOOPS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
                "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config"}
#: settings of FSDP that must not be on
_NOT_DONE = ("FSDP_OFFLOAD_PARAMS", "FSDP_FORWARD_PREFETCH", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD")
_HINT = "scripts/configs/ddp.yaml and fsdp.yaml are configurations that work"


def follow_accelerate_config(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Take over into the recipe what `accelerate launch` was configured to; sentences on what counts differently.

    ConfigError names a setting that this loop does not have.
    """
    for variable, name in _OTHER_LOOPS.items():
        if _is_on(environment.get(variable)):
            raise ConfigError(f"{name} is not for this loop, which shares batches out by plain multi-GPU and weights "
                              f"by FSDP 2: choose one of these in accelerate config; {_HINT}.")
    if _is_on(environment.get("ACCELERATE_USE_FSDP")):
        _follow_fsdp(recipe, environment)
        recipe.__post_init__()  # what excludes sharding says so
    return _differences(recipe, environment)


def _follow_fsdp(recipe: Recipe, environment: Mapping[str, str]) -> None:
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(f"This loop knows FSDP 2 only: set fsdp_version: 2 in fsdp_config, not {version}; {_HINT}.")
    for variable in _NOT_DONE:
        if _is_on(environment.get(variable)):
            raise ConfigError(f"{variable.lower()} is not for this loop: set it to false in fsdp_config; {_HINT}.")
    if environment.get("FSDP_IGNORED_MODULES", "None") not in ("", "None"):
        raise ConfigError(f"fsdp_ignored_modules is not for this loop: leave it out of fsdp_config; {_HINT}.")
    policy = environment.get("FSDP_AUTO_WRAP_POLICY", "None").upper()
    if policy not in ("", "NONE", "TRANSFORMER_BASED_WRAP"):
        raise ConfigError(f"fsdp_auto_wrap_policy is TRANSFORMER_BASED_WRAP here, not {policy}: models are shared out "
                          f"by their blocks; {_HINT}.")
    resharding = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true")
    if resharding.lower() not in ("true", "false"):
        raise ConfigError(f"fsdp_reshard_after_forward is true or false in FSDP 2, not {resharding}.")
    recipe.shard = True
    recipe.reshard_after_forward = _is_on(resharding)
    recipe.gradient_checkpointing |= _is_on(environment.get("FSDP_ACTIVATION_CHECKPOINTING"))
    names = environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    if names not in ("", "None"):
        recipe.shard_classes = tuple(name.strip() for name in names.split(",") if name.strip())


def _differences(recipe: Recipe, environment: Mapping[str, str]) -> list[str]:
    """What the configuration says and the flags of the script say otherwise."""
    found = []
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", recipe.mixed_precision):
        found.append(f"accelerate's configuration says mixed_precision {precision}; --mixed_precision "
                     f"{recipe.mixed_precision} counts.")
    parts = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if parts not in ("1", "auto", str(recipe.gradient_accumulation_steps)):
        found.append(f"accelerate's configuration says gradient_accumulation_steps {parts}; "
                     f"--gradient_accumulation_steps {recipe.gradient_accumulation_steps} counts.")
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no" and not recipe.compile:
        found.append(f"accelerate's configuration says dynamo_backend {backend}; without --compile nothing is "
                     "compiled.")
    return found


def _is_on(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "yes", "on", "y", "t")
