"""Softmax cross-entropy for JAX, with its gradient in closed form."""

from sxe import derivation
from sxe._call.reduction import Metrics
from sxe._linear_softmax_cross_entropy import linear_softmax_cross_entropy
from sxe._mesh import over_mesh
from sxe._plan.plan import Plan, plan
from sxe._softmax_cross_entropy import softmax_cross_entropy, softmax_cross_entropy_with_gradient

__all__ = [  # what python -m pydoc sxe documents
    "Metrics",
    "Plan",
    "derivation",
    "linear_softmax_cross_entropy",
    "over_mesh",
    "plan",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_gradient",
]
