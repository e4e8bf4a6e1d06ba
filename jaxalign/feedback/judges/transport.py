"""The HTTP below the official client: aiohttp, with little done a call.

The client would bring httpx's own machinery for authentication flows, redirects,
cookies and query strings, which a chat completion has no use for and which is most of
the client's time when thousands of short calls are made. Here its request goes to
aiohttp as it is. Redirects are not followed: the key must not travel to another host.

Imports the extra ``judge``; its parts are imported by :mod:`.openai`.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import httpx2
import openai


__all__ = ["chat_client"]

_SENT = "jaxalign.sent"
"""What aiohttp is given, in a request's extensions."""


class _Direct(httpx2.AsyncClient):
    """An httpx client whose requests aiohttp makes.

    Headers and body of a request go past httpx's own types, which would take them apart
    and put them together several times.
    """

    def __init__(self, session: aiohttp.ClientSession):
        super().__init__(trust_env=False)
        self._session = session
        self._urls: dict[str, httpx2.URL] = {}

    def build_request(
        self,
        method: str,
        url: Any,
        *,
        content: Any = None,
        headers: Any = None,
        **_: Any,
    ) -> httpx2.Request:
        # All calls of a judge go to one URL, and parsing it is a third of the building.
        parsed = self._urls.get(url)
        if parsed is None:
            parsed = self._urls[url] = httpx2.URL(url)
        sent = {"url": url, "headers": headers, "data": content}
        nothing = httpx2.ByteStream(b"")
        return httpx2.Request(method, parsed, stream=nothing, extensions={_SENT: sent})

    async def send(self, request: httpx2.Request, **_: Any) -> httpx2.Response:
        sent = request.extensions[_SENT]
        try:
            async with self._session.request(
                request.method, **sent, allow_redirects=False
            ) as reply:
                content = await reply.read()
        except TimeoutError as error:
            raise httpx2.ReadTimeout(str(error), request=request) from error
        except aiohttp.ClientConnectorError as error:
            raise httpx2.ConnectError(str(error), request=request) from error
        except (aiohttp.ClientError, OSError) as error:
            raise httpx2.NetworkError(str(error), request=request) from error
        # Of a success nobody reads the headers. In a failure's, aiohttp has undone a
        # compression that they would announce again; as bytes, for not all are ASCII.
        kept = None
        if reply.status != 200:
            kept = [
                (name, value)
                for name, value in reply.raw_headers
                if name.lower() not in (b"content-encoding", b"transfer-encoding")
            ]
        return httpx2.Response(
            reply.status, headers=kept, content=content, request=request
        )


@asynccontextmanager
async def chat_client(
    base_url: str, key: str, *, concurrency: int, timeout: float, proxy: str | None
) -> AsyncIterator[openai.AsyncOpenAI]:
    """Give the official client over one pool of connections, without retries.

    Args:
      base_url: of the endpoint.
      key: sent to it.
      concurrency: connections at most.
      timeout: seconds of a whole call, from connecting to the last byte.
      proxy: URL of a proxy, or None.
    """
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=concurrency),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=timeout),
        proxy=proxy,
    )
    async with session, _Direct(session) as http:
        yield openai.AsyncOpenAI(
            base_url=base_url, api_key=key, max_retries=0, http_client=http
        )
