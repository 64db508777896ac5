"""What is computed of rows of logits: their state, their targets, and the functions of both."""
