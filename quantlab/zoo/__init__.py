"""The small trained models that ship with quantlab, and the code that trained them."""
