"""The HTTP of a judge's calls: the official client's request, sent by aiohttp.

All calls of a judge are one request with different bodies. The official client makes
it once: the URL, the key, the organisation and project of the environment. Every call
through the client would take as long as all else that is done for it, so the bodies go
to aiohttp, the transport that the client's documentation names for many calls at a
time. Redirects are not followed: the key must not travel to another host.

Imports the extra ``judge``; its parts are imported by :mod:`.openai`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import httpx2
import openai

from jaxalign.feedback.judges import endpoint
from jaxalign.feedback.judges.attempts import Trouble
from jaxalign.feedback.judges.replies import Post, Reply


__all__ = ["posting"]

_LEFT_OUT = ("host", "connection", "accept-encoding", "content-length", "x-stainless")
"""Headers that aiohttp has its own of, and what the client tells of this machine."""


@asynccontextmanager
async def posting(
    base_url: str, key: str, *, concurrency: int, timeout: float, proxy: str | None
) -> AsyncIterator[Post]:
    """Give what posts the body of a chat completion, over one pool of connections.

    It returns whatever is answered, and raises Trouble where there is no whole reply.

    Args:
      base_url: of the endpoint.
      key: sent to it.
      concurrency: connections at most.
      timeout: seconds of a whole call, from connecting to the last byte.
      proxy: URL of a proxy, or None.
    """
    url, headers = await _request(base_url, key, timeout)
    session = aiohttp.ClientSession(
        headers=headers,
        connector=aiohttp.TCPConnector(limit=concurrency),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=timeout),
        proxy=proxy,
    )

    async def post(body: bytes) -> Reply:
        try:
            async with session.post(url, data=body, allow_redirects=False) as reply:
                return Reply(reply.status, reply.headers, await reply.read())
        except TimeoutError:
            reason = "time-out: no whole reply in judge.timeout seconds"
            raise Trouble(reason) from None
        except (aiohttp.ClientError, OSError) as error:
            unreached = isinstance(error, aiohttp.ClientConnectorError)
            what = "no connection" if unreached else "broken connection"
            said = endpoint.without_key(str(error), key)
            raise Trouble(f"{what}: {said}", unreached=unreached) from None

    async with session:
        yield post


async def _request(
    base_url: str, key: str, timeout: float
) -> tuple[str, dict[str, str]]:
    """Return URL and headers of the official client's chat completions; send none."""
    made: list[httpx2.Request] = []

    def keep(request: httpx2.Request) -> httpx2.Response:
        made.append(request)
        return httpx2.Response(200, json={})

    nowhere = httpx2.MockTransport(keep)
    async with httpx2.AsyncClient(transport=nowhere, trust_env=False) as http:
        client = openai.AsyncOpenAI(
            base_url=base_url, api_key=key, timeout=timeout, http_client=http
        )
        await client.post("/chat/completions", cast_to=httpx2.Response, body={})
    (request,) = made
    headers = {
        name: value
        for name, value in request.headers.items()
        if not name.lower().startswith(_LEFT_OUT)
    }
    return str(request.url), headers
