"""Arithmetic that client and service share: normalizing a batch, its moments and how they are merged, input checks.

Imports numpy; torch only in `kernels.torch`; of this package nothing but `wire`.
"""
