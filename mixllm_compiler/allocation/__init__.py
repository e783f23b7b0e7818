"""Which width each output feature of a model gets."""
