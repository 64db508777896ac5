"""A measured problem: its sizes, its data, and the true result in float64.

Only NumPy is used, so that the process of PyTorch makes the same data without JAX.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SAMPLES = 64  # rows and classes whose gradients are compared
LEAD = 20.0  # about how far the label's logit leads in a confident row
CONFIDENT = 0.5  # default share of confident rows

# The largest errors of a correct result: the relative error of the loss, and the error of the
# gradient divided by its largest component. Another library may return the loss, and sum the rows,
# in the dtype of its inputs.
TOLERANCES = {
    "float64": (1e-12, 1e-10),
    "float32": (1e-5, 1e-4),
    "float16": (2e-3, 4e-3),
    "bfloat16": (1e-2, 3e-2),
}


class Problem(NamedTuple):
    """Logits [rows, classes], or hidden states [rows, hidden] and a kernel [hidden, classes].

    Attributes:
      dense: whether the labels are dense targets [rows, classes].
      counting: the share of rows that count. The others have the label -1.
      confident: the share of rows in which the logit of the label leads by 20, as in most rows at
        the end of training. If dense, this class has at least nine tenths of the row's target.
    """

    rows: int
    classes: int
    hidden: int | None = None
    dtype: str = "float32"
    dense: bool = False
    confident: float = 0.0
    counting: float = 1.0

    @property
    def sizes(self) -> str:
        hidden = () if self.hidden is None else (self.hidden,)
        return " x ".join(map(str, (self.rows, *hidden, self.classes)))

    @property
    def name(self) -> str:
        notes = ["dense"] * self.dense
        notes += [f"{self.confident:.0%} confident"] if self.confident else []
        notes += [f"{self.counting:.0%} counting"] if self.counting < 1 else []
        return ", ".join((self.sizes, self.dtype, *notes))

    def least_bytes(self, gradient: bool) -> int | None:
        """The bytes that are at least read and written; None for the head.

        This counts reading the logits and dense targets once, and writing the gradient once. A
        program that reads the logits again for the gradient needs more.
        """
        arrays, itemsize = 1 + self.dense + gradient, int(self.dtype[-2:]) // 8
        return None if self.hidden else arrays * self.rows * self.classes * itemsize

    def flops(self, gradient: bool) -> int | None:
        """FLOPs of the head's matrix products; None for a loss of given logits.

        They are 6 N D K with gradient and 2 N D K without, where N is the rows that count.
        """
        if self.hidden is None:
            return None
        return (6 if gradient else 2) * self.rows_that_count * self.hidden * self.classes

    @property
    def rows_that_count(self) -> int:
        return round(self.counting * self.rows)

    def data(self) -> tuple[Array, ...]:
        """Logits, or hidden states and kernel, in float32, followed by the labels."""
        rng = np.random.default_rng(0)
        N, K = self.rows, self.classes
        labels: Array = rng.integers(0, K, size=N, dtype=np.int32)
        # At random rows, as in a batch. A separate generator keeps all other data unchanged.
        confident = np.random.default_rng(2).permutation(N) < self.confident * N
        if self.hidden is None:
            logits = _normal((N, K), seed=3)
            logits[np.arange(N)[confident], labels[confident]] += LEAD
            if self.dense:
                targets = rng.random((N, K), np.float32)
                targets /= targets.sum(axis=1, keepdims=True)
                targets[confident] *= np.float32(0.1)
                targets[np.arange(N)[confident], labels[confident]] += np.float32(0.9)
                return logits, targets
            return logits, labels
        hidden = _normal((N, self.hidden), seed=3)
        kernel = _normal((self.hidden, K), seed=4)
        kernel /= np.float32(self.hidden**0.5)
        at_label = kernel[:, labels[confident]].T
        scale = LEAD / np.maximum(np.sum(at_label**2, axis=1, keepdims=True), 1e-6)
        hidden[confident] += at_label * scale
        labels[np.random.default_rng(5).permutation(N) >= self.rows_that_count] = -1
        return hidden, kernel, labels

    def samples(self, labels: Array) -> tuple[Array, Array]:
        """The sorted rows and classes whose gradients are compared. Most classes are labels."""
        rng = np.random.default_rng(1)
        rows = np.sort(rng.permutation(self.rows)[:SAMPLES])
        classes = rng.permutation(self.classes)[: SAMPLES // 4]
        if self.dense:
            return rows, classes
        of_rows = labels[rows]
        return rows, np.union1d(classes, of_rows[of_rows >= 0])


def _normal(shape: tuple[int, int], *, seed: int) -> Array:
    """Standard normal numbers. Threads draw slices of rows, each from its own generator.

    The result depends on the shape and the seed, but not on the number of threads.
    """
    result = np.empty(shape, np.float32)
    size = max(1, 2**22 // shape[1])
    slices = [result[first : first + size] for first in range(0, shape[0], size)]
    seeds = np.random.SeedSequence(seed).spawn(len(slices))

    def fill(rows: Array, seed: np.random.SeedSequence) -> None:
        np.random.default_rng(seed).standard_normal(out=rows, dtype=np.float32)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, slices, seeds))
    return result


def gpu_problems(confident: float) -> list[Problem]:
    """The standard problems of a GPU, the most important first."""
    sizes: list[tuple[int, int | None, int, str]] = [
        (16384, 4096, 131072, "bfloat16"),
        (16384, None, 131072, "bfloat16"),
        (8192, 4096, 128256, "bfloat16"),
        (65536, None, 1000, "bfloat16"),
        (8192, None, 32000, "bfloat16"),
        (4096, None, 50257, "bfloat16"),
        (32768, 2560, 128256, "bfloat16"),
        (16384, None, 131072, "float32"),
        (8192, None, 32000, "float32"),
        (65536, None, 1000, "float32"),
        (4096, None, 50257, "float32"),
    ]
    return [Problem(n, k, d, dtype, confident=confident) for n, d, k, dtype in sizes]


def standard_problems(quick: bool, confident: float) -> list[Problem]:
    """The standard problems of a CPU. If ``quick``, a few that take seconds."""
    logits: list[tuple[int, int]] = [(1024, 32768), (1024, 50257), (512, 128256)]
    logits += [(32768, 1000), (65536, 10), (8, 1000)]
    heads = [(2048, 512, 32768), (4096, 768, 50257), (1024, 1024, 50257), (8192, 256, 32003)]
    if quick:
        logits, heads = [(256, 32768), (8192, 1000), (8, 1000)], [(512, 256, 8192)]
    dtypes = ("float32", "bfloat16")
    problems = [Problem(n, k, dtype=dtype) for n, k in logits for dtype in dtypes]
    problems += [Problem(n, k, dense=True) for n, k in logits[:1]]
    problems += [Problem(n, k, d, dtype) for n, d, k in heads for dtype in dtypes]
    return [problem._replace(confident=confident) for problem in problems]


class Outcome(NamedTuple):
    """The mean loss, and the gradients of the sampled rows and, for the head, classes."""

    loss: float
    gradients: tuple[Array, ...]


def truth(
    problem: Problem,
    *arguments: Any,
    namespace: Any = np,
    compiled: Callable[[Any], Any] = lambda f: f,
) -> Outcome:
    """The true result by D0 and D7 in float64, for inputs rounded to the problem's dtype.

    Args:
      problem: the problem.
      *arguments: the logits, or the hidden states and the kernel, followed by the labels.
      namespace: ``numpy``, or ``jax.numpy`` where float64 is enabled.
      compiled: ``jax.jit`` if the namespace is ``jax.numpy``.
    """
    first, labels = arguments[0], arguments[-1]
    kernel = None if problem.hidden is None else arguments[1].astype("float64")
    rows, classes = problem.samples(np.asarray(labels))
    of_rows = compiled(partial(_of_rows, problem, namespace))
    of_classes = compiled(partial(_of_classes, problem, namespace))
    # The number of rows computed at once. An accelerator needs larger products, and has memory for
    # a few arrays of 1 GiB. With a power of two, most problems have no remainder to compile again.
    most = max(1, (2**24 if namespace is np else 2**27) // problem.classes)
    size = 1 << (most.bit_length() - 1)
    losses, at_classes = [], []
    for start in range(0, problem.rows, size):
        part = slice(start, start + size)
        loss, d = of_classes(first[part], kernel, labels[part], classes)
        losses.append(np.asarray(loss))
        at_classes.append(np.asarray(d))
    _, d_rows = of_rows(first[rows], kernel, labels[rows])
    gradients: tuple[Any, ...] = (d_rows,)
    if kernel is not None:
        d_classes = namespace.asarray(np.concatenate(at_classes))
        gradients = (d_rows @ kernel.T, first.astype("float64").T @ d_classes)
    mean = float(np.sum(np.concatenate(losses))) / problem.rows_that_count
    return Outcome(mean, tuple(np.asarray(d) for d in gradients))


def _of_rows(problem: Problem, xp: Any, x: Any, kernel: Any, labels: Any) -> tuple[Any, Any]:
    """The losses of a block of rows, and the gradient of the mean of all rows for its logits."""
    x = x.astype("float64")
    if kernel is not None:
        x = x @ kernel
    m = x.max(axis=1, keepdims=True)
    e = xp.exp(x - m)
    total = e.sum(axis=1, keepdims=True)
    if problem.dense:
        t = labels.astype("float64")
    else:  # a row with label -1 has loss and gradient 0, because no class has the index -1
        at_label = labels[:, None] == xp.arange(problem.classes, dtype="int32")[None]
        t = at_label.astype("float64")
    T = t.sum(axis=1, keepdims=True)
    losses = (t * (m - x)).sum(axis=1) + (T * xp.log(total))[:, 0]
    return losses, (T * e / total - t) / problem.rows_that_count


def _of_classes(
    problem: Problem, xp: Any, x: Any, kernel: Any, labels: Any, classes: Array
) -> tuple[Any, Any]:
    losses, d = _of_rows(problem, xp, x, kernel, labels)
    return losses, d[:, classes]


def errors(outcome: Outcome, true: Outcome) -> tuple[float, float | None]:
    """The relative error of the loss, and the largest gradient error relative to its maximum."""
    of_loss = abs(outcome.loss - true.loss) / abs(true.loss)
    of_gradients = [
        float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
        for a, b in zip(outcome.gradients, true.gradients, strict=False)
    ]
    return of_loss, max(of_gradients) if of_gradients else None
