"""The gradient of softmax cross-entropy, derived in ten lines that run.

Logits x in R^{N x K}: N rows, K classes. Targets y in R^{N x K}. Softmax s_k(x_i) = exp(x_ik) / S
with S = sum_h exp(x_ih), and q in R^{N x K} for all its values. [i=j] is 1 where i = j, else 0.

Each of `d0` ... `d9` is one line: its docstring is the formula, its body the same formula (of D2
and D3 the first form; D4 runs the second), and nothing more. So the lines overflow where exp does,
from logits of 88 in float32; `sxe.softmax_cross_entropy` has the arithmetic that does not. `LINES`
says what each line is compared with and what it assumes; `python -m sxe check` measures them all.
Where x and y are not both [N, K] a line raises ValueError: NumPy would broadcast labels [N].

>>> x, y = jnp.array([[1.0, 2.0, 0.5]]), jnp.array([[0.0, 1.0, 0.0]])
>>> bool(jnp.allclose(d9(x, y), jax.grad(d0)(x, y).T))
True
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sxe._softmax_cross_entropy import softmax_cross_entropy

ClosedForm = Callable[[Array, Array], Array]


def softmax(x: Array) -> Array:
    """s_k(x_i) = exp(x_ik) / sum_h exp(x_ih)"""
    # Not jax.nn.softmax: it brings a rule of its own, so that autodiff of it would be D4 already.
    return jnp.exp(x) / jnp.sum(jnp.exp(x), axis=1, keepdims=True)


def _line_of_xy(formula: ClosedForm) -> ClosedForm:
    """The line, for x and y that fit alone."""

    @functools.wraps(formula)
    def line(x: Array, y: Array) -> Array:
        x, y = jnp.asarray(x), jnp.asarray(y)
        if x.ndim != 2:
            raise ValueError(f"x: expected logits [N, K], got shape {x.shape}")
        if y.shape != x.shape:
            raise ValueError(
                f"y: expected targets [N, K] as the logits are, {x.shape}, got {y.shape}; "
                f"of labels [N] pass jax.nn.one_hot(y, {x.shape[1]})"
            )
        return formula(x, y)

    return line


@_line_of_xy
def d0(x: Array, y: Array) -> Array:
    """L = -(1/N) sum_i sum_k y_ik log s_k(x_i)"""
    N = len(x)
    return -(1 / N) * jnp.sum(y * jnp.log(softmax(x)))


@_line_of_xy
def d1(x: Array, y: Array) -> Array:
    """ds_k(x_i)/dx_jl = 0"""
    N, K = x.shape
    return jnp.zeros((N, K, N, K), x.dtype)


@_line_of_xy
def d2(x: Array, y: Array) -> Array:
    """exp(x_ik)/S - (exp(x_ik)/S)^2 = s_k (1 - s_k)"""
    S = jnp.sum(jnp.exp(x), axis=1, keepdims=True)
    return jnp.exp(x) / S - (jnp.exp(x) / S) ** 2


@_line_of_xy
def d3(x: Array, y: Array) -> Array:
    """-exp(x_ik) exp(x_il) / S^2 = -s_k s_l"""
    S = jnp.sum(jnp.exp(x), axis=1)[:, None, None]
    return -jnp.exp(x)[:, :, None] * jnp.exp(x)[:, None, :] / S**2


@_line_of_xy
def d4(x: Array, y: Array) -> Array:
    """[i=j] s_k(x_i) ([k=l] - s_l(x_i))"""
    N, K = x.shape
    s = softmax(x)
    i_is_j = jnp.eye(N, dtype=x.dtype)[:, None, :, None]
    k_is_l = jnp.eye(K, dtype=x.dtype)[None, :, None, :]
    return i_is_j * s[:, :, None, None] * (k_is_l - s[:, None, None, :])


@_line_of_xy
def d5(x: Array, y: Array) -> Array:
    """-(1/N) sum_i sum_k y_ik (1/s_k(x_i)) ds_k(x_i)/dx_jl"""
    N = len(x)
    s, ds_dx = softmax(x), d4(x, y)
    return -(1 / N) * jnp.sum((y * (1 / s))[:, :, None, None] * ds_dx, axis=(0, 1))


@_line_of_xy
def d6(x: Array, y: Array) -> Array:
    """-(1/N) sum_k y_jk ([k=l] - s_l(x_j))"""
    N, K = x.shape
    s = softmax(x)
    k_is_l = jnp.eye(K, dtype=x.dtype)[None, :, :]
    return -(1 / N) * jnp.sum(y[:, :, None] * (k_is_l - s[:, None, :]), axis=1)


@_line_of_xy
def d7(x: Array, y: Array) -> Array:
    """-(1/N) y_jl + (1/N) sum_k y_jk s_l(x_j)"""
    N = len(x)
    s = softmax(x)
    return -(1 / N) * y + (1 / N) * jnp.sum(y[:, :, None] * s[:, None, :], axis=1)


@_line_of_xy
def d8(x: Array, y: Array) -> Array:
    """(1/N) (s_l(x_j) - y_jl)"""
    N = len(x)
    s = softmax(x)
    return (1 / N) * (s - y)


@_line_of_xy
def d9(x: Array, y: Array) -> Array:
    """dL/dx = (1/N) (q - y)^T"""
    N = len(x)
    q = softmax(x)
    return (1 / N) * (q - y).T


def gradient(x: Array, y: Array) -> Array:
    """D9 at every magnitude: dL/dx in numerator layout [K, N], where `jax.grad` gives [N, K].

    Args:
      x: logits [N, K].
      y: targets [N, K] or integer labels [N]. Rows that do not sum to one are right too: D7.

    Returns:
      The gradient of `sxe.softmax_cross_entropy`, the mean, as [K, N] in the dtype of x.

    Raises:
      TypeError, ValueError: as `sxe.softmax_cross_entropy` does, for x and y that do not fit.

    >>> x = jnp.array([[1e8, 1e8, 0.0], [0.0, 0.0, -jnp.inf]])
    >>> print(gradient(x, jnp.array([0, 1])))
    [[-0.25  0.25]
     [ 0.25 -0.25]
     [ 0.    0.  ]]
    """
    dL_dx: Array = jax.grad(softmax_cross_entropy)(jnp.asarray(x), y)
    return dL_dx.T


class Line(NamedTuple):
    """A line of the derivation: what must give the same numbers, where, and how far off it was."""

    name: str
    formula: str
    closed_form: ClosedForm
    compared_with: str
    assumption: str
    entries: str  # einsum subscripts: the entries of the reference that the line gives, as laid out
    kept: Callable[[Array], Array] | None = None  # those among them that the assumption keeps
    shown: bool = False  # whether any were left to compare
    autodiff_error: float = math.nan
    differences_error: float = math.nan
    passed: bool = False


def _line(closed_form: ClosedForm, compared_with: str, assumption: str, entries: str) -> Line:
    name, formula = closed_form.__name__.upper(), closed_form.__doc__ or ""
    return Line(name, formula, closed_form, compared_with, assumption, entries)


def _rows_differ(x: Array) -> Array:  # in the layout (i, k, j, l)
    return ~jnp.eye(x.shape[0], dtype=bool)[:, None, :, None]


def _classes_differ(x: Array) -> Array:  # in the layout (i, k, l)
    return ~jnp.eye(x.shape[1], dtype=bool)[None, :, :]


LINES = (
    _line(d0, "sxe's mean loss", "none", "->"),
    _line(d1, "jacfwd of s", "j != i", "ikjl->ikjl")._replace(kept=_rows_differ),
    _line(d2, "jacfwd of s", "j = i, k = l", "ikik->ik"),
    _line(d3, "jacfwd of s", "j = i, k != l", "ikil->ikl")._replace(kept=_classes_differ),
    _line(d4, "jacfwd of s", "none", "ikjl->ikjl"),
    _line(d5, "grad of D0", "s_k(x_i) > 0", "jl->jl"),
    _line(d6, "grad of D0", "none", "jl->jl"),
    _line(d7, "grad of D0", "none", "jl->jl"),
    _line(d8, "grad of D0", "sum_k y_jk = 1", "jl->jl"),
    _line(d9, "(grad of D0)^T", "sum_k y_jk = 1", "jl->lj"),
)
