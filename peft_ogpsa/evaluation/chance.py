# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""How likely chance alone makes a difference at least as large: two-sided p-values, and a test of many at once."""

import math
from collections.abc import Sequence

_ERROR = 0.05  # the probability of a wrong mark among all differences


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the p-value of McNemar's exact test for two rates on the same prompts.

    If both rates are equal, a prompt on which the outcomes differ is as likely to be one kind as the other.

    Args:
        only_first: Number of prompts where only the first outcome is true.
        only_second: Number of prompts where only the second outcome is true.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.exp(_log_choose(n, k) - n * math.log(2)) for k in range(fewer + 1)))


def fisher(first: tuple[int, int], second: tuple[int, int]) -> float:
    """Return the p-value of Fisher's exact test for rates of independent samples: twice the smaller tail.

    Args:
        first: How often the event happened, and how often it could have happened.
        second: The same for the second rate.
    """
    (k_1, n_1), (k_2, n_2) = first, second
    events = k_1 + k_2
    every = _log_choose(n_1 + n_2, events)
    possible = range(max(0, events - n_2), min(n_1, events) + 1)
    weights = {k: math.exp(_log_choose(n_1, k) + _log_choose(n_2, events - k) - every) for k in possible}
    tails = [sum(w for k, w in weights.items() if k <= k_1), sum(w for k, w in weights.items() if k >= k_1)]
    return min(1.0, 2 * min(tails))


def student(ratio: float, freedom: int) -> float:
    """Return the p-value of Student's test, from the finite series of Abramowitz and Stegun 26.7.3 and 26.7.4.

    Args:
        ratio: The mean divided by its standard error. If it is not a number, the p-value is 1.
        freedom: Degrees of freedom. Without any, the spread is unknown and the p-value is 1.
    """
    if math.isnan(ratio) or freedom < 1:
        return 1.0
    angle = math.atan(abs(ratio) / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1 + odd, freedom, 2):  # the factors are 2/3, 4/5, ... or 1/2, 3/4, ...
        total += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    within = (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total
    return max(0.0, 1 - within)


def holm(p_values: Sequence[float]) -> list[bool]:
    """Decide which of many differences are larger than chance, by Holm's step-down method (1979).

    If chance alone makes some of the differences, the probability that one of those is marked is at most 5 %,
    whether or not the differences depend on each other.

    Args:
        p_values: One for each difference.

    Returns:
        One mark for each difference.
    """
    marks = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > _ERROR / (len(p_values) - rank):
            break
        marks[index] = True
    return marks


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
