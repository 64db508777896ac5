"""Where the gradients of hidden states and kernel are computed."""

from typing import Final, Literal

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
