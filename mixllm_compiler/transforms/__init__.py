"""Function-preserving transforms of a linear's input, as plain mathematics."""
