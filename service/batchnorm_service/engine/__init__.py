"""Arithmetic only: pure functions over an immutable `LayerState`. It knows no HTTP and no store.

`normalize` computes on batches, `statistics` folds what a batch leaves behind, `state` is what a layer is.
"""
