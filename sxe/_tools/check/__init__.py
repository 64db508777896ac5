"""``python -m sxe check``: measure the derivation, the rules and the precision of the losses."""
