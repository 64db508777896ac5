"""log_prob_and_entropy, its head and the divergences, for tests that all of them share.

Each is a ``Function``, which says how it is called and what the oracle expects as value and
gradients. A divergence here has one value per row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import assert_close, naming
from problems import divergence_problem, head_problem, logits_problem, normal, wide_dtype

import sxe

N, D, K, B = 5, 3, 7, 3
MODES = ("forward", "reverse", "jensen_shannon")


class Function(NamedTuple):
    """One of the functions, with all options that go together, and its static options."""

    function: Callable[..., Any]
    make: Callable[..., dict[str, np.ndarray]]
    options: tuple[str, ...]
    static: dict[str, Any]

    @property
    def is_divergence(self):
        return self.function is sxe.kl_divergence

    @property
    def is_head(self):
        return self.function is sxe.linear_log_prob_and_entropy

    def problem(self, *options, rows=(N,), width=D, classes=K, **more):
        """Random arguments with these options, or with every option."""
        shape = (*rows, width, classes) if self.is_head else (*rows, classes)
        return jax.tree.map(jnp.asarray, self.make(*(options or self.options), shape=shape, **more))

    def plain(self, **more):
        """Random arguments without options."""
        return self.problem("none", **more)

    def cotangent(self, p, seed=1):
        """Random cotangents of both signs for each row, different for each result."""
        x = p["hidden" if self.is_head else "logits"]
        shape, dtype = x.shape[:-1], wide_dtype(x.dtype)
        first, second = (jnp.asarray(normal(*shape, dtype=dtype, seed=seed + i)) for i in (0, 7))
        return first if self.is_divergence else sxe.LogProbAndEntropy(first, second)

    def __call__(self, **static):
        return lambda p: self.function(**p, **(self.static | static))

    def truth(self, p, g, **options):
        """The value and, by name, the gradients, in float64."""
        p = {name: np.asarray(a) for name, a in p.items()} | options
        if self.is_divergence:
            p |= {name: self.static[name] for name in ("mode", "beta") if name in self.static}
            p["reduction"] = "none"
            return oracle.kl_divergence(**p), oracle.kl_divergence_gradients(g=g, **p)
        if self.is_head:
            value = oracle.head_log_prob_and_entropy(**p)
            return value, oracle.head_log_prob_and_entropy_gradients(**p, g=g)
        value = oracle.log_prob_and_entropy(**p)
        return value, {"logits": oracle.log_prob_and_entropy_gradient(**p, g=g)}

    def assert_matches(self, actual, p, g, dtype=None, **options):
        """Compare (value, gradients by name) with the oracle."""
        value, gradients = actual
        right, right_gradients = self.truth(p, g, **options)
        for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(right), strict=True):
            assert_close(a, b, dtype)
        for name, gradient in gradients.items():
            with naming(name):
                assert gradient.dtype == p[name].dtype
                expected = right_gradients[name]
                # The gradient for a scale sums terms of size 1 or more, of both signs.
                least = 10 if name in _SUMS else 1
                scale = max(least, np.abs(expected[np.isfinite(expected)]).max(initial=0))
                assert_close(gradient, expected, dtype, scale=scale)


_SUMS = ("logit_scale", "target_logit_scale", "softcap")
_SCALES = ("logit_scale", "target_row_scale"), ("row_scale", "target_logit_scale"), ()
FUNCTIONS = {
    "logits": Function(sxe.log_prob_and_entropy, logits_problem, ("where", "class_mask"), {}),
    "head": Function(
        sxe.linear_log_prob_and_entropy,
        head_problem,
        ("where", "class_mask", "bias", "logit_scale", "softcap"),
        {"chunk_size": 2},
    ),
    **{
        mode: Function(
            sxe.kl_divergence,
            divergence_problem,
            ("where", "weights", "class_mask", *scales),
            {"mode": mode, "reduction": "none"} | ({"beta": 0.3} if mode == MODES[2] else {}),
        )
        for mode, scales in zip(MODES, _SCALES, strict=True)
    },
}
every_function = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
of_logits = pytest.mark.parametrize(
    "f", [f for f in FUNCTIONS.values() if not f.is_head], ids=[n for n in FUNCTIONS if n != "head"]
)
