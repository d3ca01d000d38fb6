"""
How metrics change with compute, and the parity FLOP ratio (§4.2, Figure 5 and Table 3 of arXiv 2408.11039).

Each family's runs of several sizes are fitted by a line, log(metric) = intercept + slope · log(FLOPs). The parity FLOP
ratio is the share of the other model's FLOPs with which Transfusion reaches the other model's result at its largest
size: below 1, Transfusion needs less compute.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.stats import linregress  # type: ignore[import-untyped]  # scipy has no annotations

Points = dict[
    str, list[tuple[float, float]]
]  # by size, from the smallest to the largest: FLOPs and metric of each seed


def fit(points: Points) -> tuple[float, float, float]:
    """
    Intercept, slope, and the standard error of the slope. NaN if a metric is 0, which has no logarithm, or if there
    are fewer than three runs or two sizes.
    """
    runs = np.array([point for runs in points.values() for point in runs]).reshape(-1, 2)
    if sum(map(bool, points.values())) < 2 or len(runs) < 3 or runs.min() <= 0:
        return np.nan, np.nan, np.nan
    line = linregress(*np.log(runs).T)
    return line.intercept, line.slope, line.stderr


def parity_ratio(points: Points, other: Points, sign: int) -> float:
    """
    FLOPs at which the line of `points` meets the mean of `other` at its largest size, divided by the FLOPs that
    `other` had. `sign` is 1 for a metric where more is better, −1 for less. NaN if the line does not exist or does not
    improve with compute, or if `other` has no run of the largest size.
    """
    intercept, slope, _ = fit(points)
    largest = np.array([*other.values()][-1]).reshape(-1, 2)
    if not sign * slope > 0 or not len(largest) or largest.min() <= 0:
        return np.nan
    flops, value = np.log(largest).mean(axis=0)
    return float(np.exp((value - intercept) / slope - flops))


def interval(points: Points, other: Points, sign: int, num_draws: int = 2000) -> tuple[float, float, float]:
    """
    The 2.5th and 97.5th percentile of the ratio when the seeds of each size are drawn again with replacement, and the
    share of draws without a ratio. With few seeds it is too narrow, and it leaves out how well a line fits.
    """
    rng = np.random.default_rng(0)

    def drawn(points: Points) -> Points:
        return {
            size: [runs[i] for i in rng.integers(len(runs), size=len(runs))] for size, runs in points.items() if runs
        }

    ratios = np.array([parity_ratio(drawn(points), drawn(other), sign) for _ in range(num_draws)])
    found = ratios[np.isfinite(ratios)]
    if not len(found):
        return np.nan, np.nan, 1.0
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high), 1 - len(found) / num_draws


def row(points: Points, other: Points, sign: int) -> Iterator[str]:
    """Cells of a table: slopes with their standard error, and the ratio with its range or the reason for none."""
    for each in (points, other):
        _, slope, error = fit(each)
        yield f"{slope:.3f} ± {error:.3f}" if np.isfinite(slope) else "no fit"
    ratio = parity_ratio(points, other, sign)
    if np.isfinite(ratio):
        low, high, missing = interval(points, other, sign)
        flops = [flops for runs in points.values() for flops, _ in runs]
        target = ratio * np.mean([flops for flops, _ in [*other.values()][-1]])
        text = "" if min(flops) <= target <= max(flops) else ", extrapolated"
        yield f"{ratio:.3g} ({low:.3g}–{high:.3g}{text})" + (f", none in {missing:.0%} of draws" if missing else "")
    elif not [*other.values()][-1]:
        yield "none: all runs of the largest size diverged"
    else:
        has_fit = np.isfinite(fit(points)[1])
        yield "none: more compute does not help" if has_fit else "none: no line"


def plot(axis: Any, points: dict[str, Points]) -> None:
    """Runs and lines, by family, on log-log axes."""
    for i, (family, sizes) in enumerate(points.items()):
        runs = np.array([point for runs in sizes.values() for point in runs]).reshape(-1, 2)
        axis.plot(*runs.T, f"C{i}o", ms=4, label=family)
        intercept, slope, _ = fit(sizes)
        if np.isfinite(slope):
            ends = np.array([runs[:, 0].min(), runs[:, 0].max()])
            axis.plot(ends, np.exp(intercept + slope * np.log(ends)), f"C{i}-", lw=1)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs (6·N·D)")
    # Within a decade or two, labels of all minor ticks would overlap.
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter("{x:.0e}")
    axis.xaxis.set_minor_formatter(NullFormatter())
