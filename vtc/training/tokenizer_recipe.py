"""Hyper-parameters of a tokenizer's training; the flags of `scripts/train_tokenizer.py`."""

from __future__ import annotations

from dataclasses import dataclass

from vtc.errors import ConfigError
from vtc.training.recipe import Recipe, flag


@dataclass
class TokenizerRecipe(Recipe):
    """Hyper-parameters of one run; the defaults are those of the first LocalVQ that was bundled."""

    resolution: int = flag(224, "side of the square crops")
    min_scale: float = flag(0.6, "photographs are shrunk by a factor from this to 1 before they are cut")
    train_batch_size: int = flag(6, "crops of one process at a time")
    max_train_steps: int = flag(8500, "steps of the whole run; the schedule ends there")
    learning_rate: float = flag(8e-4, "after the warm-up")
    final_learning_rate: float = flag(1e-5, "at the end of the schedule")
    lr_warmup_steps: int = flag(200, "steps of linear warm-up")
    weight_decay: float = flag(0.01, "on tensors of two and more dimensions")
    mixed_precision: str = flag("bf16", "type of the forward pass; fp16 needs a GPU", ("no", "bf16", "fp16"))
    l1_weight: float = flag(3.0, "of mean |x - y| in [0, 1]")
    l2_weight: float = flag(0.0, "of mean (x - y)^2 in [0, 1]")
    perceptual_weight: float = flag(1.0, "of LPIPS; 0: no LPIPS")
    perceptual_backbone: str = flag("squeeze", "network of that LPIPS", ("squeeze", "vgg", "alex"))
    random_views: bool = flag(True, "LPIPS of a random view, which a decoder cannot cheat with a lattice")
    quantizer_weight: float = flag(1.0, "of the quantizer's own loss")
    entropy_weight: float = flag(-1.0, "of the quantizer's entropy term; negative: as the model's arguments say")
    entropy_boost: float = flag(0.0, "the entropy weight starts at 1 + this times its value (MAGVIT-v2, WeTok: 3)")
    entropy_annealing_steps: int = flag(2000, "and falls to it over so many steps")
    continuous_steps: int = flag(300, "steps without quantization; latents of the last fifty start the codebook by "
                                      "K-means, where the quantizer has one")
    gan_weight: float = flag(0.0, "of the adversarial term; 0: no discriminator")
    gan_start: int = flag(0, "first step of the adversarial term")
    discriminator_start: int = flag(-1, "first step of the discriminator, which may learn before it is heard; "
                                        "negative: --gan_start")
    gan_loss: str = flag("hinge", "of the generator; non_saturating judges the mean logit of an image, as in WeTok",
                         ("hinge", "non_saturating"))
    discriminator_loss: str = flag("hinge", "of the discriminator", ("hinge", "vanilla"))
    discriminator: str = flag("patch", "network: PatchGAN, MaskBit's or Wuerstchen's", ("patch", "blur", "spectral"))
    discriminator_channels: int = flag(64, "of its first layer (spectral: of its last ones)")
    discriminator_layers: int = flag(3, "of stride 2")
    discriminator_norm: str = flag("batch", "of PatchGAN; with none or group a batch may be spread over processes",
                                   ("batch", "group", "none"))
    discriminator_learning_rate: float = flag(0.0, "after the warm-up; 0: the model's")
    adaptive_weight: bool = flag(False, "multiply gan_weight by the ratio of gradients at the decoder's last layer")
    lecam_weight: float = flag(0.0, "of LeCAM (WeTok: 0.05 with [0, 1] logits, 0.001 in others); 0: none")
    stage2: bool = flag(False, "train the decoder alone, encoder and codebook frozen; a WeTok's becomes generative")
    family_share: float = flag(0.0, "with --stage2 and --init_from: of the crops whose words are those of one of the "
                                    "smaller members of the model's family, so that one decoder serves all rates")
    int8: bool = flag(False, "compute with weights rounded to int8, and save them so: half the file")
    validation_limit: int = flag(0, "pictures to validate on; 0: all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution < 16 or not 0 < self.min_scale <= 1 or self.entropy_annealing_steps < 1:
            raise ConfigError("A tokenizer's recipe has crops of at least 16 pixels, a --min_scale in (0, 1] and at "
                              "least one --entropy_annealing_steps.")
        if self.discriminator_start > self.gan_start:
            raise ConfigError("A --discriminator_start after --gan_start would let one judge that has learnt nothing.")
        if not 0 <= self.family_share <= 1 or (self.family_share and not self.stage2):
            raise ConfigError("--family_share is a share, from 0 to 1, and needs --stage2: words must not move.")
        if self.int8 and self.shard:
            raise ConfigError("--int8 and --shard exclude one another: a scale needs the whole of its weights.")
