"""Training the concealer: first to know the lost words, then to paint them.

Token steps hide tokens of grids (`vtc.training.tokens`) and ask for them by cross-entropy, in a codebook drawn anew for
every batch. A word that looks almost like the lost one is almost right, so a part of the target lies on the words
around it. Picture steps encode crops of photographs, hide tokens, and let the decoder, which is frozen, draw from the
mean codewords: what counts is the picture, L1 and LPIPS with SqueezeNet on random views, as in training the tokenizer.

The script `scripts/train_concealer.py` holds the flags; the loop is `vtc.training.loop`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from vtc.codecs.concealer import CONCEALER, Concealer
from vtc.errors import ConfigError
from vtc.tokenizers.local_vq import LocalVQ
from vtc.training.data import RandomCrops
from vtc.training.perceptual import PerceptualLoss
from vtc.training.recipe import Recipe, flag
from vtc.training.task import Task
from vtc.training.tokens import TokenGrids


@dataclass
class ConcealerRecipe(Recipe):
    """Hyper-parameters of one run; each is a flag of `scripts/train_concealer.py`."""

    max_train_steps: int = flag(3000, "steps on grids of tokens")
    picture_steps: int = flag(500, "steps on pictures after them")
    tokens_per_step: int = flag(2560, "tokens of a token step, in crops of one random shape")
    train_batch_size: int = flag(4, "pictures of a picture step")
    resolution: int = flag(256, "side of its crops")
    learning_rate: float = flag(2e-3, "of token steps, after the warm-up")
    picture_learning_rate: float = flag(4e-4, "of picture steps, after theirs")
    final_learning_rate: float = flag(2e-5, "at the end of both schedules")
    lr_warmup_steps: int = flag(150, "steps of linear warm-up; a fifth of it before the pictures")
    adam_beta2: float = flag(0.98, "decay of Adam's second moments")
    weight_decay: float = flag(0.05, "of AdamW, on tensors of two and more dimensions")
    label_smoothing: float = flag(0.3, "share of the target on the words around the lost one")
    smoothing_width: float = flag(1.0, "of that neighbourhood, in codeword units")
    largest_share: float = flag(0.4, "how much of the batches goes to the largest codebook; the others share the rest, "
                                     "larger ones more")
    l1_weight: float = flag(3.0, "of mean |x - y| in [0, 1]")
    perceptual_weight: float = flag(1.0, "of LPIPS")
    ema_decay: float = flag(0.998, "of the average of the weights that is validated and saved")
    mixed_precision: str = flag("bf16", "type of the forward pass; fp16 needs a GPU", ("no", "bf16", "fp16"))
    checkpointing_steps: int = flag(200, "steps between checkpoints")
    validation_steps: int = flag(500, "steps between validations; 0: only at the end")
    dataloader_num_workers: int = flag(0, "processes that draw numbers of batches: none is needed")

    @property
    def total_steps(self) -> int:
        """On tokens and on pictures."""
        return self.max_train_steps + self.picture_steps

    def learning_rate_at(self, step: int) -> float:
        """Two schedules, one for the tokens and one for the pictures, each after a linear warm-up."""
        if step < self.max_train_steps:
            return self.scheduled(self.learning_rate, step, self.max_train_steps, self.lr_warmup_steps)
        return self.scheduled(self.picture_learning_rate, step - self.max_train_steps, self.picture_steps,
                              self.lr_warmup_steps // 5)


def random_losses(rng: np.random.Generator, rows: int, columns: int, most: float = 0.6) -> Tensor:
    """(rows, columns) bool, a share of 0.02 to `most` lost: singly in half of the cases, or by chunk, or in blocks."""
    share, kind = rng.uniform(0.02, most), rng.random()
    if kind < 0.5:
        lost = rng.random((rows, columns)) < share
    elif kind < 0.85:
        chunks = int(rng.integers(2, 33))
        gone = rng.permutation(chunks)[: max(1, round(share * chunks))]
        y, x = np.mgrid[:rows, :columns]
        lost = np.isin((rng.integers(chunks) * y + x) % chunks, gone)
    else:
        lost = np.zeros((rows, columns), dtype=bool)
        while lost.mean() < 0.5 * share:
            height, width = rng.integers(1, 5, 2)
            y, x = rng.integers(rows), rng.integers(columns)
            lost[y : y + height, x : x + width] = True
    if lost.all() or not lost.any():
        lost[:] = False
        lost[rng.integers(rows), rng.integers(columns)] = True
    return torch.from_numpy(lost)


def soft_targets(words: Tensor, codebook: Tensor, share: float, width: float) -> Tensor:
    """(N,) indices to (N, S) probabilities: 1 - `share` on the word, `share` by a Gaussian over distances to it."""
    near = torch.softmax(torch.cdist(codebook[words], codebook).square() / (-2 * width**2), dim=1)
    return (share * near).scatter_add_(1, words[:, None], near.new_full((len(words), 1), 1 - share))


class BatchNumbers(Dataset[int]):
    """Batch n is its number: the task makes the batch itself."""

    whole_batches = True

    def __getitem__(self, n: int) -> int:
        return n


class ConcealerTask(Task):
    """A concealer learns on tokens, then on pictures; what counts is the moving average of its weights.

    members: the tokenizers by codebook size; they share encoder and decoder but for the projections.
    views: token grids of the photographs, with all those sizes. files: the photographs.
    loss: of pictures; None where there are no picture steps. validation: grids of others, or None.
    """

    def __init__(self, model: Concealer, recipe: ConcealerRecipe, members: Mapping[int, LocalVQ],
                 views: Sequence[TokenGrids], files: Sequence[Path], loss: PerceptualLoss | None,
                 validation: TokenGrids | None) -> None:
        if loss is None and recipe.picture_steps:
            raise ConfigError("Picture steps need LPIPS with SqueezeNet: give --lpips_weights or --picture_steps 0.")
        super().__init__({"model": model}, {f"member_{size}": member for size, member in members.items()}
                         | ({} if loss is None else {"loss": loss}))
        self.concealer, self.recipe, self.members, self.views = model, recipe, dict(members), views
        self.crops = RandomCrops(list(files), recipe.resolution, recipe.seed) if recipe.picture_steps else None
        self.validation = validation

    def losses(self, player: str, batch: int, step: int) -> dict[str, Tensor]:
        """batch: its number. What is lost, where and in which codebook follows from torch's random state."""
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        if step < self.recipe.max_train_steps:
            return {"cross_entropy": self._token_loss(rng)}
        return self._picture_loss(rng, batch)

    @property
    def device(self) -> torch.device:
        """Where the members are."""
        return next(self.concealer.parameters()).device

    def _codebook(self, size: int) -> Tensor:
        return cast(Tensor, self.members[size].codewords).float()

    def _size(self, rng: np.random.Generator) -> int:
        """A codebook: the largest, or one of the others by the logarithm of its size."""
        *others, largest = sorted(self.members)
        if not others or rng.random() < self.recipe.largest_share:
            return largest
        weights = np.log2(others)
        return int(rng.choice(others, p=weights / weights.sum()))

    def _token_loss(self, rng: np.random.Generator) -> Tensor:
        recipe, device = self.recipe, self.device
        size = self._size(rng)
        rows, columns = (int(side) for side in rng.integers(14, 29, 2))
        grids: list[NDArray[np.int16]] = []
        while len(grids) < max(1, recipe.tokens_per_step // (rows * columns)):
            view = self.views[rng.integers(len(self.views))]
            grid = view.grid(int(rng.integers(len(view))), size)
            if grid.shape[0] < rows or grid.shape[1] < columns:
                rows, columns = min(rows, grid.shape[0]), min(columns, grid.shape[1])
                grids = [g[:rows, :columns] for g in grids]
            y, x = rng.integers(grid.shape[0] - rows + 1), rng.integers(grid.shape[1] - columns + 1)
            grids.append(grid[y : y + rows, x : x + columns])
        indices = torch.from_numpy(np.stack(grids).astype(np.int64)).to(device)
        lost = torch.stack([random_losses(rng, rows, columns) for _ in grids]).to(device)
        codebook = self._codebook(size)
        logits = self.concealer(codebook[indices], lost, codebook)
        with torch.autocast(device.type, enabled=False):
            target = soft_targets(indices[lost], codebook, recipe.label_smoothing, recipe.smoothing_width)
            return F.cross_entropy(logits.float(), target)

    def _picture_loss(self, rng: np.random.Generator, number: int) -> dict[str, Tensor]:
        recipe, device, crops = self.recipe, self.device, cast(RandomCrops, self.crops)
        member = self.members[self._size(rng)]
        first = number * recipe.train_batch_size
        images = torch.stack([crops[first + i] for i in range(recipe.train_batch_size)]).to(device).float() / 255
        with torch.no_grad():
            indices = member.encode(images).grids()[0][..., 0]
        rows, columns = indices.shape[1:]
        lost = torch.stack([random_losses(rng, rows, columns, most=0.45) for _ in images]).to(device)
        codebook = cast(Tensor, member.codewords).float()
        codes = codebook[indices]
        means = self.concealer.mean_codes(self.concealer(codes, lost, codebook), codebook)
        codes = codes.index_put((lost,), means.float())
        output = member.reconstruct(codes.movedim(-1, 1).contiguous(memory_format=torch.channels_last))
        return {"l1": recipe.l1_weight * F.l1_loss(output.float(), images),
                "lpips": recipe.perceptual_weight * self.frozen["loss"](images, output)}

    def validate(self, average: nn.Module, step: int) -> dict[str, float]:
        """Loss of lost tokens in nats, accuracy, and the error of the mean codeword, at 20 % lost singly."""
        if self.validation is None:
            return {}
        model, result = cast(Concealer, average), dict[str, float]()
        for size in [s for s in sorted(self.members) if s in (32, 256, max(self.members))]:
            codebook, sums = self._codebook(size), np.zeros(4)
            for n in range(len(self.validation)):
                indices = torch.from_numpy(self.validation.grid(n, size).astype(np.int64))[None].to(codebook.device)
                lost = torch.from_numpy(np.random.default_rng(n).random(indices.shape) < 0.2).to(codebook.device)
                logits, target = model(codebook[indices], lost, codebook).float(), indices[lost]
                error = (logits.softmax(1) @ codebook - codebook[target]).square().sum(1)
                sums += [F.cross_entropy(logits, target, reduction="sum").item(),
                         (logits.argmax(1) == target).sum().item(), error.sum().item(), len(target)]
            nats, right, error = (float(value) for value in (sums / sums[3])[:3])
            result |= {f"nats_{size}": nats, f"accuracy_{size}": right, f"code_error_{size}": error}
        return result

    def save(self, average: nn.Module, directory: Path) -> None:
        """The concealer's file, CONCEALER, for the largest of the members."""
        directory.mkdir(exist_ok=True)
        cast(Concealer, average).save(directory / CONCEALER, self.members[max(self.members)].fingerprint().hex())
