"""From the arguments of a call to rows, and from the results of rows to the result of the call."""
