"""Interleaved rounds of sxe, its peers and the floor; and the best rates of the machine."""

import math
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sxe
from sxe._backend import backend_of
from sxe._rows.blocks import rows_per_block
from sxe._tools.bench.contestants import (
    ALL_ROWS,
    TORCH_PEERS,
    Contestant,
    Products,
    Torch,
    contestants,
    floor,
    head_plan,
    installed,
    torch_contestants,
    torch_process,
    why,
)
from sxe._tools.bench.problem import TOLERANCES, Array, Outcome, Problem, errors, truth

SLICE = 2**28  # numbers sent to the device at once
CPU_SIZES = 2**26, 2048  # of a measured machine: numbers in the copy, rows of the matrices
ACCELERATOR_SIZES = 2**28, 8192
CALLS = 50  # calls that are timed together to measure the overhead of one


def shortest(backend: str) -> float:
    """The shortest time that is measured, in seconds. A shorter call is repeated.

    On an accelerator, sending a call and learning of its end take time as well.
    """
    return 2e-3 if backend == "cpu" else 5e-2


def products_in(dtype: str) -> Any:
    """A context in which all libraries multiply float32 as float32, or as configured in JAX.

    sxe always does so. The others would use TF32 on a GPU, which is JAX's default.
    """
    chosen = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009
    return jax.default_matmul_precision(chosen or ("highest" if dtype == "float32" else None))


class Timing(NamedTuple):
    """The measurement of one contestant, i.e. one timed program, on one problem.

    Attributes:
      seconds: the time of a call, in each round.
      temporary_bytes, compile_seconds: those of its program, or None where they are not known.
      loss_error, gradient_error: errors against float64. The first is relative, the second is
        divided by the largest component.
      wrong: whether an error is larger than the dtype can explain.
      failed: the error for which there are no times, or None.
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
        """The ratio of the medians, and the quartiles of the ratios of the rounds."""
        ratios = np.array(self.seconds) / np.array(other.seconds)
        low, high = np.percentile(ratios, [25, 75])
        return self.median / other.median, float(low), float(high)


class Measurement(NamedTuple):
    """All contestants on one problem. The first is sxe; the others include ``floor``.

    Attributes:
      gradient: whether value and gradient were measured, rather than only the value.
      path: how sxe computed.
    """

    problem: Problem
    gradient: bool
    path: str
    timings: tuple[Timing, ...]

    @property
    def name(self) -> str:
        return f"{self.problem.name}, {'value and gradient' if self.gradient else 'value'}"


class Machine(NamedTuple):
    """The machine, and its best rates.

    Attributes:
      float32_products: the precision in which all contestants multiply float32.
      copy: bytes read and written per second by a copy of 1 GiB (256 MiB on a CPU).
      matmul: FLOPs per second of a product of two 8192 x 8192 matrices (2048 on a CPU), by dtype.
      card: name, driver and memory of the GPU as told by nvidia-smi, or None without it.
    """

    device: str
    devices: int
    cores: int
    float32_products: str
    versions: dict[str, str]
    copy: float
    matmul: dict[str, float]
    card: str | None = None


def measure(
    problem: Problem,
    peers: Sequence[str],
    *,
    gradient: bool,
    rounds: int,
    seconds: float,
    chunk_sizes: Sequence[int] = (),
    on_round: Callable[[], object] = lambda: None,
    on_phase: Callable[[str], object] = lambda text: None,
) -> Measurement:
    """Measure all contestants in interleaved rounds.

    Args:
      problem: the problem.
      peers: the libraries that are measured in addition to sxe.
      gradient: whether to compute value and gradient, rather than only the value.
      rounds: the largest number of rounds.
      seconds: the time after which no round starts. The first three rounds always run.
      chunk_sizes: chunk sizes of the head. sxe is also measured with each of them.
      on_round: called after each round.
      on_phase: called with a short text at the end of each phase.
    """
    # The PyTorch libraries are measured only with the mean over all rows.
    of_torch = [name for name in TORCH_PEERS if name in peers and problem.counting == 1]
    failed: dict[str, str] = {}
    torch_names: list[str] = []
    with ExitStack() as stack:
        if of_torch:
            other = stack.enter_context(torch_process(problem, gradient=gradient, peers=of_torch))
        data = problem.data()
        on_phase("data drawn")
        arguments = [_on_device(x, problem.dtype) for x in data]
        labels = data[-1]
        del data
        true = _truth(problem, *arguments)
        on_phase("truth computed")
        if of_torch:
            try:
                torch_names = other.names()
            except RuntimeError as error:
                failed["torch"] = why(error)
            on_phase("PyTorch has the data")
        with products_in(problem.dtype):
            of_jax, failed_of_jax = contestants(
                problem,
                peers,
                *arguments,
                gradient=gradient,
                chunk_sizes=chunk_sizes,
                on_phase=on_phase,
            )
            bound, times = floor(problem, gradient, *arguments)
        on_phase("floor compiled")
        failed |= failed_of_jax
        runners: list[Contestant | Torch] = [*of_jax]
        if torch_names:
            prepared, failed_of_torch = torch_contestants(other, torch_names, on_phase)
            runners += prepared
            failed |= failed_of_torch
        everyone: list[tuple[Contestant | Torch | Products, float]]
        everyone = [*((r, 1) for r in runners), (bound, times)]
        judged: dict[str, tuple[float, float | None, bool]] = {}
        repeats: dict[str, int] = {}
        least = shortest(jax.default_backend())
        for each in runners:
            if each.name == ALL_ROWS:
                continue
            try:
                judged[each.name] = _judge(problem, each.outcome(problem, labels), true)
            except Exception as error:
                _fails(each.name, error, failed)
        for runner, _ in everyone:
            if runner.name in failed:
                continue
            try:
                repeats[runner.name] = max(1, math.ceil(least / runner.seconds()))
            except Exception as error:
                _fails(runner.name, error, failed)
        on_phase("results compared")
        taken: dict[str, list[float]] = {name: [] for name in repeats}
        start = time.perf_counter()
        for i in range(rounds):
            if i >= 3 and time.perf_counter() - start > seconds:
                break
            for runner, factor in everyone:
                if runner.name in failed:
                    continue
                try:
                    one = runner.seconds(repeats[runner.name])
                    taken[runner.name].append(one * factor)
                except Exception as error:
                    _fails(runner.name, error, failed)
            on_round()
        on_phase("rounds measured")
    timings = [
        Timing(
            r.name,
            tuple(taken[r.name]),
            r.temporary_bytes,
            r.compile_seconds,
            *judged.get(r.name, ()),
        )
        for r, _ in everyone
        if r.name not in failed
    ]
    timings += [Timing(name, (), failed=text) for name, text in failed.items()]
    return Measurement(problem, gradient, _path(problem, gradient, arguments), tuple(timings))


def _fails(name: str, error: Exception, failed: dict[str, str]) -> None:
    """Record the error, or raise it for sxe and the floor, which every comparison needs."""
    if name in ("sxe", "floor"):
        raise error
    failed[name] = why(error)


def _on_device(x: Array, dtype: str) -> Any:
    """x on the device in the given dtype. Integer arrays keep their dtype.

    The device converts slices of rows: it never holds all rows in float32, and NumPy would convert
    in only one thread.
    """
    if x.dtype == np.int32:
        return jnp.asarray(x)
    size = max(1, SLICE // x.shape[1])
    slices = [
        jax.block_until_ready(jnp.asarray(x[i : i + size]).astype(dtype))
        for i in range(0, len(x), size)
    ]
    return jnp.concatenate(slices) if len(slices) > 1 else slices[0]


def _truth(problem: Problem, *arguments: Any) -> Outcome:
    """The true result, computed by JAX on an accelerator, where NumPy would take minutes."""
    if jax.default_backend() == "cpu":
        return truth(problem, *(np.asarray(x) for x in arguments))
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        return truth(problem, *arguments, namespace=jnp, compiled=jax.jit)


def _judge(problem: Problem, outcome: Outcome, true: Outcome) -> tuple[float, float | None, bool]:
    of_loss, of_gradient = errors(outcome, true)
    bounds = TOLERANCES[problem.dtype]
    right = of_loss <= bounds[0] and (of_gradient is None or of_gradient <= bounds[1])
    return of_loss, of_gradient, not right


def _path(problem: Problem, gradient: bool, arguments: list[Any]) -> str:
    if problem.hidden is not None:
        plan = head_plan(problem, gradient)
        chunks = f"{plan.chunks} chunk{'s' * (plan.chunks > 1)} of {plan.chunk_size} rows"
        run = f", of which {plan.rows_run} rows are run" if problem.counting < 1 else ""
        return f"{plan.path}, {chunks}{run}"
    rows = rows_per_block(arguments[0].shape, backend_of(arguments[0]))
    return "all rows at once" if 2 * rows > problem.rows else f"blocks of {rows} rows"


def machine() -> Machine:
    backend, device = jax.default_backend(), jax.devices()[0]

    def best(f: Callable[..., Any], *arguments: Any) -> float:
        contestant = Contestant("", f, *arguments)
        repeats = max(1, math.ceil(shortest(backend) / contestant.seconds()))
        return min(contestant.seconds(repeats) for _ in range(5))

    copied, n = CPU_SIZES if backend == "cpu" else ACCELERATOR_SIZES
    x = jnp.ones(copied, jnp.float32)
    copy = 2 * x.nbytes / best(lambda x: x + 1, x)
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
        card=_card() if backend == "gpu" else None,
    )


def _card() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


class Calls(NamedTuple):
    """Seconds of one call on logits [8, 10] in each round, by library."""

    eager: bool
    gradient: bool
    seconds: dict[str, tuple[float, ...]]


def calls(rounds: int, confident: float) -> Iterable[Calls]:
    """The overhead of a call, eager and jitted, measured with almost nothing to compute."""
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
                    for _ in range(CALLS):
                        jax.block_until_ready(f(logits, labels))
                    if i:  # the first round compiles
                        taken[name].append((time.perf_counter() - start) / CALLS)
            yield Calls(eager, gradient, {name: tuple(t) for name, t in taken.items()})
