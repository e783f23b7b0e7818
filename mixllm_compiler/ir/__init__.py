"""The operations a rewritten graph is made of, their meaning, and the graph around them."""
