"""Arithmetic that both sides run, with numpy and with torch: normalizing a batch, and merging moments."""
