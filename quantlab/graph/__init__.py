"""Capture a model's forward as one graph, find its sites, rewrite it, and run it in the model's place."""
