"""What generated pictures are judged by: a feature cloud, a classifier, the nearest training pictures. Not a script.

    judge = GeneratorJudge("tiny.npz", "weights/")            # real pictures with classes, AlexNet's features
    facts = judge.look(images)                                 # (N, 3, S, S) in [0, 1]
    judge.frechet(facts.pooled)                                # FD-AlexNet-pool to the training set and to the held out
    judge.accuracy(facts, labels)                              # share that the classifier finds in its class
    judge.nearest(images)                                      # LPIPS to the nearest training picture, and which it is

The classifier is a linear layer over the last convolution of AlexNet in 2 x 2 parts, fitted to the training pictures
and their mirror images; `held_out_accuracy` says how good it is on the others. The Frechet distance is over the mean of
that layer, 256 numbers, so its covariance is settled by some thousand pictures; it is not FID.
`evaluate_generator.py` and the table of cache policies use this.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtc.eval.features import PooledFeatures
from vtc.eval.frechet import FeatureStatistics, feature_statistics, frechet_distance
from vtc.tokenizers.lpips import LPIPS
from vtc.training.labelled import labelled_images

#: pictures that go through AlexNet at once
BATCH = 64


@dataclass(frozen=True)
class Facts:
    """pooled: (N, 256), for the Frechet distance. parts: (N, 1024), for the classifier."""

    pooled: Tensor
    parts: Tensor

    @staticmethod
    def cat(all_facts: list[Facts]) -> Facts:
        """Those of several batches."""
        return Facts(torch.cat([f.pooled for f in all_facts]), torch.cat([f.parts for f in all_facts]))


def as_floats(images: Tensor) -> Tensor:
    """uint8 pictures to [0, 1]; others stay."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


class GeneratorJudge:
    """Real pictures, once, and what others are like beside them.

    pack: an .npz pack or folder of classes with the splits train and val (`vtc.training.labelled`).
    weights: folder of AlexNet's features, as LPIPS takes it; None: where LPIPS finds them.
    side: of the pictures in pixels.
    """

    def __init__(self, pack: str | Path, weights: str | Path | None = None, side: int = 128) -> None:
        train, held = labelled_images(pack, "train"), labelled_images(pack, "val")
        self.classes, self.side, self.weights = train.classes, side, weights
        self.train, self.held_out = train.pictures(side), held.pictures(side)
        self.train_labels, self.held_out_labels = torch.from_numpy(train.labels), torch.from_numpy(held.labels)
        self.network = PooledFeatures("alex", weights)
        self.train_facts, self.held_out_facts = self.look(self.train), self.look(self.held_out)
        self.train_statistics = feature_statistics(self.train_facts.pooled)
        self.held_out_statistics = feature_statistics(self.held_out_facts.pooled)
        self._fit()
        self._coarse_train: Tensor | None = None
        self._lpips: LPIPS | None = None

    @torch.inference_mode()
    def look(self, images: Tensor) -> Facts:
        """(N, 3, S, S), uint8 or in [0, 1], to what the measures need."""
        made = []
        for batch in images.split(BATCH):
            mean, std = self.network.get_buffer("mean"), self.network.get_buffer("std")
            last = self.network.features((as_floats(batch) - mean) / std)
            made.append(Facts(last.mean((2, 3)), F.adaptive_avg_pool2d(last, 2).flatten(1)))
        return Facts.cat(made)

    def frechet(self, pooled: Tensor | FeatureStatistics) -> dict[str, float]:
        """Distances to the training and to the held-out pictures. They fall with the number: report it as well."""
        statistics = pooled if isinstance(pooled, FeatureStatistics) else feature_statistics(pooled)
        return {"fd_alexnet_to_train": frechet_distance(self.train_statistics, statistics),
                "fd_alexnet_to_held_out": frechet_distance(self.held_out_statistics, statistics)}

    # ---- classes ----------------------------------------------------------------------------------------------------

    @torch.enable_grad()
    def _fit(self, steps: int = 200) -> None:
        """The linear layer: Adam on all training pictures and their mirror images at once, with weight decay."""
        both = torch.cat([self.train_facts.parts, self.look(self.train.flip(-1)).parts]).clone()
        labels = self.train_labels.repeat(2)
        self.mean, self.std = both.mean(0), both.std(0) + 1e-3
        both = (both - self.mean) / self.std
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(both.shape[1], len(self.classes))
        optimizer = torch.optim.AdamW(self.linear.parameters(), lr=1e-2, weight_decay=1.0)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
            optimizer.zero_grad()
            F.cross_entropy(self.linear(both), labels, label_smoothing=0.05).backward()
            optimizer.step()
        self.linear.requires_grad_(False)
        self.held_out_accuracy = self.accuracy(self.held_out_facts, self.held_out_labels)

    def probabilities(self, facts: Facts) -> Tensor:
        """(N, classes)."""
        return self.linear((facts.parts - self.mean) / self.std).softmax(-1)

    def accuracy(self, facts: Facts, labels: Tensor) -> float:
        """Share of pictures that the classifier finds in the class that they were made for."""
        return (self.probabilities(facts).argmax(-1) == labels).float().mean().item()

    # ---- neighbours -------------------------------------------------------------------------------------------------

    @property
    def lpips(self) -> LPIPS:
        """With AlexNet."""
        if self._lpips is None:
            self._lpips = LPIPS("alex", self.weights)
        return self._lpips

    @torch.inference_mode()
    def coarse(self, images: Tensor) -> Tensor:
        """(N, D) whose squared distances are LPIPS's, but for features being averaged over 2 x 2 parts of a picture."""
        rows = []
        for batch in images.split(BATCH):
            layers = [F.adaptive_avg_pool2d(x * head.sqrt(), 2).flatten(1) / 2
                      for x, head in zip(self.lpips.unit_features(as_floats(batch)), self.lpips.heads, strict=True)]
            rows.append(torch.cat(layers, 1))
        return torch.cat(rows)

    @torch.inference_mode()
    def nearest(self, images: Tensor, candidates: int = 8) -> tuple[Tensor, Tensor]:
        """LPIPS to the nearest training picture or its mirror image, (N,), and that picture's number, (N,).

        The nearest is looked for among the `candidates` that are nearest by `coarse`, of each orientation.
        """
        if self._coarse_train is None:
            self._coarse_train = self.coarse(self.train)
        squares = self._coarse_train.square().sum(1)
        best = torch.full((len(images),), torch.inf)
        which = torch.zeros(len(images), dtype=torch.int64)
        for mirrored in (False, True):
            seen = as_floats(images.flip(-1) if mirrored else images)
            scores = squares - 2 * self.coarse(seen) @ self._coarse_train.T
            for i, near in enumerate(scores.topk(candidates, largest=False).indices):
                distances = self.lpips(seen[i : i + 1].expand(candidates, -1, -1, -1), as_floats(self.train[near]))
                least = int(distances.argmin())
                if distances[least] < best[i]:
                    best[i], which[i] = distances[least], near[least]
        return best, which
