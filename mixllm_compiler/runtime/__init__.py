"""What outlives one compilation: caches by weight identity, built kernels, records."""
