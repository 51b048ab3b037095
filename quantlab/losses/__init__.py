"""Calibration losses."""
