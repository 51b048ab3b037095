"""What is measured before anything is quantized."""
