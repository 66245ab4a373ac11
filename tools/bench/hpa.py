"""The HorizontalPodAutoscaler's published algorithm: replicas wanted by metrics, held and slowed down by its behaviour.

Kubernetes' documentation, "Horizontal Pod Autoscaling" (algorithm details, configurable scaling behaviour), and its
controller's replica calculator. KEDA hands its metrics to the same controller, as external ones.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

TOLERANCE = 0.1
"""Changes of less are ignored (--horizontal-pod-autoscaler-tolerance)."""
SYNC = 15.0
"""Seconds between two decisions (--horizontal-pod-autoscaler-sync-period)."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """At most so many pods, or per cent of the pods, in a period of seconds."""

    type: str
    value: int
    period: float


@dataclasses.dataclass(frozen=True)
class Direction:
    """`behavior.scaleUp` or `behavior.scaleDown`."""

    stabilization: float
    policies: tuple[Policy, ...]

    @classmethod
    def of(cls, manifest: Mapping) -> "Direction":
        """From a manifest's mapping."""
        policies = tuple(Policy(p["type"], p["value"], p["periodSeconds"]) for p in manifest["policies"])
        return cls(manifest["stabilizationWindowSeconds"], policies)


DEFAULT_UP = Direction(0, (Policy("Percent", 100, 15), Policy("Pods", 4, 15)))
DEFAULT_DOWN = Direction(300, (Policy("Percent", 100, 15),))


def of_pods(values: Sequence[float], starting: int, target: float, replicas: int) -> int:
    """Replicas that a metric of type Pods wants.

    Args:
        values: of the pods that have the metric.
        starting: pods without it. They count as idle when more pods are wanted, and as busy when fewer are.
        target: for the average pod.
        replicas: now.
    """
    if not values:
        return replicas
    ratio = sum(values) / len(values) / target
    if not starting:
        return replicas if abs(1 - ratio) <= TOLERANCE else math.ceil(ratio * len(values))
    pods = len(values) + starting
    new_ratio = (sum(values) + (starting * target if ratio < 1 else 0)) / pods / target
    turned = (ratio < 1 < new_ratio) or (new_ratio < 1 < ratio)
    return replicas if abs(1 - new_ratio) <= TOLERANCE or turned else math.ceil(new_ratio * pods)


def external(total: float, target: float, replicas: int) -> int:
    """Replicas that an external metric with a target for the average pod wants; it knows of no pods that start."""
    if replicas and abs(1 - total / (target * replicas)) <= TOLERANCE:
        return replicas
    return math.ceil(total / target)


class Controller:
    """The controller of one Deployment, with what it remembers."""

    def __init__(self, minimum: int, maximum: int, up: Direction = DEFAULT_UP, down: Direction = DEFAULT_DOWN):
        self._minimum, self._maximum, self._up, self._down = minimum, maximum, up, down
        self._wanted: list[tuple[float, int]] = []
        self._changes: list[tuple[float, int]] = []

    def decide(self, now: float, replicas: int, wanted: int) -> int:
        """The replicas to have from now on, if metrics want so many."""
        stable = self._stabilize(now, replicas, wanted)
        if stable > replicas:
            limit = max(replicas, max(self._limit(now, replicas, p, 1) for p in self._up.policies))
            decided = min(stable, limit, self._maximum)
        elif stable < replicas:
            limit = min(replicas, min(self._limit(now, replicas, p, -1) for p in self._down.policies))
            decided = max(stable, limit, self._minimum)
        else:
            decided = min(max(stable, self._minimum), self._maximum)
        if decided != replicas:
            self._changes.append((now, decided - replicas))
        return decided

    def _stabilize(self, now: float, replicas: int, wanted: int) -> int:
        """The least that was wanted in the window of scaling up; the most in that of scaling down."""
        longest = max(self._up.stabilization, self._down.stabilization)
        self._wanted = [(at, n) for at, n in self._wanted if now - at < longest]
        up = min([wanted, *(n for at, n in self._wanted if now - at < self._up.stabilization)])
        down = max([wanted, *(n for at, n in self._wanted if now - at < self._down.stabilization)])
        self._wanted.append((now, wanted))
        return min(max(replicas, up), down)

    def _limit(self, now: float, replicas: int, policy: Policy, sign: int) -> int:
        """The replicas that a policy allows, counted from those at the start of its period."""
        start = replicas - sum(change for at, change in self._changes if now - at < policy.period)
        if policy.type == "Pods":
            return start + sign * policy.value
        return math.ceil(start * (1 + policy.value / 100)) if sign > 0 else math.floor(start * (1 - policy.value / 100))
