"""Quantized models as small files: codes at their own bits, and everything that is needed to run them again."""
