"""Functions of rows of logits: normalizer states, targets, losses and their gradients."""
