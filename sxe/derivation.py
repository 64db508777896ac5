"""The derivation of the gradients of cross-entropy, entropy and divergences, as code that runs.

Logits x in R^{N x K}: N rows, K classes. Targets y in R^{N x K}. Softmax s_k(x_i) = exp(x_ik) / S
with S = sum_h exp(x_ih). q in R^{N x K} is the matrix of all s_k(x_i). [i=j] is 1 where i = j, and
0 elsewhere.

Lines `d0` ... `d9` derive the gradient of the mean loss. `e0` and `e1` are the entropy H of the
logits x and its gradient. `k0` ... `k5` are divergences between q and p = softmax(z), with target
logits z [N, K], and their gradients. They use u_k = log q_k - log p_k, phi(u) = exp(u) - 1 - u, and
M = beta p + (1 - beta) q. The E and K lines apply to each row separately: their formulas leave out
the row index, their values are [N], and their gradients are [N, K].

Each function is one line of the derivation. Its docstring is the formula, and its body computes the
formula as written. If a formula has two forms, the body computes the first one, with these
exceptions: K0 and K2 compute the second form, `kl`, and D4 computes the second form of D2 and D3.
So the lines overflow where exp overflows, for logits above 88 in float32. The functions of `sxe` do
not: `jax.grad(sxe.softmax_cross_entropy)(x, y).T` is D9 for logits of any magnitude.

`LINES` and `ROW_LINES` list what each line is compared with and what it assumes.
`python -m sxe check` measures all of them. A line raises ValueError if its arrays are not all
[N, K], because labels [N] would broadcast silently.

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
    # The derivative rule of jax.nn.softmax is D4 itself, so it could not check D4 independently.
    return jnp.exp(x) / jnp.sum(jnp.exp(x), axis=1, keepdims=True)


def kl(p: Array, q: Array) -> Array:
    """KL(p || q) = sum_k p_k phi(u_k), with u_k = log q_k - log p_k and phi(u) = exp(u) - 1 - u"""
    # It equals sum_k p_k (log p_k - log q_k), because sum_k p_k (exp(u_k) - 1) = sum_k (q_k - p_k)
    # = 0. No term is negative, so the sum does not cancel where p and q nearly agree. phi as
    # written here still cancels there. sxe computes it by its power series.
    u = jnp.log(q) - jnp.log(p)
    phi = jnp.exp(u) - 1 - u
    return jnp.sum(p * phi, axis=1)


def mixture(p: Array, q: Array, beta: Array | float) -> Array:
    """M = beta p + (1 - beta) q"""
    if jnp.ndim(beta) != 0:
        raise ValueError(f"beta: expected one number, got shape {jnp.shape(beta)}")
    return beta * p + (1 - beta) * q


def _line_of_x(formula: ClosedForm) -> ClosedForm:
    """Makes a line check the shape of x."""

    @functools.wraps(formula)
    def line(x: Array) -> Array:
        return formula(_logits(x))

    return line


def _line_of_xy(formula: ClosedForm) -> ClosedForm:
    """Makes a line check the shapes of x and y."""

    @functools.wraps(formula)
    def line(x: Array, y: Array) -> Array:
        x, y = _logits(x), jnp.asarray(y)
        if y.shape != x.shape:
            raise ValueError(
                f"y: expected targets [N, K] with the logits' shape, {x.shape}, got {y.shape}; "
                f"for labels [N] pass jax.nn.one_hot(y, {x.shape[1]})"
            )
        return formula(x, y)

    return line


def _line_of_xz(formula: ClosedForm) -> ClosedForm:
    """Makes a line check the shapes of x and z."""

    @functools.wraps(formula)
    def line(x: Array, z: Array, **beta: Array | float) -> Array:
        x, z = _logits(x), jnp.asarray(z)
        if z.shape != x.shape:
            raise ValueError(
                f"z: expected target logits [N, K] with the logits' shape, {x.shape}, got {z.shape}"
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
    """A line of the derivation, the reference it is compared with, and the entries to compare.

    Attributes:
      name: "D0" to "D9", "E0", "E1", or "K0" to "K5".
      formula: the line as text.
      closed_form: the line as a function.
      takes: the names of its arguments: x and y for a D line, x for an E line, x and z for a K
        line, and beta for K4 and K5.
      compared_with: the reference that must give the same numbers, as text.
      assumption: the condition under which the line is true, as text.
      entries: einsum subscripts, from the indices of the reference to the indices of the line.
      kept: a function from x to a mask of the entries for which the assumption is true. If None,
        compare all entries.
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
ROW_LINES = (  # row j of the gradient of the rows' sum is the gradient of row j's value
    _line(e0, "sxe's entropy", "none", "j->j"),
    _line(e1, "grad of E0", "none", "jl->jl"),
    _line(k0, "sxe's KL(p || q)", "none", "j->j"),
    _line(k1, "grad of K0", "none", "jl->jl"),
    _line(k2, "sxe's KL(q || p)", "none", "j->j"),
    _line(k3, "grad of K2", "none", "jl->jl"),
    _line(k4, "sxe's JS", "0 < beta < 1", "j->j"),
    _line(k5, "grad of K4", "0 < beta < 1", "jl->jl"),
)
