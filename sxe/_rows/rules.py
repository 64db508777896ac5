"""How a function of rows becomes differentiable: the rules "vjp", "jvp" and "autodiff"."""

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
from sxe._rows.normalizer import Normalizer, merge_over, normalize_tile
from sxe._rows.targets import Sparse


class Weighed(NamedTuple):
    """What rows add to a sum of rows, [...], and its derivatives.

    Attributes:
      value: [...].
      g: the derivatives with respect to the results. None is 0.
      d_weight: with respect to the rows' weights, [...].
      d_z: of the sum, with respect to the weight of the z-loss, or None.
    """

    value: Array
    g: Any
    d_weight: Array
    d_z: Array | None


class RowFunction(Protocol):
    """A function of rows of logits that is read off their softmax, with its derivatives.

    Logits x are a tile [..., K]: all classes of the rows, or one shard of them. Results, and what a
    merge and a gradient need of each row, are named tuples of arrays [...]. The mathematics of a
    function stands in its methods alone; the rules, the head and the mesh are the same for all.
    """

    @property
    def axis_name(self) -> AxisName:
        """The mesh axes that split the classes."""

    @property
    def backend(self) -> Backend:
        """Where it runs."""

    def tile(self, x: Array, targets: Any, /) -> Any:
        """What the classes of a tile contribute to their rows."""

    def merge(self, part: Any, targets: Any, /) -> tuple[Any, Any]:
        """From the parts of all shards, the results, and the state that a gradient starts from."""

    def gradient(self, x: Array, targets: Any, state: Any, g: Any, /) -> Array:
        """The gradient for a tile from the cotangents g of the results, float32 or float64.

        The first one is an array. Others may be None, for 0.
        """

    def target_gradient(self, x: Array, targets: Any, state: Any, g: Any, /) -> Any:
        """The gradients for the targets, likewise."""

    def target_tangent(self, x: Array, targets: Any, state: Any, t_dot: Any, /) -> Any:
        """The tangents of the results, from those of the targets, some of which are symbolic.

        None is that of a result that has no derivative, or that nobody asks for.
        """

    def primal(self, x: Array, targets: Any, /) -> Any:
        """The results of whole rows, arranged so that JAX's own derivative keeps its digits.

        They may not use a function that has a custom rule.
        """

    def weigh(self, results: Any, weight: Array, z_loss: Array | None, /) -> Weighed:
        """What each row of that weight [...] adds to a sum of rows, and its derivatives."""


def results_and_state(f: RowFunction, x: Array, targets: Any) -> tuple[Any, Any]:
    return f.merge(f.tile(x, targets), targets)


def values_and_wanted(*inputs: Any) -> tuple[Any, Any]:
    """The values, and whether each is differentiated, of what a rule with symbolic zeros is given.

    JAX may take the structure of the residuals from another call of the same function, in which
    other inputs were differentiated. So a rule has one structure for them, and empty arrays for
    gradients that are not wanted.
    """
    leaves, tree = jax.tree.flatten(inputs, is_leaf=lambda p: isinstance(p, CustomVJPPrimal))
    values, perturbed = ([getattr(p, name) for p in leaves] for name in ("value", "perturbed"))
    return jax.tree.unflatten(tree, values), jax.tree.unflatten(tree, perturbed)


def instantiate(g: Any) -> Array:
    return jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g


def cotangents(g: Any) -> Any:
    """The results' cotangents as ``RowFunction.gradient`` takes them: the first one as an array."""
    first, *others = g
    others = [None if isinstance(a, SymbolicZero) else a for a in others]
    return type(g)(instantiate(first), *others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rows_vjp(f: RowFunction, x: Array, targets: Any) -> Any:
    """The results of rows, with their gradient in closed form. For reverse mode."""
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
    """What a shard of the classes gives of the gradients for targets of logits with so many axes.

    Targets [..., K] are a shard's own. All shards have the same of those that are [...], and of
    several labels, [..., M].
    """

    def own(d: Any) -> Any:
        is_shards = not isinstance(d, Sparse) and d.ndim == ndim
        return d if is_shards else equal_shares(d, axis_name)

    return jax.tree.map(own, d_targets, is_leaf=lambda d: isinstance(d, Sparse))


rows_vjp.defvjp(_rows_fwd, _rows_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def rows_jvp(f: RowFunction, x: Array, targets: Any) -> Any:
    """The results of rows, with their derivative in closed form. For forward mode too."""
    return results_and_state(f, x, targets)[0]


def _rows_jvp_rule(
    f: RowFunction, primals: tuple[Array, Any], tangents: tuple[Any, Any]
) -> tuple[Any, Any]:
    (x, targets), (x_dot, targets_dot) = primals, tangents
    results, state = results_and_state(f, x, targets)
    results_dot = f.target_tangent(x, targets, state, targets_dot)
    moves = not isinstance(x_dot, SymbolicZero)
    x_dot = wide(x_dot) if moves else x_dot  # once, so that its transpose rounds once
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
    """The results of rows, which JAX differentiates itself."""
    return f.primal(x, targets)


def move_confident(
    x: Array, axis_name: AxisName, backend: Backend
) -> tuple[Array, Array, Normalizer]:
    """Logits less an origin [...] of their row; the origin; and the row's state, from there.

    The origin is the maximum of the row, where it holds over four sevenths of the probability.

    As logits stand, the gradient at a confident label is the difference of two numbers that are
    rounded. Here the maximum is a constant 0, and its gradient is the sum of all others'. No part
    of this has a custom rule, or ``jax.experimental.jet`` could not differentiate it.
    """
    x = wide(x)
    constant = lax.stop_gradient(x)
    state = merge_over(twins.normalize_constant(constant, backend), axis_name)
    # 0, or NaN in a row without a distribution: it is NaN then in every shard's derivative, too.
    nothing = (state.m - state.m) + (state.r - state.r)
    x = jnp.where(x == -jnp.inf, x, x * (1 + nothing)[..., None])
    # With r below 3/4 all other logits are smaller by log(4/3) or more. It would not do to look for
    # x = m: XLA may compute the logits again here, and round them in another way.
    confident = (state.r < 0.75) & (state.m > -jnp.inf)
    top = (x >= state.m[..., None] - 0.25) & confident[..., None]
    largest = psum(jnp.sum(jnp.where(top, x, 0), axis=-1), axis_name)
    origin = jnp.where(confident, largest, state.m)
    x = jnp.where(top, 0, x - vary_like(origin, x)[..., None])
    moved = merge_over(normalize_tile(x, backend, scale=1), axis_name)
    # The move rounded x. r has the value from before it, and the derivative from after it.
    r = state.r + (moved.r - lax.stop_gradient(moved.r))
    return x, origin, Normalizer(moved.m, r)


Rule = Callable[[RowFunction, Array, Any], Any]
RULES: dict[str, Rule] = {"vjp": rows_vjp, "jvp": rows_jvp, "autodiff": rows_autodiff}
