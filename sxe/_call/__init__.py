"""From a caller's arguments to rows, and from the results of rows to what the caller gets."""
