"""Float rows and their widths in, a `QuantizedWeight` out."""
