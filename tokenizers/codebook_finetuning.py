"""Fine-tuning a smaller codebook with encoder and decoder frozen (Mao et al., 2307.08265).

    image -> encoder* -> conv 1x1 -> nearest codeword -> conv 1x1 -> decoder* -> image       * frozen

The codebook and the two 1x1 convolutions train, and a discriminator against them (upstream's `VQ_Frozen`), for one
epoch at Adam's betas (0.5, 0.9). The loss is VQGAN's: L1 + LPIPS + quantizer + adaptive weight * hinge. A step is

    out = tuning.generator_step(images);                          out["loss"].backward();  optimizer.step()
    terms = tuning.discriminator_step(images, out["output"]);     terms["loss"].backward();  other.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from vtc.errors import ConfigError
from vtc.tokenizers.base import Tokenizer
from vtc.tokenizers.losses import adaptive_weight, discriminator_loss, hinge_generator_loss


class CodebookFinetuning(nn.Module):
    """A tokenizer of which little trains, and its losses.

    tokenizer: called with images it gives (output, `Quantized`), as `VQGAN` and `LocalVQ`; it is trained in place.
    perceptual: two batches of images in [0, 1] to a distance each, as `LPIPS`; None: no such term.
    discriminator: images in [-1, 1] to logits; None: no adversarial term.
    trained: prefixes of the names of what trains.
    balance: the trained weight nearest to the image. The adaptive weight compares the gradients there: the decoder's
        last layer, where VQGAN compares them, is frozen.
    perceptual_weight, adversarial_weight: of the terms; the latter beside the adaptive weight.
    """

    def __init__(self, tokenizer: Tokenizer, perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
                 discriminator: nn.Module | None = None,
                 trained: tuple[str, ...] = ("quantizer.", "quant_conv.", "post_quant_conv."),
                 balance: str = "post_quant_conv.weight", perceptual_weight: float = 1.0,
                 adversarial_weight: float = 0.8) -> None:
        super().__init__()
        names = [name for name, _ in tokenizer.named_parameters()] + [name for name, _ in tokenizer.named_buffers()]
        strangers = [prefix for prefix in trained if not any(name.startswith(prefix) for name in names)]
        if strangers or not trained:
            raise ConfigError(f"{type(tokenizer).__name__} has nothing named {', '.join(strangers)}; say in `trained` "
                              "what trains.")
        if balance not in names or not balance.startswith(trained):
            raise ConfigError(f"The weight to balance at must be one of those that train, not {balance!r}.")
        self.tokenizer, self.discriminator = tokenizer, discriminator
        self.perceptual, self.trained, self.balance = perceptual, trained, balance
        self.perceptual_weight, self.adversarial_weight = perceptual_weight, adversarial_weight
        if isinstance(perceptual, nn.Module):
            perceptual.requires_grad_(False)
        for name, parameter in tokenizer.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        self.train()

    def train(self, mode: bool = True) -> CodebookFinetuning:
        """Training mode for what trains; the frozen parts stay in eval mode."""
        super().train(mode)
        if isinstance(self.perceptual, nn.Module):
            self.perceptual.eval()
        self.tokenizer.eval()
        for name, module in self.tokenizer.named_modules():
            if f"{name}.".startswith(self.trained):
                module.train(mode)
        return self

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        """Of the tokenizer, for its optimizer; the discriminator has its own."""
        return (parameter for parameter in self.tokenizer.parameters() if parameter.requires_grad)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] to their reconstructions, not clamped."""
        output, _ = self.tokenizer(images)
        return output

    def generator_step(self, images: Tensor, adversarial: bool = True) -> dict[str, Tensor]:
        """Terms, their weighted sum "loss", and the detached "output"; `adversarial` False until the warm-up is over.

        L1 is that of images in [-1, 1], for which the weights were chosen.
        """
        output, quantized = self.tokenizer(images)
        terms = {"pixel": 2 * F.l1_loss(output, images), "quantizer": quantized.loss}
        reference = terms["pixel"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(output, images).mean()
            reference = reference + self.perceptual_weight * terms["perceptual"]
        loss = reference + quantized.loss
        if self.discriminator is not None and adversarial:
            self.discriminator.requires_grad_(False)
            terms["adversarial"] = hinge_generator_loss(self.discriminator(output * 2 - 1))
            self.discriminator.requires_grad_(True)
            weight = self.tokenizer.get_parameter(self.balance)
            terms["adaptive_weight"] = adaptive_weight(reference, terms["adversarial"], weight)
            loss = loss + self.adversarial_weight * terms["adaptive_weight"] * terms["adversarial"]
        return {"loss": loss, **terms, "output": output.detach()}

    def discriminator_step(self, images: Tensor, output: Tensor) -> dict[str, Tensor]:
        """Terms of the discriminator, and their sum "loss", for images and their reconstructions."""
        if self.discriminator is None:
            raise ConfigError("There is no discriminator to train; give one to CodebookFinetuning.")
        return discriminator_loss(self.discriminator(images * 2 - 1), self.discriminator(output.detach() * 2 - 1))
