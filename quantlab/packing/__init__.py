<<<<<<< HEAD
"""Quantized models as small files: codes at their own bits, and everything that is needed to run them again."""
=======
"""Packed models: files as small as their bits, and integer execution."""
>>>>>>> intexec
