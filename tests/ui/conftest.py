"""The pages, by ASGI and by the fast path, as a browser asks for them; forms are sent as a browser sends them."""

import re
from html import unescape

import pytest

from rest.conftest import anyio_backend, client, layer, serve, service, way

__all__ = ["anyio_backend", "client", "layer", "page", "serve", "service", "submit", "text_of", "way"]

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


@pytest.fixture
async def page(service):
    """A browser that looks at a service without tokens."""
    async with service.client(**BROWSER) as browser:
        yield browser


def text_of(answer):
    """What a page says, without its tags."""
    body = answer.text.partition("<main")[2].partition("</main>")[0]
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", body.replace("<wbr>", ""))))


async def submit(browser, path, of="", **fields):
    """Send a form with the token of the page `of`."""
    token = ""
    if of:
        token = re.search(r'data-form-token="(\w*)"', (await browser.get(of)).text)[1]
    return await browser.post(path, data={"form_token": token, **fields})
