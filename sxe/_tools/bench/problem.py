"""What is measured: the sizes and data of one call, and what is true of its results.

NumPy only, so that a process without JAX's backend can make the same data from the same seed.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SAMPLES = 64  # rows and classes of which gradients are compared
LEAD = 20.0  # of the label's logit in a confident row
CONFIDENT = 0.5  # share of the rows that are confident, where nothing else is asked for

# The largest errors of a right result: of the loss, relative; of the gradient, over its largest
# component. The loss of a peer may have the dtype of its inputs, and so may its sum of rows.
TOLERANCES = {
    "float64": (1e-12, 1e-10),
    "float32": (1e-5, 1e-4),
    "float16": (2e-3, 4e-3),
    "bfloat16": (1e-2, 3e-2),
}


class Problem(NamedTuple):
    """Logits [rows, classes], or hidden states [rows, hidden] and a kernel [hidden, classes].

    Attributes:
      dense: the labels are targets [rows, classes].
      confident: the share of rows in which the logit of the label leads by 20, as in most rows at
        the end of training. If dense, that class has at least nine tenths of the row's target.
    """

    rows: int
    classes: int
    hidden: int | None = None
    dtype: str = "float32"
    dense: bool = False
    confident: float = 0.0

    @property
    def sizes(self) -> str:
        hidden = () if self.hidden is None else (self.hidden,)
        return " x ".join(map(str, (self.rows, *hidden, self.classes)))

    @property
    def name(self) -> str:
        notes = ["dense"] * self.dense
        notes += [f"{self.confident:.0%} confident"] if self.confident else []
        return ", ".join((self.sizes, self.dtype, *notes))

    def least_bytes(self, gradient: bool) -> int | None:
        """To read the logits and, if dense, the targets, and to write the gradient; None: a head.

        Once each, which no program does that reads the logits again for the gradient.
        """
        arrays, itemsize = 1 + self.dense + gradient, int(self.dtype[-2:]) // 8
        return None if self.hidden else arrays * self.rows * self.classes * itemsize

    def flops(self, gradient: bool) -> int | None:
        """Of the head's products, 6 N D K with gradient and 2 N D K without; None: given logits."""
        products = 3 if gradient else 1
        return 2 * products * self.rows * self.hidden * self.classes if self.hidden else None

    def data(self) -> tuple[Array, ...]:
        """Logits, or hidden states and kernel, in float32; and the labels."""
        rng = np.random.default_rng(0)
        N, K = self.rows, self.classes
        labels: Array = rng.integers(0, K, size=N, dtype=np.int32)
        # Spread over all rows, as in a batch. Its own generator leaves all other data as they are.
        confident = np.random.default_rng(2).permutation(N) < self.confident * N
        if self.hidden is None:
            logits = rng.standard_normal((N, K), np.float32)
            logits[np.arange(N)[confident], labels[confident]] += LEAD
            if self.dense:
                targets = rng.random((N, K), np.float32)
                targets /= targets.sum(axis=1, keepdims=True)
                targets[confident] *= np.float32(0.1)
                targets[np.arange(N)[confident], labels[confident]] += np.float32(0.9)
                return logits, targets
            return logits, labels
        hidden = rng.standard_normal((N, self.hidden), np.float32)
        kernel = rng.standard_normal((self.hidden, K), np.float32) / np.float32(self.hidden**0.5)
        at_label = kernel[:, labels[confident]].T
        scale = LEAD / np.maximum(np.sum(at_label**2, axis=1, keepdims=True), 1e-6)
        hidden[confident] += at_label * scale
        return hidden, kernel, labels

    def samples(self, labels: Array) -> tuple[Array, Array]:
        """The rows and the classes whose gradients are compared, in order. Most are of labels."""
        rng = np.random.default_rng(1)
        rows = np.sort(rng.permutation(self.rows)[:SAMPLES])
        classes = rng.permutation(self.classes)[: SAMPLES // 4]
        return rows, classes if self.dense else np.union1d(classes, labels[rows])


def standard_problems(quick: bool, confident: float) -> list[Problem]:
    """The standard grid. If ``quick``, one size of each kind, of those that take seconds."""
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
    """The mean loss, and the gradients of the sampled rows and, with a kernel, classes."""

    loss: float
    gradients: tuple[Array, ...]


def truth(problem: Problem, *arguments: Array) -> Outcome:
    """In float64, from D0 and D7, for inputs that are rounded to the problem's dtype."""
    *inputs, labels = (x if x.dtype == np.int32 else x.astype(np.float64) for x in arguments)
    rows, classes = problem.samples(labels)
    size = max(1, 2**24 // problem.classes)  # rows at a time
    losses, at_rows, at_classes = [], [], []
    for first in range(0, problem.rows, size):
        part = slice(first, first + size)
        x = inputs[0][part] if problem.hidden is None else inputs[0][part] @ inputs[1]
        m = x.max(axis=1, keepdims=True)
        e = np.exp(x - m)
        total = e.sum(axis=1, keepdims=True)
        t = labels[part] if problem.dense else labels[part, None] == np.arange(problem.classes)
        T = t.sum(axis=1, keepdims=True)
        losses.append((t * (m - x)).sum(axis=1) + (T * np.log(total))[:, 0])
        d = (T * e / total - t) / problem.rows
        at_rows.append(d[rows[(rows >= first) & (rows < first + size)] - first])
        at_classes.append(d[:, classes])
    gradients: tuple[Array, ...] = (np.concatenate(at_rows),)
    if problem.hidden is not None:
        gradients = (gradients[0] @ inputs[1].T, inputs[0].T @ np.concatenate(at_classes))
    return Outcome(float(np.mean(np.concatenate(losses))), gradients)


def errors(outcome: Outcome, true: Outcome) -> tuple[float, float | None]:
    """Of the loss, relative, and of the gradients, over the largest component of each."""
    of_loss = abs(outcome.loss - true.loss) / abs(true.loss)
    of_gradients = [
        float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
        for a, b in zip(outcome.gradients, true.gradients, strict=False)
    ]
    return of_loss, max(of_gradients) if of_gradients else None
