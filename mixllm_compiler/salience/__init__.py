"""How much the loss grows when an output feature is stored in a format."""
