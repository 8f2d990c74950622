"""The part of both clients that does no input or output: calls as `Request` values, responses as results, retries.

    request = calls.train("obs", batch)            what to send, and how to read the response
    attempts = Attempts(request, Retry())          how often to send it, and what a failure means
    attempts.receive(Response(200, headers, body))   the result, or the exception for the response

Nothing here uses an HTTP library; `Client` and `AsyncClient` send the requests. Clock, random numbers, sleep and
threads come from `runtime`.
"""

from batchnorm_client.core.messages import Request, Response
from batchnorm_client.core.retries import Attempts, Retry

__all__ = ["Attempts", "Request", "Response", "Retry"]
