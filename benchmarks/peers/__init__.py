"""Other model servers, each in an environment of its own, each with the wire form that suits it best.

They normalize with numpy, which on 8 KiB is faster than torch, and keep no state.
"""
