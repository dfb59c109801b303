"""K-means: Lloyd's algorithm, exact, in blocked GEMMs that skip what cannot have changed.

    score(x, c) = x.c - |c|^2 / 2           larger is nearer: |x - c|^2 = |x|^2 - 2 score(x, c)

Each point keeps the score of its own centre and `bound`, an upper bound of the scores of all other centres. After the
centres have moved,

    every point is compared with the centres that moved, which may raise its bound,
    a point whose own centre is now below its bound is compared with all centres,

and the labels are those of the plain algorithm (up to rounding between equals). A cluster that neither lost nor won a
point does not move, so an iteration costs N x (moved centres) instead of N x K: most of a run is such iterations.
Bounds need not be sharp, so where the hardware has bfloat16 they are computed in it, and raised by its error.
Hamerly (2010) keeps the same two numbers a point; his bounds widen with every move by the triangle inequality, which
says nothing in 256 dimensions, where one word more or less moves a centre further than words are apart.

`start="k-means++"` is Arthur and Vassilvitskii's seeding (2007), in blocks; see `plus_plus`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtc.errors import ConfigError

#: scores that are held at once: 16 MiB of float32, half of a usual last-level cache
BLOCK = 2**22


@dataclass(frozen=True)
class Clustering:
    """What `kmeans` found.

    centres: (K, d), of the points' type (float32 for half precision).
    labels: (N,) int64, the nearest centre of each point.
    inertia: sum of weight * |x - centre|^2.
    iterations: how often the centres were moved.
    """

    centres: Tensor
    labels: Tensor
    inertia: float
    iterations: int


@torch.no_grad()
def kmeans(points: Tensor, clusters: int, weights: Tensor | None = None,
           start: Literal["k-means++", "random"] | Tensor = "k-means++", iterations: int = 300,
           tolerance: float = 1e-4, generator: torch.Generator | None = None) -> Clustering:
    """(N, d) points to K = `clusters` centres. The same generator state gives the same result.

    weights: (N,), not negative: how much each point counts, such as how often a codeword is used.
    start: a seeding, or the (K, d) centres to begin with.
    iterations, tolerance: the run ends when no label changes, when the squared moves of all centres add up to less than
        `tolerance` times the mean variance of a coordinate, or after this many iterations (scikit-learn's rules).

    A cluster without points takes over the point that is furthest from its centre. With more clusters than different
    points some centres are equal. ConfigError for what cannot be clustered.
    """
    if points.ndim != 2 or not len(points) or not points.is_floating_point():
        raise ConfigError(f"K-means takes (N, d) floating-point rows, at least one, not {tuple(points.shape)}.")
    if clusters < 1 or iterations < 1:
        raise ConfigError(f"K-means needs at least one cluster and one iteration, not {clusters} and {iterations}.")
    points = points if points.dtype == torch.float64 else points.float()
    if not points.isfinite().all():
        raise ConfigError("K-means takes finite points; some of these are infinite or not a number.")
    weights = torch.ones(len(points), device=points.device) if weights is None else weights
    if weights.shape != points.shape[:1] or not (weights >= 0).all() or not weights.isfinite().all():
        raise ConfigError(f"K-means takes one finite weight >= 0 for each of the {len(points)} points.")
    weights = weights.to(points)
    if not weights.sum() > 0:
        raise ConfigError("K-means needs a point whose weight is not zero.")
    mean = points.mean(0)  # scores of centred points lose fewer digits
    points = points - mean
    if isinstance(start, Tensor):
        if start.shape != (clusters, points.shape[1]):
            raise ConfigError(f"The start must be ({clusters}, {points.shape[1]}) centres, not {tuple(start.shape)}.")
        centres = start.to(points) - mean
    elif start == "k-means++":
        centres = points[plus_plus(points, clusters, weights, generator)]
    elif start == "random":
        centres = points[_random_rows(weights, clusters, generator)]
    else:
        raise ConfigError(f"The start is 'k-means++', 'random' or a tensor of centres, not {start!r}.")
    lloyd = _Lloyd(points, weights, centres.clone())
    threshold = tolerance * lloyd.norms.mean().item() / points.shape[1]  # points are centred: the mean variance
    done = 0
    for done in range(1, iterations + 1):  # noqa: B007  # counted, and told
        shift = lloyd.move_centres()
        if not lloyd.assign() or shift <= threshold:
            break
    return Clustering(lloyd.centres + mean, lloyd.labels, lloyd.inertia(), done)


class _Lloyd:
    """Points (N, d), their weights, K centres, and for each point its label, its centre's score, and the bound."""

    def __init__(self, points: Tensor, weights: Tensor, centres: Tensor) -> None:
        self.points, self.weights, self.centres = points, weights, centres
        self.weighted = points if (weights == 1).all() else points * weights[:, None]
        self.norms, self.half_norms = points.square().sum(1), 0.5 * centres.square().sum(1)
        self.coarse = _coarse_points(points) if points.dtype == torch.float32 and _is_bfloat16_fast(points) else None
        self.labels = rows_equal_to(points, centres)
        # A point that is a centre has found its own; whoever else scores, scores less.
        self.own = 0.5 * self.norms
        self.bound = self.own.clone()
        self._compare_with_all((self.labels < 0).nonzero()[:, 0])
        #: clusters that won or lost points since their centres were last computed
        self.stale = torch.ones(len(centres), dtype=torch.bool, device=points.device)
        #: clusters whose centres moved since the points were last compared with them
        self.moved = torch.zeros_like(self.stale)

    def move_centres(self) -> float:
        """Every stale cluster's centre to the mean of its points; the sum of the squared moves."""
        before = self.centres.clone()
        self._fill_empty_clusters()
        rows = self.stale[self.labels].nonzero()[:, 0]
        labels = self.labels[rows]
        mass = torch.zeros_like(self.centres[:, 0]).index_add_(0, labels, self.weights[rows])[:, None]
        sums = torch.zeros_like(self.centres).index_add_(0, labels, self.weighted[rows])
        means = torch.where(mass > 0, sums / torch.where(mass > 0, mass, 1), self.centres)
        shifts = (means - before).square().sum(1)
        self.centres, self.moved = means, shifts > 0
        self.half_norms = 0.5 * means.square().sum(1)
        return shifts.sum().item()

    def assign(self) -> bool:
        """Every point to its nearest centre; whether any went elsewhere."""
        before = self.labels.clone()
        self._compare_with_moved()
        self.moved = torch.zeros_like(self.moved)
        self._compare_with_all((self.own < self.bound).nonzero()[:, 0])
        gone = self.labels != before
        self.stale = torch.zeros_like(self.stale)
        self.stale[before[gone]] = True
        self.stale[self.labels[gone]] = True
        return bool(gone.any())

    def inertia(self) -> float:
        """Sum of weight * |x - centre|^2, from differences: no cancellation."""
        blocks = torch.arange(len(self.points), device=self.points.device).split(1024)
        return sum(((self.points[i] - self.centres[self.labels[i]]).square().sum(1) * self.weights[i])
                   .sum(dtype=torch.float64).item() for i in blocks)

    def _scores_of_own(self, rows: Tensor) -> Tensor:
        labels = self.labels[rows]
        own = self.centres[labels]
        return (self.points[rows] * own).sum(1) - self.half_norms[labels]

    def _compare_with_moved(self) -> None:
        """Own scores of this moment; bounds rise to the best score of any other moved centre."""
        moved = self.moved.nonzero()[:, 0]
        if not len(moved):
            return
        place = torch.full((len(self.centres),), -1, device=moved.device)
        place[moved] = torch.arange(len(moved), device=moved.device)
        screen = _Screen(self, moved)
        for block in torch.arange(len(self.points), device=moved.device).split(screen.rows):
            scores = screen.scores(block)
            own_place = place[self.labels[block]]
            own_moved = (own_place >= 0).nonzero()[:, 0]
            scores[own_moved, own_place[own_moved]] = torch.finfo(scores.dtype).min
            self.own[block[own_moved]] = self._scores_of_own(block[own_moved])
            best = scores.amax(1).to(self.bound)
            self.bound[block] = torch.maximum(self.bound[block], best + screen.errors(block, best))

    def _compare_with_all(self, rows: Tensor) -> None:
        """Label, score and bound of these rows, anew: first as the screen sees them, then exactly where it cannot."""
        if self.coarse is not None and len(self.centres) > 1:
            screen = _Screen(self, torch.arange(len(self.centres), device=rows.device))
            for block in rows.split(screen.rows):
                best = screen.scores(block).topk(2, dim=1)
                self.labels[block] = best.indices[:, 0]
                self.own[block] = self._scores_of_own(block)
                second = best.values[:, 1].to(self.bound)
                self.bound[block] = second + screen.errors(block, second)
            rows = rows[self.own[rows] < self.bound[rows]]
        for block in rows.split(max(1, BLOCK // len(self.centres))):
            scores, best_rows = best_two(self.points[block], self.centres, self.half_norms)
            self.labels[block], self.own[block], self.bound[block] = best_rows[:, 0], scores[:, 0], scores[:, 1]

    def _fill_empty_clusters(self) -> None:
        """Each cluster without weight takes the point that is furthest from its centre, if its cluster can spare it."""
        mass = torch.zeros_like(self.centres[:, 0]).index_add_(0, self.labels, self.weights)
        empty = (mass == 0).nonzero()[:, 0].tolist()
        if not empty:
            return
        heavy = self.weights > 0
        distances = torch.where(heavy, self.norms - 2 * self.own, 0)
        members = torch.bincount(self.labels[heavy], minlength=len(mass)).tolist()
        for row in distances.argsort(descending=True).tolist():
            # What rounding leaves between a point and its centre is no distance: then only copies are left to take.
            if not empty or distances[row] <= 1e-6 * self.norms[row]:
                return
            donor = int(self.labels[row])
            if members[donor] > 1:
                members[donor] -= 1
                taker = empty.pop()
                self.labels[row], self.centres[taker] = taker, self.points[row]
                self.stale[donor] = self.stale[taker] = True


class _Screen:
    """Scores of some centres, in bfloat16 where the processor multiplies it fast, and how wrong they can be.

    The half norms ride along as two more columns, so that a score is one product. A bfloat16 has 8 significant bits:
    with u = 2^-8, the two factors of each of the d products are rounded by 0.4 u (root mean square), and the sum by u
    at most. `errors` is seven standard deviations of the former, 4 u |x| |c| / sqrt(d), plus the latter. Where a score
    is off by more, a point may get a centre that is not the nearest, but nearest to three digits. Without bfloat16 the
    scores are exact.
    """

    def __init__(self, lloyd: _Lloyd, which: Tensor) -> None:
        self.points, self.coarse, self.norms = lloyd.points, lloyd.coarse, lloyd.norms
        self.centres, self.half_norms = lloyd.centres[which], lloyd.half_norms[which]
        self.rows = min(2048, max(256, BLOCK // 4 // len(which)))  # rows and scores stay in the cache
        if self.coarse is not None:
            high = self.half_norms.bfloat16()
            low = (self.half_norms - high.float()).bfloat16()
            self.coarse_centres = torch.cat([self.centres.bfloat16(), -high[:, None], -low[:, None]], 1)

    def scores(self, rows: Tensor) -> Tensor:
        """(n, K) of the points with these numbers, bfloat16 or the points' type; a new tensor."""
        with torch.autocast(self.points.device.type, enabled=False):
            if self.coarse is not None:
                return self.coarse[rows] @ self.coarse_centres.T
            return torch.addmm(self.half_norms, self.points[rows], self.centres.T, beta=-1)

    def errors(self, rows: Tensor, scores: Tensor) -> Tensor | float:
        """(n,) how far from the truth one of these scores (n,) of each of these points may lie."""
        if self.coarse is None:
            return 0.0
        norms = self.norms[rows].sqrt() * (2 * self.half_norms.max()).sqrt()
        return 2**-8 * (4 / self.points.shape[1] ** 0.5 * norms + scores.abs())


def _coarse_points(points: Tensor) -> Tensor:
    return torch.cat([points.bfloat16(), torch.ones(len(points), 2, dtype=torch.bfloat16, device=points.device)], 1)


def _is_bfloat16_fast(points: Tensor) -> bool:
    """Whether the device multiplies bfloat16 faster than float32, in hardware."""
    if points.is_cuda:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    knows = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return points.device.type == "cpu" and knows is not None and bool(knows())


def best_two(points: Tensor, centres: Tensor, half_norms: Tensor) -> tuple[Tensor, Tensor]:
    """The two largest scores (n, 2) of each point and whose they are; -inf where there is only one centre.

    Autocast does not touch the product.
    """
    with torch.autocast(points.device.type, enabled=False):
        scores = torch.addmm(half_norms, points, centres.T, beta=-1)
    if scores.shape[1] == 1:
        return torch.cat([scores, torch.full_like(scores, -torch.inf)], 1), torch.zeros_like(scores, dtype=torch.int64)
    best = scores.topk(2, dim=1)
    return best.values, best.indices


def rows_equal_to(points: Tensor, centres: Tensor) -> Tensor:
    """For each point the number of a centre with the same bits, or -1.

    When a codebook is clustered, its own words are the first centres: at K = N / 2 this spares half of the first
    iteration. Found by a 64-bit hash of a row's first numbers, then compared in full; a copy that is missed costs time.
    """
    if points.shape[1] > 8:
        heads = rows_equal_to(points[:, :8], centres[:, :8])
        rows = (heads >= 0).nonzero()[:, 0]
        heads[rows[(points[rows] != centres[heads[rows]]).any(1)]] = -1
        return heads

    numbers = torch.int64 if points.dtype == torch.float64 else torch.int32
    factors = torch.randint(-2**62, 2**62, (points.shape[1],), generator=torch.Generator().manual_seed(0)) | 1
    factors = factors.to(points.device)

    def hashes(rows: Tensor) -> Tensor:
        parts = rows.contiguous().view(numbers).split(max(1, BLOCK // rows.shape[1]))
        return torch.cat([(part.long() * factors).sum(1) for part in parts])  # overflow wraps: exact modulo 2^64

    ordered, order = hashes(centres).sort(stable=True)  # of equal centres the first
    of_points = hashes(points)
    found = order[torch.searchsorted(ordered, of_points).clamp(max=len(centres) - 1)]
    rows = (hashes(centres)[found] == of_points).nonzero()[:, 0]
    rows = rows[(points[rows] == centres[found[rows]]).all(1)]
    labels = torch.full_like(found, -1)
    labels[rows] = found[rows]
    return labels


def plus_plus(points: Tensor, clusters: int, weights: Tensor, generator: torch.Generator | None = None,
              block: int = 128) -> Tensor:
    """K-means++ seeding: (K,) row numbers, each drawn in proportion to weight * squared distance to those before.

    Drawn a block at a time from the distances before the block; each draw is then accepted with the ratio by which the
    block's earlier draws have shortened its distance. That is rejection sampling, so the distribution is the one of
    drawing singly, but distances are computed by one GEMM a block.
    """
    norms = points.square().sum(1)
    chosen = draw(weights, 1, generator).to(points.device)
    nearest = torch.full_like(norms, torch.inf)
    fresh = chosen
    while True:
        for i in torch.arange(len(points), device=points.device).split(max(1, BLOCK // len(fresh))):
            products = torch.addmm(norms[fresh], points[i], points[fresh].T, alpha=-2)
            nearest[i] = torch.minimum(nearest[i], (norms[i] + products.amin(1)).clamp(min=0))
        nearest[fresh] = 0
        missing = clusters - len(chosen)
        if not missing:
            return chosen
        # A distance below the rounding of a square is that of a copy.
        mass = torch.where(nearest > 1e-6 * norms, weights * nearest, 0)
        if not mass.sum() > 0:  # every different point is a centre already
            return torch.cat([chosen, draw(weights, missing, generator).to(points.device)])
        fresh = _accepted(points, nearest, draw(mass, min(block, missing), generator).to(points.device), generator)
        chosen = torch.cat([chosen, fresh])


def _accepted(points: Tensor, nearest: Tensor, drawn: Tensor, generator: torch.Generator | None) -> Tensor:
    """Those of the drawn rows that rejection sampling keeps; always the first."""
    between = torch.cdist(points[drawn], points[drawn]).square().cpu()
    before = nearest[drawn].cpu()
    bars = torch.rand(len(drawn), generator=generator).to(before) * before
    current, kept = before.clone(), []
    for n in range(len(drawn)):
        if current[n] > bars[n]:
            kept.append(n)
            current = torch.minimum(current, between[n])
            current[drawn == drawn[n]] = 0  # whatever rounding left between a point and itself
    return drawn[kept]


def draw(mass: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` row numbers in proportion to `mass`, with replacement; any number of rows, unlike torch.multinomial."""
    cumulative = mass.double().cpu().cumsum(0)
    places = torch.rand(count, dtype=torch.float64, generator=generator) * cumulative[-1]
    return torch.searchsorted(cumulative, places, right=True).clamp(max=len(mass) - 1)


def _random_rows(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` different rows of positive weight, as far as there are so many; each as likely as any other."""
    rows = (weights > 0).nonzero()[:, 0]
    order = torch.randperm(len(rows), generator=generator)[:count]
    if len(order) < count:
        order = torch.cat([order, torch.randint(len(rows), (count - len(order),), generator=generator)])
    return rows[order.to(rows.device)]
