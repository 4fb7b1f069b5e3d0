"""Advice on workers: how busy a service is, how many workers it needs, and whether more would help.  Pure.

What is known of arrivals, service times and backlog goes in; a verdict with its numbers comes out.  Under
`LEAST` messages nothing is said.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

LEAST = 30
"""Messages below which nothing is said."""
BUSY = 0.7
"""The share of the time that workers should be busy at most."""
RELAXED = 0.6
"""The share that they may be busy after one is taken away."""
FAILING = 0.05
"""The share of failures that is to be mended first."""
SHARED = 0.7
"""How much of a rise in concurrency must show in the service time to call it shared."""


class Sample(NamedTuple):
    """One message: when it was sent (None: nobody knows), when its handler began, seconds that it took."""

    sent: float | None
    began: float
    took: float
    failed: bool = False


class Wish(NamedTuple):
    """What is wanted.  latency: seconds that a message may wait.  catch_up: seconds for the backlog."""

    latency: float = 1.0
    catch_up: float = 300.0
    most: int = 1000


class Advice(NamedTuple):
    """The verdict in one sentence, and the numbers.  Rates a second, times in seconds."""

    verdict: str
    why: str
    messages: int
    window: float
    arrivals: float
    arrivals_cv: float
    service_time: float
    service_cv: float
    workers: int
    utilisation: float
    backlog: int
    expected_wait: float
    steady: int
    catching_up: int
    for_latency: int
    recommended: int


def advise(
    samples: Sequence[Sample],
    *,
    workers: int,
    backlog: int = 0,
    wish: Wish | None = None,
    past: Sequence[Sample] = (),
) -> Advice | None:
    """What to do with ``workers`` handlers in parallel, over all replicas; None if too little is known.

    past: of a longer time.  While all workers are busy ``samples`` do not tell what fewer would take.
    """
    wish = wish or Wish()
    if len(samples) < LEAST:
        return None
    times = [sample.took for sample in samples]
    service = statistics.fmean(times)
    window = _window(samples)
    rate, gaps_cv = arrivals(samples)
    if service <= 0 or rate <= 0:
        return None
    service_cv = statistics.pstdev(times) / service
    spread = (gaps_cv**2 + service_cv**2) / 2
    load = rate * service
    steady = max(1, math.ceil(load / BUSY - 1e-9))
    catching_up = max(1, math.ceil((rate + backlog / wish.catch_up) * service - 1e-9))
    for_latency = _for_latency(rate, service, spread, wish)
    wanted = min(wish.most, max(steady, catching_up, for_latency))
    wait = waiting(rate, service, workers, spread)
    share = shared(samples)
    if share is None:
        share = shared(past)
    verdict, why, recommended = _verdict(samples, share, workers, wanted, load, backlog, wish)
    return Advice(
        verdict,
        why,
        len(samples),
        window,
        rate,
        gaps_cv,
        service,
        service_cv,
        workers,
        load / workers,
        backlog,
        wait,
        steady,
        catching_up,
        for_latency,
        recommended,
    )


def _verdict(
    samples: Sequence[Sample],
    share: float | None,
    workers: int,
    wanted: int,
    load: float,
    backlog: int,
    wish: Wish,
) -> tuple[str, str, int]:
    bad = sum(sample.failed for sample in samples) / len(samples)
    busy = f"{load:.2f} of {workers} workers are busy on the average ({load / workers:.0%})"
    if bad > FAILING:
        return "mend first", f"{bad:.0%} of the runs fail, and each comes again; {busy}", workers
    if wanted > workers and share is not None and share >= SHARED:
        grows = (
            f"a handler takes longer the more run beside it ({share:.0%} of what one shared lock would do)"
        )
        return "more workers will not help", f"{grows}: mend what they wait for; {busy}", workers
    if wanted > workers:
        behind = f", and {backlog} wait" if backlog else ""
        limit = f"; {wish.most} is the most" if wanted == wish.most else ""
        unsure = ""
        if share is None and workers > 1:
            unsure = "; all were busy, so nobody can tell whether they wait for each other: add one first"
        return f"add {wanted - workers}", f"{busy}{behind}; {wanted} are needed{limit}{unsure}", wanted
    fewer = max(wanted, math.ceil(load / RELAXED - 1e-9), 1)
    if fewer < workers and not backlog:
        return f"remove {workers - fewer}", f"{busy}; {fewer} are enough", fewer
    return "enough", busy, workers


def _window(samples: Sequence[Sample]) -> float:
    return max(each.began + each.took for each in samples) - min(each.began for each in samples)


def arrivals(samples: Sequence[Sample]) -> tuple[float, float]:
    """Messages a second, and the coefficient of variation of the gaps between them.

    By when they were sent, which a backlog does not change; if nobody knows that, by when they began.
    """
    known = [each.sent for each in samples if each.sent is not None]
    times = sorted(known if len(known) == len(samples) else [each.began for each in samples])
    gaps = [after - before for before, after in pairwise(times)]
    mean = statistics.fmean(gaps)
    if mean <= 0:
        return 0.0, 0.0
    return 1 / mean, statistics.pstdev(gaps) / mean


def waiting(rate: float, service: float, workers: int, spread: float = 1.0) -> float:
    """Seconds that a message waits on the average: Erlang's C, times the spread of gaps and services.

    Infinite where the workers do not keep up.
    """
    load = rate * service
    if load >= workers:
        return math.inf
    # Erlang's B by its recursion, which no number is too large for.
    blocked = 1.0
    for n in range(1, workers + 1):
        blocked = load * blocked / (n + load * blocked)
    waits = blocked / (1 - (load / workers) * (1 - blocked))
    return waits * service / (workers - load) * spread


def _for_latency(rate: float, service: float, spread: float, wish: Wish) -> int:
    """The fewest workers with which a message waits no longer than wished."""
    n = max(1, math.floor(rate * service) + 1)
    while n < wish.most and waiting(rate, service, n, spread) > wish.latency:
        n += 1
    return n


def shared(samples: Sequence[Sample]) -> float | None:
    """How much longer a handler takes with more beside it: 0 not at all, 1 as if they took turns.

    The power of the concurrency that the mean service time follows; None where concurrency hardly varies.
    """
    if len(samples) < LEAST:
        return None
    points = [
        (math.log(beside), sample.took)
        for sample, beside in zip(samples, concurrency(samples), strict=True)
        if sample.took > 0
    ]
    if len(points) < LEAST or len({round(x, 3) for x, _ in points}) < 2:
        return None
    xs = [x for x, _ in points]
    if max(xs) - min(xs) < math.log(2) - 1e-9 or statistics.pvariance(xs) < 0.02:
        return None
    return _power(points)


def _power(points: Sequence[tuple[float, float]]) -> float:
    """The b of E[y] = exp(a + b x), between -4 and 4, by Poisson's likelihood.

    Not the slope of log y: with an unfair lock, as Python's is, most take it at once and few wait very long,
    and the mean of the logarithms tells of the most (Santos Silva and Tenreyro, The Log of Gravity, 2006).
    """
    wanted = sum(x * y for x, y in points) / sum(y for _, y in points)
    low, high = -4.0, 4.0
    while high - low > 1e-3:
        power = (low + high) / 2
        weights = [math.exp(power * x) for x, _ in points]
        # Where the likelihood is greatest, both weigh x alike; this side of it only grows with the power.
        if sum(x * weight for (x, _), weight in zip(points, weights, strict=True)) < wanted * sum(weights):
            low = power
        else:
            high = power
    return (low + high) / 2


def concurrency(samples: Sequence[Sample]) -> list[float]:
    """Of each: how many ran while it did, itself included, on the average over its time."""
    edges = sorted([(each.began, 1) for each in samples] + [(each.began + each.took, -1) for each in samples])
    moments: list[float] = []
    areas: list[float] = []  # of handlers times seconds, up to each moment
    area, running, last = 0.0, 0, edges[0][0]
    for at, step in edges:
        area += running * (at - last)
        running += step
        last = at
        moments.append(at)
        areas.append(area)
    place = dict(zip(moments, areas, strict=True))
    return [
        max(1.0, (place[each.began + each.took] - place[each.began]) / each.took) if each.took > 0 else 1.0
        for each in samples
    ]
