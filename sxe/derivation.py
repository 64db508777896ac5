"""The gradient of softmax cross-entropy, and what else is read off a softmax, in lines that run.

Logits x in R^{N x K}: N rows, K classes. Targets y in R^{N x K}. Softmax s_k(x_i) = exp(x_ik) / S
with S = sum_h exp(x_ih), and q in R^{N x K} for all its values. [i=j] is 1 where i = j, else 0.

`d0` ... `d9` derive the gradient of the mean loss. `e0` and `e1` are the entropy H and its
gradient, of logits x alone. `k0` ... `k5` are divergences from p = softmax(z) of target logits
z [N, K], and their gradients, with u_k = log q_k - log p_k, phi(u) = exp(u) - 1 - u and
M = beta p + (1 - beta) q. E and K are of each row by itself: their formulas leave out the row's
index, values are [N], and gradients [N, K].

Each function is one line: its docstring is the formula, its body the same formula, and nothing
more. Where a formula has two forms the body is the first one, but of K0 and K2 the second, which is
`kl`; D4 runs the second of D2 and D3. So the lines overflow where exp does, from logits of 88 in
float32. `sxe` has the arithmetic that does not: `jax.grad(sxe.softmax_cross_entropy)(x, y).T` is D9
at every magnitude. `LINES` and `ROW_LINES` say what each line is compared with and what it assumes;
`python -m sxe check` measures them all. A line raises ValueError where its arrays are not all
[N, K], because NumPy would broadcast labels [N].

>>> import jax
>>> x, y = jnp.array([[1.0, 2.0, 0.5]]), jnp.array([[0.0, 1.0, 0.0]])
>>> bool(jnp.allclose(d9(x, y), jax.grad(d0)(x, y).T))
True
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

ClosedForm = Callable[..., Array]


def softmax(x: Array) -> Array:
    """s_k(x_i) = exp(x_ik) / sum_h exp(x_ih)"""
    # Not jax.nn.softmax: it brings a rule of its own, so that autodiff of it would be D4 already.
    return jnp.exp(x) / jnp.sum(jnp.exp(x), axis=1, keepdims=True)


def kl(p: Array, q: Array) -> Array:
    """KL(p || q) = sum_k p_k phi(u_k), with u_k = log q_k - log p_k and phi(u) = exp(u) - 1 - u"""
    # It is sum_k p_k (log p_k - log q_k), for sum_k p_k (exp(u_k) - 1) = sum_k (q_k - p_k) = 0.
    # No term is negative here, so that the sum does not cancel where p and q nearly agree. phi as
    # it is written cancels there: sxe has a series for it.
    u = jnp.log(q) - jnp.log(p)
    phi = jnp.exp(u) - 1 - u
    return jnp.sum(p * phi, axis=1)


def mixture(p: Array, q: Array, beta: Array | float) -> Array:
    """M = beta p + (1 - beta) q"""
    if jnp.ndim(beta) != 0:
        raise ValueError(f"beta: expected one number, got shape {jnp.shape(beta)}")
    return beta * p + (1 - beta) * q


def _line_of_x(formula: ClosedForm) -> ClosedForm:
    """The line, for x that fits."""

    @functools.wraps(formula)
    def line(x: Array) -> Array:
        return formula(_logits(x))

    return line


def _line_of_xy(formula: ClosedForm) -> ClosedForm:
    """The line, for x and y that fit alone."""

    @functools.wraps(formula)
    def line(x: Array, y: Array) -> Array:
        x, y = _logits(x), jnp.asarray(y)
        if y.shape != x.shape:
            raise ValueError(
                f"y: expected targets [N, K] as the logits are, {x.shape}, got {y.shape}; "
                f"of labels [N] pass jax.nn.one_hot(y, {x.shape[1]})"
            )
        return formula(x, y)

    return line


def _line_of_xz(formula: ClosedForm) -> ClosedForm:
    """The line, for x and z that fit alone."""

    @functools.wraps(formula)
    def line(x: Array, z: Array, **beta: Array | float) -> Array:
        x, z = _logits(x), jnp.asarray(z)
        if z.shape != x.shape:
            raise ValueError(
                f"z: expected target logits [N, K] as the logits are, {x.shape}, got {z.shape}"
            )
        return formula(x, z, **beta)

    return line


def _logits(x: Array) -> Array:
    x = jnp.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"x: expected logits [N, K], got shape {x.shape}")
    return x


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


@_line_of_x
def e0(x: Array) -> Array:
    """H = -sum_k q_k log q_k = log S - sum_k q_k x_k"""
    q = softmax(x)
    return -jnp.sum(q * jnp.log(q), axis=1)


@_line_of_x
def e1(x: Array) -> Array:
    """-q_l (log q_l + H) = q_l (sum_k q_k x_k - x_l)"""
    q, H = softmax(x), e0(x)[:, None]
    return -q * (jnp.log(q) + H)


@_line_of_xz
def k0(x: Array, z: Array) -> Array:
    """sum_k p_k (log p_k - log q_k) = sum_k p_k phi(u_k)"""
    q, p = softmax(x), softmax(z)
    return kl(p, q)


@_line_of_xz
def k1(x: Array, z: Array) -> Array:
    """q_l - p_l = p_l (exp(u_l) - 1)"""
    q, p = softmax(x), softmax(z)
    return q - p


@_line_of_xz
def k2(x: Array, z: Array) -> Array:
    """sum_k q_k (log q_k - log p_k) = sum_k q_k phi(-u_k)"""
    q, p = softmax(x), softmax(z)
    return kl(q, p)


@_line_of_xz
def k3(x: Array, z: Array) -> Array:
    """q_l (u_l - KL(q || p))"""
    q, p = softmax(x), softmax(z)
    u = jnp.log(q) - jnp.log(p)
    return q * (u - kl(q, p)[:, None])


@_line_of_xz
def k4(x: Array, z: Array, *, beta: Array | float = 0.5) -> Array:
    """beta KL(p || M) + (1 - beta) KL(q || M)"""
    q, p = softmax(x), softmax(z)
    M = mixture(p, q, beta)
    return beta * kl(p, M) + (1 - beta) * kl(q, M)


@_line_of_xz
def k5(x: Array, z: Array, *, beta: Array | float = 0.5) -> Array:
    """(1 - beta) q_l (log q_l - log M_l - KL(q || M))"""
    q, p = softmax(x), softmax(z)
    M = mixture(p, q, beta)
    return (1 - beta) * q * (jnp.log(q) - jnp.log(M) - kl(q, M)[:, None])


class Line(NamedTuple):
    """A line of the derivation, what it is compared with, and where they are equal.

    Attributes:
      name: "D0" to "D9", "E0" to "K5".
      formula: the line as text.
      closed_form: the line as a function.
      takes: the names of its arguments: x and y of a D line, x of an E line, x and z of a K line,
        and beta.
      compared_with: the reference that has to give the same numbers, as text.
      assumption: what the line needs to be true, as text.
      entries: einsum subscripts, from the indices of the reference to those of the line.
      kept: a function of x that gives a mask of the entries which the assumption keeps; None: all.
    """

    name: str
    formula: str
    closed_form: ClosedForm
    takes: tuple[str, ...]
    compared_with: str
    assumption: str
    entries: str
    kept: Callable[[Array], Array] | None = None


def _line(closed_form: ClosedForm, compared_with: str, assumption: str, entries: str) -> Line:
    name, formula = closed_form.__name__.upper(), closed_form.__doc__ or ""
    takes = tuple(inspect.signature(closed_form).parameters)
    return Line(name, formula, closed_form, takes, compared_with, assumption, entries)


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
    _line(d9, "(grad of D0)^T", "sum_k y_jk = 1", "lj->lj"),
)
ROW_LINES = (  # the gradients are of the rows' sum: row j of it is that of row j's value
    _line(e0, "sxe's entropy", "none", "j->j"),
    _line(e1, "grad of E0", "none", "jl->jl"),
    _line(k0, "sxe's KL(p || q)", "none", "j->j"),
    _line(k1, "grad of K0", "none", "jl->jl"),
    _line(k2, "sxe's KL(q || p)", "none", "j->j"),
    _line(k3, "grad of K2", "none", "jl->jl"),
    _line(k4, "sxe's JS", "0 < beta < 1", "j->j"),
    _line(k5, "grad of K4", "0 < beta < 1", "jl->jl"),
)
