"""The recipes that are installed with quantlab."""
