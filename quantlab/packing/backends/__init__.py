"""Integer execution: what a quantized layer computes, in the arithmetic of integer hardware."""
