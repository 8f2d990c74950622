"""Arithmetic that client and service share: normalizing a batch, its moments and how they are merged, input checks.

It imports numpy and, of this package, only `wire`; torch is imported by `kernels.torch` only.
"""
