"""Owns how sure a mean over examples is: intervals from drawing the examples anew.

Perplexities of examples are skewed, and the best of many trials looks better than it is on the very examples
that it was chosen on. Refuses to know where values come from.

Shapes: T trials, N examples, D draws.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_DRAWS = 10_000
_PIECE = 2_000_000  # numbers at once
_MOST_KEPT = 8_000_000  # numbers, from one interval to the next
_NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class Interval:
    """A mean and where it lies in 95 of 100 cases."""

    mean: float
    low: float
    high: float

    def words(self) -> str:
        """Write it as people read it."""
        return f"{self.mean:.4g} (95 % interval {self.low:.4g} to {self.high:.4g})"


def bootstrap_interval(values: Sequence[float], draws: int = _DRAWS) -> tuple[float, float]:
    """Return where the mean of `values` lies in 95 of 100 draws of as many examples.

    Source: Efron 1979, https://doi.org/10.1214/aos/1176344552.
    """
    values_N = np.array(values)
    means_D = np.concatenate([counts_DN @ values_N for counts_DN in _shares(len(values_N), draws)])
    low, high = np.quantile(means_D, [0.025, 0.975])
    return float(low), float(high)


def compare(best: Sequence[float], other: Sequence[float], draws: int = _DRAWS) -> tuple[float, float, float]:
    """Return (difference of means best - other, its 95 % interval), both drawn over the same examples."""
    differences = np.array(best) - np.array(other)
    low, high = bootstrap_interval(differences.tolist(), draws)
    return float(differences.mean()), low, high


def expect_unseen(perplexities: Sequence[Sequence[float]], chosen: int, draws: int = _DRAWS) -> Interval:
    """Return what mean perplexity to expect on unseen examples of the same kind, of the one that was chosen.

    `perplexities`: [T][N] of all that were chosen from, on the examples that they were chosen on. Two things
    are put right. How much better the best looks than it is: choosing is repeated on each draw, and what is
    chosen there compared with what it is here, beyond what a draw does to one trial alone. And the skew: the
    interval is the bootstrap-t's, of the mean's logarithm.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 12 and 17.
    """
    values_TN = np.array(perplexities, dtype=float)
    own_N, means_T, size = values_TN[chosen], values_TN.mean(axis=1), values_TN.shape[1]
    mean, error = means_T[chosen], _standard_error(own_N.mean(), np.square(own_N).mean(), size)
    optimism_D, pivots_D = [], []
    for counts_DN in _shares(size, draws):
        drawn_DT = counts_DN @ values_TN.T
        best_D = drawn_DT.argmin(axis=1)
        drawn_D, best_drawn_D = drawn_DT[:, chosen], drawn_DT[np.arange(len(drawn_DT)), best_D]
        optimism_D.append(np.log(means_T[best_D] / best_drawn_D) - np.log(mean / drawn_D))
        error_D = _standard_error(drawn_D, counts_DN @ np.square(own_N), size)
        varied_D = error_D > _NEGLIGIBLE * error  # a draw of one example alone tells nothing of the spread
        pivots_D.append(np.log(drawn_D / mean)[varied_D] * drawn_D[varied_D] / error_D[varied_D])
    expected = mean * np.exp(np.concatenate(optimism_D).mean())
    pivots = np.concatenate(pivots_D)
    low, high = np.quantile(pivots, [0.025, 0.975]) if len(pivots) else (0.0, 0.0)
    return Interval(
        float(expected),
        float(expected * np.exp(-high * error / mean)),
        float(expected * np.exp(-low * error / mean)),
    )


def _standard_error(mean: np.ndarray, mean_square: np.ndarray, size: int) -> np.ndarray:
    """Return the standard error of means of so many examples, given means and means of squares."""
    return np.sqrt(np.maximum(mean_square - np.square(mean), 0) / max(1, size - 1))


def _shares(size: int, draws: int) -> Iterable[np.ndarray]:
    """Return the share of each example in so many draws of as many examples: [D, N] in pieces.

    They depend on the number of examples alone, so that a page of many intervals draws once.
    """
    return _kept_shares(size, draws) if size * draws <= _MOST_KEPT else _drawn_shares(size, draws)


@lru_cache(maxsize=2)  # of the public examples and of a holdout
def _kept_shares(size: int, draws: int) -> tuple[np.ndarray, ...]:
    return tuple(_drawn_shares(size, draws))


def _drawn_shares(size: int, draws: int) -> Iterator[np.ndarray]:
    generator, piece = np.random.default_rng(0), max(1, _PIECE // max(1, size))
    even = np.full(size, 1 / size)
    for done in range(0, draws, piece):
        yield generator.multinomial(size, even, min(piece, draws - done)) / size
