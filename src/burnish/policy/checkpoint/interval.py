"""How often to save: often enough to lose little, seldom enough to cost little.

A run that fails every M seconds on average, and whose saves cost C seconds, loses C / T of its time to saves that are T
seconds apart, and (T / 2 + R) / M to failures: half an interval of work, and a restart of R. The sum is least at

    T = sqrt(2 C M)

J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; J. T. Daly, "A higher
order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006, whose T is M where C exceeds
M / 2. It must not know who saves what.
"""

from __future__ import annotations

import math

LONGEST_SECONDS = 3600.0
"""A save an hour costs 0.1 % of the time where it takes 4 seconds; a person who loses more than an hour minds."""
LEAST_COST = 0.01
"""Saves that cost less than this share of the time are not made rarer than `LONGEST_SECONDS`."""
DEVICE_HOURS = 50_000.0
"""Mean time between failures of one device. Llama 3 405B (arXiv:2407.21783, section 3.3.4) met 419 unexpected
interruptions in 54 days on 16,384 GPUs: one in 54 * 24 * 16,384 / 419 = 50,676 device-hours."""


def save_interval_seconds(save_seconds: float, mean_seconds_between_failures: float) -> float:
    """T of the module's docstring, and no longer than an hour where saving every hour costs less than 1 %.

    Args:
        save_seconds: of one save, from its begin to its commit. Saves run beside training, so this is the most that one
            can cost; and they are never closer than that, since one is in flight at a time.
    """
    assert save_seconds >= 0 and mean_seconds_between_failures > 0
    first_order = math.sqrt(2 * save_seconds * mean_seconds_between_failures)
    best = min(first_order, mean_seconds_between_failures)
    return max(min(best, max(LONGEST_SECONDS, save_seconds / LEAST_COST)), save_seconds)


def save_interval_steps(save_seconds: float, step_seconds: float, mean_seconds_between_failures: float) -> int:
    """The same in steps, at least 1.

    >>> save_interval_steps(60, 10, 3.1 * 3600)         # sqrt(2 * 60 * 11,160) = 1,157 seconds
    116
    """
    assert step_seconds > 0
    return max(1, math.ceil(save_interval_seconds(save_seconds, mean_seconds_between_failures) / step_seconds))


def time_lost(
    interval_seconds: float, save_seconds: float, restart_seconds: float, mean_seconds_between_failures: float
) -> float:
    """Share of a run's time that saves, repeated work and restarts take; 1 where nothing is left."""
    at_a_failure = interval_seconds / 2 + restart_seconds
    return min(1.0, save_seconds / interval_seconds + at_a_failure / mean_seconds_between_failures)
