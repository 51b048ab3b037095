"""The stages of a run: each knows its key, how to compute its files and how to read them back."""
