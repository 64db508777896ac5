"""The programs that are timed: sxe, other libraries (peers), and the floor, a lower bound."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sxe
from sxe._backend import backend_of
from sxe._tools.bench.problem import Array, Outcome, Problem

TORCH_PEERS = ("torch", "liger-kernel", "cut-cross-entropy")
ALL_ROWS = "sxe, all rows"  # its result differs, because all rows count
PEERS = ("optax", "tokamax", "jax-cce", *TORCH_PEERS)


def installed() -> dict[str, str]:
    """The version of each peer that is installed."""
    found = [name for name in PEERS if importlib.util.find_spec(name.replace("-", "_"))]
    return {name: importlib.metadata.version(name) for name in found}


class Contestant:
    """A jitted function, compiled for its arguments.

    Attributes:
      compile_seconds: the time of tracing and compiling.
      temporary_bytes: the temporary memory of the compiled program.
    """

    compile_seconds: float | None = None
    temporary_bytes: int | None = None

    def __init__(self, name: str, f: Callable[..., Any], *arguments: Any) -> None:
        self.name, self._arguments = name, arguments
        start = time.perf_counter()
        self._program = jax.jit(f).lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - start
        memory: Any = self._program.memory_analysis()
        self.temporary_bytes = memory.temp_size_in_bytes

    def result(self) -> Any:
        return jax.block_until_ready(self._program(*self._arguments))

    def seconds(self, repeats: int = 1) -> float:
        """The time of one call, as the mean over repeated calls.

        An accelerator runs the calls in order, and is kept busy. A CPU would run several calls at
        the same time, so each call is waited for.
        """
        one_by_one = jax.default_backend() == "cpu"
        start = time.perf_counter()
        for _ in range(repeats):
            result = self._program(*self._arguments)
            if one_by_one:
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / repeats

    def outcome(self, problem: Problem, labels: Array) -> Outcome:
        """The loss and the sampled gradients, if the function returns gradients."""
        result = self.result()
        loss, gradients = result if isinstance(result, tuple) else (result, ())
        rows, classes = problem.samples(labels)
        if self.name == "jax-cce":
            gradients = (*gradients[:1], *(d.T for d in gradients[1:]))
        at = [d[i] for d, i in zip(gradients, (rows, (slice(None), classes)), strict=False)]
        return Outcome(float(loss), tuple(np.asarray(d, np.float64) for d in at))


class Products:
    """Matrix products that are timed one after the other, each in its own program.

    In a single program on a GPU, they have taken twice as long. A product overwrites its previous
    result, so that no memory is allocated while it is timed.

    Attributes:
      compile_seconds: the time of compiling all programs.
      temporary_bytes: the largest temporary memory of a program.
    """

    def __init__(self, name: str, *products: tuple[Callable[[Any, Any], Any], Any, Any]) -> None:
        self.name = name
        self._operands = [operands for _, *operands in products]
        self._results = [jax.eval_shape(f, *operands) for f, *operands in products]
        start = time.perf_counter()
        self._programs = [
            jax.jit(partial(_overwritten, f), donate_argnums=0, keep_unused=True)
            .lower(result, *operands)
            .compile()
            for (f, *operands), result in zip(products, self._results, strict=True)
        ]
        self.compile_seconds = time.perf_counter() - start
        memories: list[Any] = [program.memory_analysis() for program in self._programs]
        self.temporary_bytes: int = max(memory.temp_size_in_bytes for memory in memories)

    def seconds(self, repeats: int = 1) -> float:
        """The time of all products together, each as the mean over repeated calls."""
        total = 0.0
        each = zip(self._programs, self._operands, self._results, strict=True)
        for program, operands, shape in each:
            result = jax.block_until_ready(jnp.zeros(shape.shape, shape.dtype))
            start = time.perf_counter()
            for _ in range(repeats):
                result = program(result, *operands)
            jax.block_until_ready(result)
            total += time.perf_counter() - start
        return total / repeats


def _overwritten(f: Callable[[Any, Any], Any], result: Any, a: Any, b: Any) -> Any:
    """f(a, b), written into the donated memory of ``result``."""
    return f(a, b)


class TorchProcess:
    """The process that runs PyTorch and the libraries built on it, for one problem.

    It makes the data while this process makes the same data.
    """

    answer_within = 90.0  # seconds; then the process is killed

    def __init__(
        self, process: "subprocess.Popen[str]", problem: Problem, request: dict[str, Any]
    ) -> None:
        self._process = process
        self._send({"problem": problem, **request})

    def names(self) -> list[str]:
        """Wait until the process has the data, and return the names of its functions."""
        return list(self._answer()["contestants"])

    def ask(self, **request: Any) -> Any:
        self._send(request)
        return self._answer()

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise RuntimeError("its process ended") from None

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        timer = threading.Timer(self.answer_within, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        answer = json.loads(line or '{"error": "its process ended, or did not answer"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


@contextmanager
def torch_process(
    problem: Problem, *, gradient: bool, peers: Sequence[str]
) -> Iterator[TorchProcess]:
    """Start a `TorchProcess`, and kill it at the end.

    Its threads sleep while they wait, so that they do not slow down the other measurements. It
    compiles without subprocesses, because these would outlive it.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "sxe._tools.bench.torch_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_WAIT_POLICY": "passive", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        text=True,
    )
    try:
        yield TorchProcess(process, problem, {"gradient": gradient, "peers": list(peers)})
    finally:
        # Nothing has to be saved, and the next problem needs the memory.
        process.kill()
        process.communicate()


class Torch:
    """A function in a `TorchProcess`, with the interface of `Contestant`."""

    def __init__(self, name: str, process: TorchProcess) -> None:
        self.name, self._process = name, process
        known = process.ask(prepare=name)
        self.compile_seconds: float | None = known["compile_seconds"]
        self.temporary_bytes: int | None = known["temporary_bytes"]

    def seconds(self, repeats: int = 1) -> float:
        return float(self._process.ask(time=self.name, repeats=repeats)["seconds"])

    def outcome(self, problem: Problem, labels: Array) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "gradients.npz")
            loss = self._process.ask(outcome=self.name, file=file)["loss"]
            with np.load(file) as saved:
                return Outcome(loss, tuple(saved[name] for name in saved.files))


def losses(problem: Problem) -> dict[str, dict[str, Callable[..., Any]]]:
    """For each library, its functions of (logits, labels) or (hidden, kernel, labels), by name."""
    every: Callable[..., Any] = sxe.linear_softmax_cross_entropy
    if problem.hidden is None:
        every = sxe.softmax_cross_entropy
    loss = every if problem.counting == 1 else partial(every, ignore_index=-1)
    ours = {"sxe": loss}
    if jax.default_backend() == "gpu":
        ours["sxe, mosaic_gpu"] = partial(loss, implementation="mosaic_gpu")
    if problem.counting < 1:
        ours[ALL_ROWS] = lambda *arguments: every(*arguments[:-1], jnp.maximum(arguments[-1], 0))
    if problem.hidden is None:
        integer, dense = (
            optax.softmax_cross_entropy_with_integer_labels,
            optax.softmax_cross_entropy,
        )
        return {
            "sxe": ours,
            "optax": {"optax": lambda x, y: (dense if problem.dense else integer)(x, y).mean()},
        }

    def by_optax(logits: Any, labels: Any) -> Any:
        if problem.counting == 1:
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        counts = labels >= 0
        labels = jnp.maximum(labels, 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels, where=counts)
        return losses.mean(where=counts)

    def on_logits(hidden: Any, kernel: Any, labels: Any) -> Any:
        logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
        return by_optax(logits, labels)

    def on_narrow_logits(hidden: Any, kernel: Any, labels: Any) -> Any:
        logits = jnp.matmul(hidden, kernel).astype(jnp.float32)
        return by_optax(logits, labels)

    on_optax = {"optax": on_logits}
    if problem.dtype == "bfloat16" and jax.default_backend() != "cpu":
        # A float32 gradient of the logits would make the matrix products slower.
        on_optax["optax, narrow logits"] = on_narrow_logits

    def tokamax(implementation: str) -> Callable[..., Any]:
        def loss(hidden: Any, kernel: Any, labels: Any) -> Any:
            from tokamax import linear_softmax_cross_entropy_loss as f

            return f(hidden, labels, kernel, reduction="mean", implementation=implementation)

        return loss

    def cce(hidden: Any, kernel: Any, labels: Any) -> Any:
        import jax_cce

        return jax_cce.linear_cross_entropy(hidden, kernel, labels)

    if problem.counting < 1:  # the other two libraries have no argument for this
        return {"sxe": ours, "optax": on_optax}
    return {
        "sxe": ours,
        "optax": on_optax,
        "tokamax": {f"tokamax {name}": tokamax(name) for name in ("xla", "chunked_xla")},
        "jax-cce": {"jax-cce": cce},
    }


def floor(problem: Problem, gradient: bool, *arguments: Any) -> tuple[Contestant | Products, float]:
    """A program whose time is a lower bound, and the factor of this time.

    For logits, the program writes x + 1 into a new array, or without gradient sums x. For the head,
    it computes the matrix products of one chunk, and the factor is the number of chunks. On a CPU
    one program computes all products into new arrays. On an accelerator each product is timed alone
    and writes into existing memory, and the times are added.
    """
    if problem.hidden is None:
        write: Callable[..., Any] = lambda x: x + 1  # noqa: E731
        return Contestant("floor", write if gradient else jnp.sum, arguments[0]), 1
    plan = head_plan(problem, gradient)
    chunks = problem.rows_that_count / plan.chunk_size if problem.counting < 1 else plan.chunks
    backend = backend_of()
    forward = backend.product_dtype(problem.dtype)
    backward = backend.gradient_dtype(problem.dtype)
    hidden, kernel = arguments[0][: plan.chunk_size], arguments[1]

    def matmul(a: Any, b: Any) -> Any:
        return jnp.matmul(a, b, preferred_element_type=jnp.float32)

    products: list[tuple[Callable[[Any, Any], Any], Any, Any]]
    products = [(matmul, hidden.astype(forward), kernel.astype(forward))]
    if gradient:
        # Products of zeros take less power, and so less time where power is the limit.
        shape = (plan.chunk_size, problem.classes)
        d_logits = jax.random.normal(jax.random.key(0), shape, backward)
        products += [
            (lambda d, kernel: matmul(d, kernel.T), d_logits, kernel.astype(backward)),
            (lambda hidden, d: matmul(hidden.T, d), hidden.astype(backward), d_logits),
        ]
    if jax.default_backend() != "cpu":
        return Products("floor", *products), chunks

    def all_of_them(*operands: Any) -> list[Any]:
        return [f(*pair) for (f, *_), pair in zip(products, operands, strict=True)]

    return Contestant("floor", all_of_them, *(pair for _, *pair in products)), chunks


def head_plan(problem: Problem, gradient: bool) -> sxe.Plan:
    assert problem.hidden is not None
    inputs = ("hidden", "kernel") if gradient else ()
    return sxe.plan(
        problem.rows,
        problem.hidden,
        problem.classes,
        dtype=problem.dtype,
        differentiate=inputs,
        counting=problem.counting,
    )


def why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def contestants(
    problem: Problem,
    peers: Sequence[str],
    *arguments: Any,
    gradient: bool,
    chunk_sizes: Sequence[int] = (),
    on_phase: Callable[[str], object] = lambda text: None,
) -> tuple[list[Contestant], dict[str, str]]:
    """The compiled functions of sxe and of the JAX peers, and the errors of those that failed."""
    found: list[Contestant] = []
    failed: dict[str, str] = {}
    argnums = (0,) if problem.hidden is None else (0, 1)
    by_peer = losses(problem)
    chunked = {
        f"sxe, chunk {size}": partial(sxe.linear_softmax_cross_entropy, chunk_size=size)
        for size in chunk_sizes
    }
    by_peer["sxe"] = {**by_peer["sxe"], **chunked}
    for peer, functions in by_peer.items():
        for name, f in functions.items() if peer in ("sxe", *peers) else ():
            given = arguments
            if peer == "jax-cce":  # it expects the kernel as [K, D]
                given = (arguments[0], jnp.asarray(arguments[1].T), arguments[2])
            try:
                call = jax.value_and_grad(f, argnums) if gradient else f
                found.append(Contestant(name, call, *given))
                on_phase(f"{name} compiled")
            except Exception as error:
                if name == "sxe":
                    raise
                failed[name] = why(error)
                on_phase(f"{name} failed: {failed[name]}")
    return found, failed


def torch_contestants(
    process: TorchProcess, names: Sequence[str], on_phase: Callable[[str], object]
) -> tuple[list[Torch], dict[str, str]]:
    """The prepared functions of the other process, and the errors of those that failed."""
    found: list[Torch] = []
    failed: dict[str, str] = {}
    for name in names:
        try:
            found.append(Torch(name, process))
            on_phase(f"{name} prepared")
        except RuntimeError as error:
            failed[name] = why(error)
            on_phase(f"{name} failed: {failed[name]}")
    return found, failed
