"""Interleaved rounds of sxe, its peers and the floor; and what the machine does at best."""

import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sxe
from sxe._backend import backend_of
from sxe._rows.cpu import rows_per_block
from sxe._tools.bench.contestants import (
    Contestant,
    contestants,
    floor,
    head_plan,
    installed,
    why,
)
from sxe._tools.bench.problem import TOLERANCES, Outcome, Problem, errors, truth


def shortest(backend: str) -> float:
    """The seconds that are timed at once, by repeating a call that is shorter.

    A call to an accelerator has to be sent there, and the last one's end comes back late.
    """
    return 2e-3 if backend == "cpu" else 5e-2


def products_in(dtype: str) -> Any:
    """Where all contestants multiply float32 as float32, or as the caller of JAX has chosen.

    sxe does so by itself. With JAX's default, others would on a GPU multiply in TF32.
    """
    chosen = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009
    return jax.default_matmul_precision(chosen or ("highest" if dtype == "float32" else None))


class Timing(NamedTuple):
    """One contestant on one problem.

    Attributes:
      seconds: of a call, in each round.
      temporary_bytes, compile_seconds: of its program, None where that is not known.
      loss_error, gradient_error: against float64; the first relative, the second over the largest
        component.
      wrong: whether an error is larger than its dtype can explain.
      failed: why there are no times, or None.
    """

    name: str
    seconds: tuple[float, ...]
    temporary_bytes: int | None = None
    compile_seconds: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    wrong: bool = False
    failed: str | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def over(self, other: "Timing") -> tuple[float, float, float]:
        """The ratio of the medians, and the quartiles of the ratios of single rounds."""
        ratios = np.array(self.seconds) / np.array(other.seconds)
        low, high = np.percentile(ratios, [25, 75])
        return self.median / other.median, float(low), float(high)


class Measurement(NamedTuple):
    """All contestants on one problem. ``floor`` is among them; sxe is the first.

    Attributes:
      gradient: value and gradient were measured, not the value alone.
      path: what sxe did.
    """

    problem: Problem
    gradient: bool
    path: str
    timings: tuple[Timing, ...]

    @property
    def name(self) -> str:
        return f"{self.problem.name}, {'value and gradient' if self.gradient else 'value'}"


class Machine(NamedTuple):
    """Where it ran, and what that machine does at best.

    Attributes:
      float32_products: in what float32 is multiplied, by all contestants.
      copy: bytes per second, read and written, of a copy of 1 GiB (256 MiB on a CPU).
      matmul: FLOPs per second of a product of two 8192 x 8192 matrices (2048 on a CPU), by dtype.
    """

    device: str
    devices: int
    cores: int
    float32_products: str
    versions: dict[str, str]
    copy: float
    matmul: dict[str, float]


def measure(
    problem: Problem,
    peers: tuple[str, ...],
    *,
    gradient: bool,
    rounds: int,
    seconds: float,
    on_round: Callable[[], object] = lambda: None,
) -> Measurement:
    """Interleaved rounds of all contestants: so many, or 3 and more for that many seconds."""
    dtype = jnp.dtype(problem.dtype)
    data = problem.data()
    arguments = [jnp.asarray(x, x.dtype if x.dtype == np.int32 else dtype) for x in data]
    true = truth(problem, *(np.asarray(x) for x in arguments))
    with ExitStack() as stack:
        with products_in(problem.dtype):
            runners, failed = contestants(problem, gradient, peers, stack, *arguments)
            bound, times = floor(problem, gradient, *arguments)
        judged = {}
        for runner in runners:
            try:
                judged[runner.name] = _judge(problem, runner.outcome(problem, data[-1]), true)
            except Exception as error:
                if runner.name == "sxe":
                    raise
                failed[runner.name] = why(error)
        runners = [r for r in runners if r.name in judged]
        everyone = [(r, 1) for r in runners] + [(bound, times)]
        least = shortest(jax.default_backend())
        repeats = [max(1, math.ceil(least / r.seconds())) for r, _ in everyone]
        taken: list[list[float]] = [[] for _ in everyone]
        start = time.perf_counter()
        for i in range(rounds):
            if i >= 3 and time.perf_counter() - start > seconds:
                break
            for (runner, factor), n, list_ in zip(everyone, repeats, taken, strict=True):
                list_.append(runner.seconds(n) * factor)
            on_round()
    timings = [
        Timing(r.name, tuple(t), r.temporary_bytes, r.compile_seconds, *judged.get(r.name, ()))
        for (r, _), t in zip(everyone, taken, strict=True)
    ]
    timings += [Timing(name, (), failed=text) for name, text in failed.items()]
    return Measurement(problem, gradient, _path(problem, gradient, arguments), tuple(timings))


def _judge(problem: Problem, outcome: Outcome, true: Outcome) -> tuple[float, float | None, bool]:
    of_loss, of_gradient = errors(outcome, true)
    bounds = TOLERANCES[problem.dtype]
    right = of_loss <= bounds[0] and (of_gradient is None or of_gradient <= bounds[1])
    return of_loss, of_gradient, not right


def _path(problem: Problem, gradient: bool, arguments: list[Any]) -> str:
    if problem.hidden is not None:
        plan = head_plan(problem, gradient)
        return (
            f"{plan.path}, {plan.chunks} chunk{'s' * (plan.chunks > 1)} of {plan.chunk_size} rows"
        )
    rows = rows_per_block(arguments[0].shape, backend_of(arguments[0]))
    return "all rows at once" if 2 * rows > problem.rows else f"blocks of {rows} rows"


def machine() -> Machine:
    backend, device = jax.default_backend(), jax.devices()[0]

    def best(f: Callable[..., Any], *arguments: Any) -> float:
        contestant = Contestant("", f, *arguments)
        repeats = max(1, math.ceil(shortest(backend) / contestant.seconds()))
        return min(contestant.seconds(repeats) for _ in range(5))

    x = jnp.ones((2**26 if backend == "cpu" else 2**28,), jnp.float32)
    copy = 2 * x.nbytes / best(lambda x: x + 1, x)
    n = 2048 if backend == "cpu" else 8192
    rates = {}
    for dtype in ("float32", "bfloat16"):
        a = jax.random.normal(jax.random.key(0), (n, n), dtype)
        with products_in(dtype):
            rates[dtype] = 2 * n**3 / best(jnp.matmul, a, a)
    precision = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009
    return Machine(
        device=f"{device.platform} {device.device_kind}".strip(),
        devices=jax.device_count(),
        cores=os.cpu_count() or 1,
        float32_products=str(precision or "float32"),
        versions={"jax": jax.__version__, **installed()},
        copy=copy,
        matmul=rates,
    )


class Calls(NamedTuple):
    """Seconds of a call on [8, 10] logits, by library, in each round."""

    eager: bool
    gradient: bool
    seconds: dict[str, tuple[float, ...]]


def calls(rounds: int, confident: float) -> Iterable[Calls]:
    """What calling costs, where there is nothing to compute: eager, and jitted."""
    problem = Problem(8, 10, confident=confident)
    logits, labels = (jnp.asarray(x) for x in problem.data())

    def optax_loss(logits: Any, labels: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    losses: dict[str, Any] = {"sxe": sxe.softmax_cross_entropy, "optax": optax_loss}
    for eager in (True, False):
        for gradient in (False, True):
            functions = losses
            if gradient:
                functions = {name: jax.value_and_grad(f) for name, f in losses.items()}
            if not eager:
                functions = {name: jax.jit(f) for name, f in functions.items()}
            taken: dict[str, list[float]] = {name: [] for name in functions}
            for i in range(rounds + 1):
                for name, f in functions.items():
                    start = time.perf_counter()
                    for _ in range(50):
                        jax.block_until_ready(f(logits, labels))
                    if i:  # the first one compiles
                        taken[name].append((time.perf_counter() - start) / 50)
            yield Calls(eager, gradient, {name: tuple(t) for name, t in taken.items()})
