"""Quantized models as small files, everything that is needed to run them again, and integer execution."""
