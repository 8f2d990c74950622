"""HTTP for both clients: requests for httpcore and httpx, pools per process, deadlines, proxies.

Imported when a client is made and not before: httpx takes longer to import than all the rest.
"""
