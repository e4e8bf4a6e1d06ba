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

from jaxalign.errors import UserError
from jaxalign.judging.attempts import Trouble
from jaxalign.judging.replies import Post, Reply


__all__ = ["posting"]

_LEFT_OUT = ("host", "connection", "accept-encoding", "content-length", "x-stainless")
"""Headers that aiohttp has its own of, and what the client tells of this machine."""

_CONNECT_SECONDS = 30.0


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
    Raises:
      UserError: the environment holds what no header can.
    """
    url, headers = await _request(base_url, key, timeout)
    # Headers are not the session's: those it would show to a proxy too, with the key.
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=concurrency),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(
            total=timeout, sock_connect=min(timeout, _CONNECT_SECONDS)
        ),
        proxy=proxy,
    )

    async def post(body: bytes) -> Reply:
        try:
            async with session.post(
                url, data=body, headers=headers, allow_redirects=False
            ) as reply:
                return Reply(reply.status, reply.headers, await reply.read())
        except aiohttp.ConnectionTimeoutError:
            reason = f"no connection in {min(timeout, _CONNECT_SECONDS):g} s"
            raise Trouble(reason, unreached=True) from None
        except TimeoutError:
            reason = "time-out: no whole reply in judge.timeout seconds"
            raise Trouble(reason) from None
        except aiohttp.ClientHttpProxyError as error:
            # Its text has the proxy's URL, which may hold a password.
            reason = f"the proxy of the environment answers HTTP {error.status}"
            raise Trouble(reason, fate="run") from None
        except (aiohttp.ClientError, OSError) as error:
            unreached = isinstance(error, aiohttp.ClientConnectorError)
            what = "no connection" if unreached else "broken connection"
            raise Trouble(f"{what}: {error}", unreached=unreached) from None

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
    try:
        async with httpx2.AsyncClient(transport=nowhere, trust_env=False) as http:
            client = openai.AsyncOpenAI(
                base_url=base_url, api_key=key, timeout=timeout, http_client=http
            )
            await client.post("/chat/completions", cast_to=httpx2.Response, body={})
    except ValueError as error:  # of characters
        raise UserError(
            f"no request can be made for {base_url}: {error}. Check what the variables "
            "OPENAI_ORG_ID and OPENAI_PROJECT_ID hold"
        ) from None
    (request,) = made
    headers = {
        name: value
        for name, value in request.headers.items()
        if not name.lower().startswith(_LEFT_OUT)
    }
    if unsendable := [n for n, v in headers.items() if not v.isprintable()]:
        raise UserError(
            f"the headers {', '.join(unsendable)} hold characters that cannot be sent: "
            "check the variables OPENAI_ORG_ID and OPENAI_PROJECT_ID"
        )
    return str(request.url), headers
