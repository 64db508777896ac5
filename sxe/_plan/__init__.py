"""What a call of the head would do, from its sizes alone."""
