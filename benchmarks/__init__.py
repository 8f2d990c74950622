"""Reproducible comparisons: each row of the table is a ratio of two sides that were measured in turns."""
