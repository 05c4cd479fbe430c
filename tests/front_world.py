"""A world of methods, runs and policies whose truth is known, to try the statistics of fronts on."""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm as normal

from align.fronts.indicators import hypervolumes, weight_vectors
from align.fronts.statistics import INDICATORS, Yardstick, resampled_means


@dataclass(frozen=True)
class World:
    """Methods whose fronts are quarter circles; a training seed moves a run's radius, and prompts are noise.

    Half of the noise of a prompt is shared by all policies: some prompts are easier.
    """

    runs: tuple[int, ...]
    radii: tuple[float, ...]
    spread: float
    points: int = 5
    prompts: int = 80
    noise: float = 0.3

    def base(self) -> np.ndarray:
        angles = np.linspace(0.15, np.pi / 2 - 0.15, self.points)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def draw(self, rng: np.random.Generator) -> "Draw":
        radii_R = np.repeat(self.radii, self.runs)
        truth_MK = (
            self.base() * (radii_R * (1 + self.spread * (radii_R < 0.75) * rng.normal(size=len(radii_R))))[:, None, None]
        )
        truth_MK = truth_MK.reshape(-1, 2)
        shared, own = (self.noise * rng.normal(size=(2, m, self.prompts, 2)) for m in (1, len(truth_MK)))
        validation_MPK, test_MPK = truth_MK[:, None] + shared[:, :1] + own
        rows = np.arange(len(truth_MK)).reshape(-1, self.points)
        starts = np.cumsum([0, *self.runs])
        methods = [list(rows[a:b]) for a, b in itertools.pairwise(starts)]
        return Draw(self, truth_MK, validation_MPK, test_MPK, methods, shared[0, 0].mean(axis=0))


@dataclass(frozen=True)
class Draw:
    world: World
    truth_MK: np.ndarray
    validation_MPK: np.ndarray
    test_MPK: np.ndarray
    methods: list[list[np.ndarray]]
    shared_K: np.ndarray  # what all validation means have in common

    def yardstick(self, resamples: int) -> Yardstick:
        test_BMK = resampled_means(self.test_MPK, resamples)
        return Yardstick(self.validation_MPK.mean(axis=1), test_BMK, self.world.prompts, np.zeros(2))

    def further_runs(self, radius: float, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Validation means and truths (N, M, 2) of further runs of a method."""
        radii_N = radius * (1 + self.world.spread * normal.ppf((np.arange(count) + 0.5) / count))  # at equal probabilities
        truth_NM2 = self.world.base() * radii_N[:, None, None]
        error = self.world.noise / self.world.prompts**0.5
        return truth_NM2 + self.shared_K + error * rng.normal(size=truth_NM2.shape), truth_NM2


WEIGHTS = weight_vectors(2)


def truths(draw: Draw, yardstick: Yardstick, radius: float, rng: np.random.Generator) -> dict[str, float]:
    """What further runs of a method are worth on average: chosen on these validation prompts, measured without noise."""
    means_NM2, truth_NM2 = draw.further_runs(radius, 40, rng)
    front_Z2, true_Z2 = yardstick.validation_MK[yardstick.front_M], draw.truth_MK[yardstick.front_M]
    dominated_NM = (means_NM2[:, None] > means_NM2[:, :, None]).all(axis=-1).any(axis=-1)
    gaps_NZM2, true_gaps_NZM2 = (z[:, None] - v[:, None] for z, v in ((front_Z2, means_NM2), (true_Z2, truth_NM2)))
    ahead_NZM2 = np.maximum(gaps_NZM2, 0)
    lengths_NZM = np.linalg.norm(ahead_NZM2, axis=-1)
    nearest_NZ = lengths_NZM.argmin(axis=-1)[..., None]
    along_NZM = (ahead_NZM2 / np.maximum(lengths_NZM, 1e-12)[..., None] * true_gaps_NZM2).sum(axis=-1)
    worst_NZM = gaps_NZM2.max(axis=-1)
    epsilons = []
    for n, worst_ZM in enumerate(worst_NZM):
        z = worst_ZM.min(axis=1).argmax()
        m = worst_ZM[z].argmin()
        epsilons.append(true_gaps_NZM2[n, z, m, gaps_NZM2[n, z, m].argmax()])
    picked_NW = (means_NM2 @ WEIGHTS.T).argmax(axis=1)
    utility_NWM = (truth_NM2 @ WEIGHTS.T).transpose(0, 2, 1)
    found = (
        hypervolumes(np.where(dominated_NM[..., None], 0.0, truth_NM2), np.zeros(2)),
        np.take_along_axis(along_NZM, nearest_NZ, axis=-1),
        epsilons,
        np.take_along_axis(utility_NWM, picked_NW[..., None], axis=-1),
    )
    return {name: float(np.mean(values)) for name, values in zip(INDICATORS, found, strict=True)}


SEEDS_MATTER = World((1, 3, 5), (0.75, 0.6, 0.5), spread=0.06)  # three and five runs of two methods, below a third


def coverage(world: World, rng: np.random.Generator, repetitions: int, resamples: int) -> dict[tuple[str, int], float]:
    """How often intervals hold what further runs are worth, by indicator and number of runs; not of the first method."""
    methods = range(1, len(world.runs))
    hits = {(name, world.runs[a]): 0 for name in INDICATORS for a in methods}
    for _ in range(repetitions):
        draw = world.draw(rng)
        yardstick = draw.yardstick(resamples)
        for a in methods:
            found, truth = yardstick.indicators(draw.methods[a]), truths(draw, yardstick, world.radii[a], rng)
            for name in INDICATORS:
                hits[name, world.runs[a]] += found[name].low <= truth[name] <= found[name].high
    return {key: count / repetitions for key, count in hits.items()}
