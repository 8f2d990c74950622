"""Arithmetic: pure functions on an immutable `LayerState`, without HTTP or a store.

`normalize` normalizes batches, `running_statistics` folds their moments, `state` defines a layer's state.
"""
