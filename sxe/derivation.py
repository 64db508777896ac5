"""The gradient of softmax cross-entropy, derived in ten lines that run.

Logits x in R^{N x K}: N rows, K classes. Targets y in R^{N x K}. Softmax s_k(x_i) = exp(x_ik) / S
with S = sum_h exp(x_ih), and q in R^{N x K} for all its values. [i=j] is 1 where i = j, else 0.

Each of `d0` ... `d9` is one line: its docstring is the formula, its body the same formula (of D2
and D3 the first form; D4 runs the second), and nothing more. So the lines overflow where exp does,
from logits of 88 in float32. `sxe.softmax_cross_entropy` has the arithmetic that does not, and
`jax.grad(sxe.softmax_cross_entropy)(x, y).T` is D9 at every magnitude. `LINES` says what each line
is compared with and what it assumes; `python -m sxe check` measures them all. A line raises
ValueError where x and y are not both [N, K], because NumPy would broadcast labels [N].

>>> import jax
>>> x, y = jnp.array([[1.0, 2.0, 0.5]]), jnp.array([[0.0, 1.0, 0.0]])
>>> bool(jnp.allclose(d9(x, y), jax.grad(d0)(x, y).T))
True
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

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


class Line(NamedTuple):
    """A line of the derivation, what it is compared with, and where they are equal.

    Attributes:
      name: "D0" to "D9".
      formula: the line as text.
      closed_form: the line as a function of x and y.
      compared_with: the reference that has to give the same numbers, as text.
      assumption: what the line needs to be true, as text.
      entries: einsum subscripts, from the indices of the reference to those of the line.
      kept: a function of x that gives a mask of the entries which the assumption keeps; None: all.
    """

    name: str
    formula: str
    closed_form: ClosedForm
    compared_with: str
    assumption: str
    entries: str
    kept: Callable[[Array], Array] | None = None


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
