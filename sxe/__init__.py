"""Softmax cross-entropy for JAX, with its gradient in closed form."""

from sxe import derivation as derivation
from sxe._linear_softmax_cross_entropy import (
    linear_softmax_cross_entropy as linear_softmax_cross_entropy,
)
from sxe._mesh import over_mesh as over_mesh
from sxe._plan import Plan as Plan
from sxe._plan import plan as plan
from sxe._reduction import Metrics as Metrics
from sxe._softmax_cross_entropy import softmax_cross_entropy as softmax_cross_entropy
from sxe._softmax_cross_entropy import (
    softmax_cross_entropy_with_gradient as softmax_cross_entropy_with_gradient,
)
