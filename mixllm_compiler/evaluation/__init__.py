"""What quantization did to a model: quality against its float model, and speed."""
