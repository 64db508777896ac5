"""Which way a call of the head takes: where gradients are computed, and which rows are run."""

from typing import Final, Literal

from sxe._backend import Backend

GradientPath = Literal["gradients in the forward pass", "logits again in the backward pass"]
FORWARD: Final = "gradients in the forward pass"
AGAIN: Final = "logits again in the backward pass"


def gradient_path(rule: str, reduction: str) -> GradientPath:
    """The path of a call with that rule and that reduction.

    The forward pass can go on to the gradients where it knows how much each row counts, which it
    does for a sum. Rules other than "vjp" leave the gradients to JAX, which computes the logits of
    each chunk again.
    """
    return FORWARD if rule == "vjp" and reduction != "none" else AGAIN


def skips_rows(rule: str, backend: Backend) -> bool:
    """Whether rows that do not count are left out, where a chunk can be made of the others.

    Rows that several devices hold would be gathered, if they were sorted. Rules other than "vjp"
    leave the loop over chunks to JAX, which has no reverse mode for a number of steps that is not
    known.
    """
    return rule == "vjp" and backend.is_local
