"""The multiple-choice knapsack, nearly exact: one option for each item under one budget."""

import heapq
from collections.abc import Sequence


def allocate(
    sizes: Sequence[Sequence[float]], damages: Sequence[Sequence[float]], budget: float
) -> list[int] | None:
    """For each item the index of its option: sizes sum to at most ``budget``, with little damage.

    sizes and damages: of every option of every item. Each item begins at its smallest option. Then
    the step that saves most damage for its size is taken, again and again, if it still fits. Steps
    go along the lower convex hull of an item's options. So the result is optimal for the size that
    it uses, and less than the smallest step stays unused. None: even the smallest options do not
    fit.
    """
    hulls = [_hull(*item) for item in zip(sizes, damages, strict=True)]
    at = [0] * len(hulls)
    left = budget - sum(sizes[i][hull[0]] for i, hull in enumerate(hulls))
    if left < 0:
        return None
    steps: list[tuple[float, int]] = []

    def offer(i: int) -> None:
        hull = hulls[i]
        if at[i] + 1 < len(hull):
            here, there = hull[at[i]], hull[at[i] + 1]
            slope = (damages[i][here] - damages[i][there]) / (sizes[i][there] - sizes[i][here])
            heapq.heappush(steps, (-slope, i))

    for i in range(len(hulls)):
        offer(i)
    while steps:
        _, i = heapq.heappop(steps)
        cost = sizes[i][hulls[i][at[i] + 1]] - sizes[i][hulls[i][at[i]]]
        if cost <= left:  # else this item stays; cheaper steps of others may still fit
            left -= cost
            at[i] += 1
            offer(i)
    return [hull[at[i]] for i, hull in enumerate(hulls)]


def _hull(sizes: Sequence[float], damages: Sequence[float]) -> list[int]:
    """Options on the lower convex hull of (size, damage), by growing size and falling damage."""
    hull: list[int] = []
    for option in sorted(range(len(sizes)), key=lambda k: (sizes[k], damages[k])):
        if hull and damages[option] >= damages[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(sizes, damages, hull[-2], hull[-1]) >= _slope(
            sizes, damages, hull[-2], option
        ):
            hull.pop()
        hull.append(option)
    return hull


def _slope(sizes: Sequence[float], damages: Sequence[float], a: int, b: int) -> float:
    return (damages[b] - damages[a]) / (sizes[b] - sizes[a])
