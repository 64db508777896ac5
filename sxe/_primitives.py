"""JAX primitives that call an inner program (a jaxpr), with transformation rules of their own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe

from sxe._arrays import jvp_of_moved


class CallPrimitive(Primitive):
    """A primitive whose parameter ``call_jaxpr`` is an inner program."""

    multiple_results = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.def_impl(self.run)
        self.def_abstract_eval(lambda *inputs, call_jaxpr, **params: call_jaxpr.out_avals)
        mlir.register_lowering(self, mlir.lower_fun(self.run, multiple_results=True))

    def run(self, *inputs: Any, call_jaxpr: Any, **params: Any) -> Any:
        """Evaluates the inner program."""
        return jaxpr_as_fun(call_jaxpr)(*inputs)

    def bind(self, *inputs: Any, subfuns: tuple[Any, ...] = (), **params: Any) -> Any:
        # ``subfuns`` comes from checkify. For a primitive that it does not know, checkify rewrites
        # the inner program, with the error as an argument, and passes it here.
        if subfuns:
            return subfuns[0].call_wrapped(*inputs)
        return super().bind(*inputs, **params)


class TransparentCall(CallPrimitive):
    """A call that JAX transforms as it would transform the equations of the inner program."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        batching.primitive_batchers[self] = self.batch
        ad.primitive_jvps[self] = _jvp
        pe.dce_rules[self] = _without_dead_code

    def of(self, f: Callable[..., Any], *inputs: Any, **params: Any) -> Any:
        """Computes f(*inputs) as a single equation with these additional parameters."""
        leaves, tree = jax.tree.flatten(inputs)

        def of_leaves(*leaves: Any) -> Any:
            return f(*jax.tree.unflatten(tree, leaves))

        call_jaxpr, shapes = jax.make_jaxpr(of_leaves, return_shape=True)(*leaves)
        outputs = self.bind(*leaves, call_jaxpr=call_jaxpr, **params)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    def batch(self, inputs: Any, axes: Any, *, call_jaxpr: Any, **params: Any) -> tuple[Any, Any]:
        """The batching rule: the outputs for all examples, and their batch axes."""
        outputs = jax.vmap(jaxpr_as_fun(call_jaxpr), axes)(*inputs)
        return outputs, [0] * len(outputs)


def _jvp(primals: Any, tangents: Any, *, call_jaxpr: Any, **params: Any) -> tuple[Any, Any]:
    dots = tuple(SymbolicZero(t.aval) if isinstance(t, ad.Zero) else t for t in tangents)
    outputs, dots = jvp_of_moved(jaxpr_as_fun(call_jaxpr), tuple(primals), dots)
    return outputs, [
        dot if jnp.issubdtype(x.dtype, jnp.floating) else ad.Zero(jax.typeof(x).to_tangent_aval())
        for x, dot in zip(outputs, dots, strict=True)
    ]


def _without_dead_code(*given: Any) -> tuple[Any, Any]:
    """The rule of JAX's own calls. Some versions of JAX pass it one more argument."""
    used, equation = pe.dce_jaxpr_closed_call_rule(*given)
    if equation is None:
        return used, None
    # The rules of this primitive don't fit the reduced call, which has other inputs and outputs.
    # ``_undivided_p`` has only the general rules.
    call_jaxpr = equation.params["call_jaxpr"]
    return used, equation.replace(primitive=_undivided_p, params={"call_jaxpr": call_jaxpr})


_undivided_p = TransparentCall("undivided")


def undivided(f: Callable[..., Any], *inputs: Any) -> Any:
    """Computes f(*inputs) so that JAX's partial evaluation does not split f into two parts.

    JAX would split a loop of the forward pass into a part before differentiation and one after it,
    and keep a widened copy of the arrays that the loop reads.
    """
    return _undivided_p.of(f, *inputs)
