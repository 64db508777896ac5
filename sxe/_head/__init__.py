"""The head: results of rows from hidden states and a kernel, one chunk of rows at a time."""
