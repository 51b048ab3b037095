"""Quantizer arithmetic, quantizers, quantized layers and accounting."""
