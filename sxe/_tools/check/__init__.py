"""``python -m sxe check``: the derivation, the rules and the precision of the loss, measured."""
