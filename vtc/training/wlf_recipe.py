"""Hyper-parameters of wavelet-weighted flow matching; the flags of `scripts/finetune_wlf.py`."""

from __future__ import annotations

from dataclasses import dataclass

from vtc.errors import ConfigError
from vtc.training.recipe import Recipe, flag


@dataclass
class WLFRecipe(Recipe):
    """The defaults of loss and times are those of the published script for Flux."""

    resolution: int = flag(1024, "side of the square crops")
    min_scale: float = flag(0.6, "photographs are shrunk by a factor from this to 1 before they are cut")
    wavelet: str = flag("haar", "of PyWavelets")
    wavelet_levels: int = flag(1, "how often the low-pass band is split again")
    band_weights: tuple[float, ...] = flag((1.0, 1.0, 1.0, 1.0), "of A, H, V and D; equal ones are the plain squared "
                                                                 "error, larger ones of H, V and D stress details")
    timestep_sampling: str = flag("uniform", "how random times are spread", ("uniform", "logit_normal", "mode"))
    logit_mean: float = flag(0.0, "of logit_normal")
    logit_deviation: float = flag(1.0, "of logit_normal")
    sigma_shift: float = flag(1.0, "towards noise, for large pictures; 3 for SD3")
    loss_weighting: str = flag("none", "weight of a time, as in SD3's training", ("none", "sigma_sqrt", "cosmap"))
    guidance: float = flag(3.5, "that a distilled Flux is told")
    sample_steps: int = flag(20, "of Euler's method, for the sample grid; 0: no grid")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.logit_deviation > 0 or not self.sigma_shift > 0:
            raise ConfigError("--logit_deviation and --sigma_shift are above 0.")
        if self.sample_steps < 0 or self.resolution < 1 or not 0 < self.min_scale <= 1:
            raise ConfigError("--sample_steps is at least 0, --resolution at least 1, and --min_scale lies in (0, 1].")
