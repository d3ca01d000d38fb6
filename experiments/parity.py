"""
How metrics change with compute, and the parity FLOP ratio (§4.2, Figure 5 and Table 3 of arXiv 2408.11039).

Each family's runs of several sizes are fitted by a line, log(metric) = intercept + slope · log(FLOPs). The parity FLOP
ratio is the share of the other model's FLOPs with which Transfusion reaches the other model's result at its largest
size: below 1, Transfusion needs less compute.
"""

from collections.abc import Iterable

import numpy as np
from scipy.stats import linregress  # type: ignore[import-untyped]  # scipy has no annotations

Points = dict[
    str, list[tuple[float, float]]
]  # by size, from the smallest to the largest: FLOPs and metric of each seed


def fit(points: Points) -> tuple[float, float, float]:
    """
    Intercept, slope, and the standard error of the slope. NaN if a metric is 0, which has no logarithm, or if there
    are fewer than three runs or two sizes.
    """
    flops, values = np.array([point for runs in points.values() for point in runs]).T
    if len(points) < 2 or len(flops) < 3 or min(values) <= 0:
        return np.nan, np.nan, np.nan
    line = linregress(np.log(flops), np.log(values))
    return line.intercept, line.slope, line.stderr


def parity_ratio(points: Points, other: Points, sign: int) -> float:
    """
    FLOPs at which the line of `points` meets the mean of `other` at its largest size, divided by the FLOPs that
    `other` had. `sign` is 1 for a metric where more is better, −1 for less. NaN if the line does not improve with
    compute, or does not exist.
    """
    intercept, slope, _ = fit(points)
    flops, values = np.array([*other.values()][-1]).T
    if not sign * slope > 0 or min(values) <= 0:
        return np.nan
    return float(np.exp((np.log(values).mean() - intercept) / slope - np.log(flops).mean()))


def interval(points: Points, other: Points, sign: int, num_draws: int = 2000) -> tuple[float, float, float]:
    """
    The 2.5th and 97.5th percentile of the ratio when the seeds of each size are drawn again with replacement, and the
    share of draws without a ratio.
    """
    rng = np.random.default_rng(0)

    def drawn(points: Points) -> Points:
        return {size: [runs[i] for i in rng.integers(len(runs), size=len(runs))] for size, runs in points.items()}

    ratios = np.array([parity_ratio(drawn(points), drawn(other), sign) for _ in range(num_draws)])
    found = ratios[np.isfinite(ratios)]
    if not len(found):
        return np.nan, np.nan, 1.0
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high), 1 - len(found) / num_draws


def row(points: Points, other: Points, sign: int) -> Iterable[str]:
    """Cells of a table: slopes with their standard error, and the ratio with its interval."""
    for each in (points, other):
        _, slope, error = fit(each)
        yield f"{slope:.3f} ± {error:.3f}" if np.isfinite(slope) else "no fit"
    ratio = parity_ratio(points, other, sign)
    low, high, missing = interval(points, other, sign)
    text = f"{ratio:.3g} ({low:.3g}–{high:.3g})" if np.isfinite(ratio) else "none: more compute does not help"
    yield text + (f", none in {missing:.0%} of draws" if missing and np.isfinite(ratio) else "")


def plot(axis, points: dict[str, Points]) -> None:
    """Runs and lines, by family, on log-log axes."""
    for i, (family, sizes) in enumerate(points.items()):
        flops, values = np.array([point for runs in sizes.values() for point in runs]).T
        axis.plot(flops, values, f"C{i}o", ms=4, label=family)
        intercept, slope, _ = fit(sizes)
        if np.isfinite(slope):
            ends = np.array([min(flops), max(flops)])
            axis.plot(ends, np.exp(intercept + slope * np.log(ends)), f"C{i}-", lw=1)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs (6·N·D)")
