"""``python -m sxe check``: measures the derivation, the rules and the precision of the losses."""
