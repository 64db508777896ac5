"""The differentiation rules of row functions: "vjp", "jvp" and "autodiff"."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from sxe._arrays import AxisName, equal_shares, psum, sum_of_shares, vary_like, wide
from sxe._backend import Backend
from sxe._rows import twins
from sxe._rows.normalizer import Normalizer, is_top, merge_over, normalize_tile
from sxe._rows.targets import Sparse


class Weighed(NamedTuple):
    """The terms that rows contribute to a weighted sum, and the derivatives of the sum.

    Attributes:
      value: the term of each row, [...].
      g: the derivatives with respect to the results of each row. None is 0.
      d_weight: the derivative with respect to the row weights, [...].
      d_z: the derivative with respect to the weight of the z-loss, a scalar, or None.
    """

    value: Array
    g: Any
    d_weight: Array
    d_z: Array | None


class RowFunction(Protocol):
    """A function of rows of logits that depends on their softmax, with its derivatives.

    Logits x are a tile [..., K]: all classes of the rows, or one shard of the classes. Results,
    parts and states are named tuples of arrays [...]. Only these methods contain the mathematics of
    a function. All functions share the differentiation rules, the code for meshes, and the head
    (the fused final linear layer and loss).
    """

    @property
    def axis_name(self) -> AxisName:
        """The mesh axes over which the classes are sharded."""

    @property
    def backend(self) -> Backend:
        """The backend that the function runs on."""

    def is_infinite(self, x: Array, targets: Any, /) -> Array:
        """Whether this tile makes a result infinite, for rows that have a softmax, bool [...].

        Such a row has a class in the tile that cannot occur, although its target is not 0.
        """

    def tile(self, x: Array, targets: Any, /) -> Any:
        """The part: what the classes of a tile contribute to each row. ``merge`` takes it."""

    def merge(self, part: Any, targets: Any, /) -> tuple[Any, Any]:
        """The results, and the state for the gradient, from the parts of this and other shards."""

    def gradient(self, x: Array, targets: Any, state: Any, g: Any, /) -> Array:
        """The gradient for the logits, from the cotangents g of the results, float32 or float64.

        The first cotangent is an array. Others may be None, which means 0.
        """

    def target_gradient(self, x: Array, targets: Any, state: Any, g: Any, /) -> Any:
        """The gradients for the targets, from the same cotangents."""

    def target_tangent(self, x: Array, targets: Any, state: Any, t_dot: Any, /) -> Any:
        """The tangents of the results, from the tangents of the targets.

        Some target tangents may be symbolic zeros. A result that has no derivative, or that is not
        requested, has the tangent None.
        """

    def primal(self, x: Array, targets: Any, /) -> Any:
        """The results of whole rows, in a form whose derivative by JAX is accurate.

        It must not use a function with a custom differentiation rule.
        """

    def weigh(self, results: Any, weight: Array, z_loss: Array | None, /) -> Weighed:
        """The terms of a sum of rows with these weights [...], and its derivatives."""


def results_and_state(f: RowFunction, x: Array, targets: Any) -> tuple[Any, Any]:
    return f.merge(f.tile(x, targets), targets)


def values_and_wanted(*inputs: Any) -> tuple[Any, Any]:
    """The values of the inputs of a rule with symbolic zeros, and whether each is differentiated.

    JAX may take the structure of a rule's residuals from another call of the same function, where
    other inputs were differentiated. So a rule always returns residuals with the same structure,
    and uses empty arrays for gradients that are not needed.
    """
    leaves, tree = jax.tree.flatten(inputs, is_leaf=lambda p: isinstance(p, CustomVJPPrimal))
    values, perturbed = ([getattr(p, name) for p in leaves] for name in ("value", "perturbed"))
    return jax.tree.unflatten(tree, values), jax.tree.unflatten(tree, perturbed)


def instantiate(g: Any) -> Array:
    return jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g


def cotangents(g: Any) -> Any:
    """The cotangents of the results, as ``RowFunction.gradient`` expects them."""
    first, *others = g
    others = [None if isinstance(a, SymbolicZero) else a for a in others]
    return type(g)(instantiate(first), *others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rows_vjp(f: RowFunction, x: Array, targets: Any) -> Any:
    """The results of rows, with a closed-form gradient in reverse mode."""
    return results_and_state(f, x, targets)[0]


def _rows_fwd(f: RowFunction, x: Any, targets: Any) -> tuple[Any, tuple[Array, Any, Any]]:
    (x, targets), _ = values_and_wanted(x, targets)
    results, state = results_and_state(f, x, targets)
    return results, (x, targets, state)


def _rows_bwd(f: RowFunction, res: tuple[Array, Any, Any], g: Any) -> tuple[Array, Any]:
    x, targets, state = res
    g = sum_of_shares(cotangents(g), f.axis_name)
    d_x = f.gradient(x, targets, state, g).astype(x.dtype)
    d_targets = f.target_gradient(x, targets, state, g)
    return d_x, own_targets(d_targets, x.ndim, f.axis_name)


def own_targets(d_targets: Any, ndim: int, axis_name: AxisName) -> Any:
    """The gradients for targets that one shard of the classes returns.

    ``ndim`` is the number of axes of the logits. Each shard has its own targets [..., K]. Targets
    [...] and several labels, [..., M], are replicated, and each shard returns an equal share.
    """

    def own(d: Any) -> Any:
        is_shards = not isinstance(d, Sparse) and d.ndim == ndim
        return d if is_shards else equal_shares(d, axis_name)

    return jax.tree.map(own, d_targets, is_leaf=lambda d: isinstance(d, Sparse))


rows_vjp.defvjp(_rows_fwd, _rows_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def rows_jvp(f: RowFunction, x: Array, targets: Any) -> Any:
    """The results of rows, with a closed-form derivative in forward and reverse mode."""
    return results_and_state(f, x, targets)[0]


def _rows_jvp_rule(
    f: RowFunction, primals: tuple[Array, Any], tangents: tuple[Any, Any]
) -> tuple[Any, Any]:
    (x, targets), (x_dot, targets_dot) = primals, tangents
    results, state = results_and_state(f, x, targets)
    results_dot = f.target_tangent(x, targets, state, targets_dot)
    moves = not isinstance(x_dot, SymbolicZero)
    # Cast x_dot only once, so that the transposed cast rounds the gradient only once.
    x_dot = wide(x_dot) if moves else x_dot
    dots = []
    for i, dot in enumerate(results_dot):
        if results[i] is None:
            pass
        elif dot is None:
            dot = jnp.zeros_like(results[i])
        elif moves:
            one: list[Array | None] = [jnp.zeros_like(results[0]), *(None for _ in results[1:])]
            one[i] = jnp.ones_like(results[i])
            d = f.gradient(x, targets, state, type(results)(*one))
            dot = dot + psum(jnp.sum(d * x_dot, axis=-1), f.axis_name)
        dots.append(dot)
    return results, type(results)(*dots)


rows_jvp.defjvp(_rows_jvp_rule, symbolic_zeros=True)


def rows_autodiff(f: RowFunction, x: Array, targets: Any) -> Any:
    """The results of rows, which JAX differentiates by itself."""
    return f.primal(x, targets)


def move_confident(
    x: Array, axis_name: AxisName, backend: Backend
) -> tuple[Array, Array, Normalizer]:
    """Logits minus an origin [...] per row, the origin, and the state of the shifted logits.

    The origin is the largest logit. If its probability exceeds 4/7, the origin has a derivative,
    and the shifted logit is a constant 0. The gradient for the largest logit is then a sum over all
    other classes. Without the shift, it would be a difference of two rounded numbers. No custom
    derivative rule is used, because ``jax.experimental.jet`` supports none.
    """
    x = wide(x)
    constant = lax.stop_gradient(x)
    state = merge_over(twins.normalize_constant(constant, backend), axis_name)
    # 0, or NaN in a row that has no softmax. The product makes the derivative NaN in every shard.
    nothing = (state.m - state.m) + (state.r - state.r)
    x = jnp.where(x == -jnp.inf, x, x * (1 + nothing)[..., None])
    top = is_top(x, state)
    largest = psum(jnp.sum(jnp.where(top, x, 0), axis=-1), axis_name)
    origin = jnp.where(state.is_confident, largest, state.m)
    x = jnp.where(top, 0, x - vary_like(origin, x)[..., None])
    moved = merge_over(normalize_tile(x, backend, scale=1), axis_name)
    # The shift rounded x. So take the value of r from before the shift, and its derivative from
    # after it.
    r = state.r + (moved.r - lax.stop_gradient(moved.r))
    return x, origin, Normalizer(moved.m, r)


Rule = Callable[[RowFunction, Array, Any], Any]
RULES: dict[str, Rule] = {"vjp": rows_vjp, "jvp": rows_jvp, "autodiff": rows_autodiff}
