"""The path of a call of the head: in which pass gradients are computed, and which rows are run."""

from typing import Final, Literal

from sxe._backend import Backend

GradientPath = Literal["gradients in the forward pass", "logits again in the backward pass"]
FORWARD: Final = "gradients in the forward pass"
AGAIN: Final = "logits again in the backward pass"


def gradient_path(rule: str, reduction: str) -> GradientPath:
    """The path of a call with this rule and reduction.

    The forward pass can compute the gradients if it knows the weight of each row, which it does for
    a sum. With rules other than "vjp" JAX computes the gradients, and computes the logits of each
    chunk again.
    """
    return FORWARD if rule == "vjp" and reduction != "none" else AGAIN


def skips_rows(rule: str, backend: Backend) -> bool:
    """Whether the head skips rows that do not count, if the other rows can be put into chunks.

    Sorting rows that are sharded over devices would gather them. With rules other than "vjp", JAX
    differentiates the loop over chunks, and it has no reverse mode for an unknown number of steps.
    """
    return rule == "vjp" and backend.is_local
