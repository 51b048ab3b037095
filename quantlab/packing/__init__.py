"""Packed models: files as small as their bits, and integer execution."""
