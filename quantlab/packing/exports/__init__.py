"""Packed models in the formats of other projects, where they can hold them exactly."""
