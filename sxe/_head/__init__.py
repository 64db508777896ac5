"""Hidden states and a kernel to the results of rows, a chunk of rows at a time."""
