"""Softmax cross-entropy, log-probabilities, entropy and KL divergences for JAX, in closed form."""

from sxe import derivation
from sxe._call.reduction import LogProbAndEntropy, Metrics
from sxe._kl_divergence import kl_divergence
from sxe._linear_kl_divergence import linear_kl_divergence
from sxe._linear_softmax_cross_entropy import linear_softmax_cross_entropy
from sxe._log_prob_and_entropy import linear_log_prob_and_entropy, log_prob_and_entropy
from sxe._mesh import over_mesh
from sxe._plan.plan import plan
from sxe._plan.result import Plan
from sxe._softmax_cross_entropy import softmax_cross_entropy, softmax_cross_entropy_with_gradient

__all__ = [  # what python -m pydoc sxe documents
    "LogProbAndEntropy",
    "Metrics",
    "Plan",
    "derivation",
    "kl_divergence",
    "linear_kl_divergence",
    "linear_log_prob_and_entropy",
    "linear_softmax_cross_entropy",
    "log_prob_and_entropy",
    "over_mesh",
    "plan",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_gradient",
]
