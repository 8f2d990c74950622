"""uvicorn HTTP protocol with a fast path without ASGI, timeouts, and write coalescing.

Only this package uses uvicorn's internals.
"""
