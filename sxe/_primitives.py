"""Primitives around an inner program, for rules of our own for what JAX does with a call."""

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
        """The outputs."""
        return jaxpr_as_fun(call_jaxpr)(*inputs)

    def bind(self, *inputs: Any, subfuns: tuple[Any, ...] = (), **params: Any) -> Any:
        # From checkify, which rewrites the inner program of a primitive that it does not know: that
        # program, with the error as an argument.
        if subfuns:
            return subfuns[0].call_wrapped(*inputs)
        return super().bind(*inputs, **params)


class TransparentCall(CallPrimitive):
    """One with the rules that JAX would apply to the equations of the inner program."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        batching.primitive_batchers[self] = self.batch
        ad.primitive_jvps[self] = _jvp
        pe.dce_rules[self] = _without_dead_code

    def of(self, f: Callable[..., Any], *inputs: Any, **params: Any) -> Any:
        """f(*inputs) as one equation with these parameters besides."""
        leaves, tree = jax.tree.flatten(inputs)

        def of_leaves(*leaves: Any) -> Any:
            return f(*jax.tree.unflatten(tree, leaves))

        call_jaxpr, shapes = jax.make_jaxpr(of_leaves, return_shape=True)(*leaves)
        outputs = self.bind(*leaves, call_jaxpr=call_jaxpr, **params)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    def batch(self, inputs: Any, axes: Any, *, call_jaxpr: Any, **params: Any) -> tuple[Any, Any]:
        """The outputs for all examples, and their axes of examples."""
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
    """The rule of JAX's own calls, which some versions of JAX give an argument more."""
    used, equation = pe.dce_jaxpr_closed_call_rule(*given)
    if equation is None:
        return used, None
    # What is left has other inputs and outputs than the call had, for which its rules are made.
    call_jaxpr = equation.params["call_jaxpr"]
    return used, equation.replace(primitive=_undivided_p, params={"call_jaxpr": call_jaxpr})


_undivided_p = TransparentCall("undivided")


def undivided(f: Callable[..., Any], *inputs: Any) -> Any:
    """f(*inputs), which JAX does not divide into a part before differentiation and one after it.

    It would divide a loop of a forward pass, and keep a widened copy of what the loop reads.
    """
    return _undivided_p.of(f, *inputs)
