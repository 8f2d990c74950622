"""Everything that knows uvicorn's insides: requests and responses without ASGI, deadlines, pipelining, writes."""
