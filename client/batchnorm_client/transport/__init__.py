"""HTTP for both clients: requests for httpcore and httpx, pools per process, deadlines, proxies.

Imported only when a client is made: importing httpx takes longer than importing all the rest.
"""
