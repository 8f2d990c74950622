"""Layers in one SQLite file."""
