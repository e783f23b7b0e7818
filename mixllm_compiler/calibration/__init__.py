"""Text to score and to calibrate on: files, sequences, or what the model itself writes."""
