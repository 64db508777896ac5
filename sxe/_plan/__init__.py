"""The work of a call of the head, computed from its sizes alone."""
