"""A judge behind any endpoint that speaks OpenAI's chat completions.

The API's: the request (``messages``, ``response_format`` with a JSON schema), the reply
(``choices[0].message.content``, ``refusal``, ``finish_reason``, ``usage``) and the
status codes, see https://platform.openai.com/docs/api-reference/chat. Ours: which of
its failures is tried again and how often, the repair try, and that nothing which comes
back is bent into a score.

An attempt is one call. A reply outside the schema costs one more attempt in which the
judge is shown its reply and what was wrong with it; after that every attempt is fresh.
If none of the first requests that were answered could be read, the run stops.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any

from jaxalign.data import images
from jaxalign.errors import UserError
from jaxalign.judging import bodies, endpoint, prompts, replies
from jaxalign.judging.attempts import Trouble, backoff
from jaxalign.judging.budget import Budget, cost_of
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.endpoint import Key
from jaxalign.judging.judge import JudgeRequest, Verdict, digest
from jaxalign.judging.legibility import Legibility, bare
from jaxalign.judging.replies import Post


__all__ = ["OpenAIJudge", "make", "settings_of"]

Message = Mapping[str, Any]

_CURE = (
    "Check judge.response_format (json_object or none, where the endpoint does not "
    "keep to a schema), judge.max_reply_tokens and judge.model."
)


def make(
    config: JudgeConfig, *, load_image: Callable[[str], bytes] | None = None
) -> "OpenAIJudge":
    """Return the judge of the options; nothing is sent yet.

    Raises:
      UserError: the client is not installed, or URL or key cannot be used.
    """
    try:
        from jaxalign.judging import transport  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"judge.name openai needs the official client ({error.name} is missing): "
            "pip install 'jaxalign[judge]'"
        ) from None
    url = endpoint.check_base_url(config.base_url or endpoint.OPENAI)
    return OpenAIJudge(
        config, url, endpoint.read_key(url, config.key_variable), load_image
    )


def settings_of(config: JudgeConfig) -> Mapping[str, Any]:
    """Return what verdicts depend on. Where a model is served is no part of it."""
    settings: dict[str, Any] = {
        "judge": "openai",
        "model": config.model,
        "temperature": config.temperature,
        "max_reply_tokens": config.max_reply_tokens,
    }
    if config.chat_template_kwargs:
        settings["chat_template_kwargs"] = config.chat_template_kwargs
    if config.response_format == "json_schema":
        return settings  # as it always was: stores keep their keys
    told = digest(prompts.SCHEMA_WORDING)
    return {
        **settings,
        "response_format": config.response_format,
        "schema_wording": told,
    }


class OpenAIJudge:
    """See the module; ``budget`` counts what this judge has used so far.

    Once ``proven``, a call with these settings has succeeded: an endpoint that refuses
    one (400, 422) then means that request, not every request.
    """

    def __init__(
        self,
        config: JudgeConfig,
        url: str,
        key: Key,
        load_image: Callable[[str], bytes] | None = None,
    ):
        self.config = config
        self.url = url
        self.budget = Budget(config)
        self.proven = False
        self._legibility = Legibility(f"{config.model} at {url}", _CURE)
        self._key = key
        self._load_image = load_image
        self._chance = random.Random()

    @property
    def settings(self) -> Mapping[str, Any]:
        """What verdicts depend on."""
        return settings_of(self.config)

    async def grade(
        self, requests: Iterable[JudgeRequest]
    ) -> AsyncIterator[tuple[int, Verdict]]:
        """Yield (number of the request, verdict) as they come, in any order.

        At most ``concurrency`` requests are drawn and not yet yielded, twice that with
        what waits to be taken. After what stops a run, calls on their way are finished
        and yielded before it is raised.

        Raises:
          UserError: the endpoint refuses every request, cannot be reached, gives
            nothing that can be read, or the budget is spent.
        """
        from jaxalign.judging import transport

        width = self.config.concurrency
        run = _Run(self.budget, width)
        numbered = enumerate(requests)
        finished: asyncio.Queue[tuple[int, Verdict] | None] = asyncio.Queue()
        room = asyncio.Semaphore(2 * width)

        async def work(post: Post) -> None:
            while run.stopped is None:
                await room.acquire()
                if (drawn := next(numbered, None)) is None:
                    return
                number, request = drawn
                verdict = await self._verdict(post, request, run)
                if verdict is not None:
                    finished.put_nowait((number, verdict))

        async def work_all() -> None:
            try:
                async with transport.posting(
                    self.url,
                    self._key.value,
                    concurrency=width,
                    timeout=self.config.timeout,
                    proxy=endpoint.proxy_for(self.url),
                ) as post:
                    await _all(asyncio.create_task(work(post)) for _ in range(width))
            finally:
                finished.put_nowait(None)

        working = asyncio.create_task(work_all())
        try:
            while (one := await finished.get()) is not None:
                room.release()
                yield one
            await working
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
        if run.stopped is not None:
            raise run.stopped

    async def _verdict(
        self, post: Post, request: JudgeRequest, run: "_Run"
    ) -> Verdict | None:
        """Return the verdict on a request, or None if the run has to stop."""
        first = self._messages(request)
        more: tuple[Message, ...] = ()
        spent = [0, 0]
        raw: str | None = None
        in_a_row = attempts = 0
        repaired = doubted = False
        while run.may_call():
            attempts += 1
            try:
                value, raw = await self._call(post, request, first + more, run, spent)
                return self._made(value, None, raw, attempts, spent)
            except Trouble as found:
                trouble = found
            raw = raw if trouble.raw is None else trouble.raw
            # JSON can say the key in escapes, which are undone after it was taken out.
            reason = endpoint.without_key(trouble.reason, self._key)
            if trouble.unclear and not doubted:
                doubted = True  # by then others may have succeeded, and it is its own
                await run.pause(backoff(1, self._chance.random()))
                continue
            if trouble.fate == "run":
                run.stop(reason)
                return None
            too_long = (trouble.wait or 0) > self.config.max_wait
            last = attempts >= self.config.max_attempts
            if trouble.fate == "item" or too_long or last:
                if run.is_unreachable(trouble):
                    run.stop(f"the judge at {self.url} cannot be reached")
                    return None
                if trouble.unread and not self.proven:
                    run.stop_by(self._legibility.unread(reason, raw))
                return self._made(None, reason, raw, attempts, spent)
            more = ()
            if trouble.repair is not None:
                if not repaired:
                    repaired, more = True, bodies.repair(trouble)
                continue
            in_a_row += 1
            await run.pause(backoff(in_a_row, self._chance.random(), trouble.wait))
        return None

    async def _call(
        self,
        post: Post,
        request: JudgeRequest,
        messages: tuple[Message, ...],
        run: "_Run",
        spent: list[int],
    ) -> tuple[Any, str]:
        """Return value and reply of one call.

        Raises:
          Trouble: it gave none.
        """
        reply = await post(bodies.body(self.config, request, messages))
        choice, usage = replies.choice(reply, self.url, self._key, self.proven)
        run.reached()
        if usage is not None:
            spent[0] += usage[0]
            spent[1] += usage[1]
        run.count(usage)
        if request.task == "prose":
            self.proven = True
            said = replies.prose(choice, self._key)
            return said, said["text"]
        content = replies.content(choice, self._key)
        value, problem = prompts.parse(bare(content), request.schema)
        if problem is not None:
            reason = f"outside the schema: {problem}"
            raise Trouble(reason, raw=content, repair=problem, unread=True)
        if "\\" in content and endpoint.holds_key(value, self._key):
            raise Trouble("the reply repeats the key in escapes")
        self.proven = True
        return value, content

    def _messages(self, request: JudgeRequest) -> tuple[Message, ...]:
        messages = request.messages
        if request.task != "prose" and self.config.response_format != "json_schema":
            messages = prompts.with_schema(messages, request.schema)
        if not request.subject.images:
            return messages
        return tuple(images.loaded(messages, self._load_image))

    def _made(
        self,
        value: Any,
        failure: str | None,
        raw: str | None,
        attempts: int,
        spent: list[int],
    ) -> Verdict:
        return Verdict(
            value,
            failure=failure,
            raw=raw,
            attempts=attempts,
            prompt_tokens=spent[0],
            completion_tokens=spent[1],
            cost=cost_of(self.config, *spent),
        )


class _Run:
    """What the workers of one call of ``grade`` share."""

    def __init__(self, budget: Budget, patience: int):
        self.stopped: UserError | None = None
        self._stopping = asyncio.Event()
        self._budget = budget
        self._patience = patience
        self._never_reached = True
        self._unreached = 0

    def stop(self, reason: str) -> None:
        self.stop_by(UserError(reason))

    def stop_by(self, error: UserError | None) -> None:
        """Stop, if there is an error; the first one is raised."""
        if self.stopped is None and error is not None:
            self.stopped = error
            self._stopping.set()

    async def pause(self, seconds: float) -> None:
        """Wait, but not longer than until the run is stopped."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    def may_call(self) -> bool:
        if self.stopped is None and (spent := self._budget.draw()) is not None:
            self.stop(spent)
        return self.stopped is None

    def count(self, usage: tuple[int, int] | None) -> None:
        try:
            self._budget.count(usage)
        except UserError as error:
            self.stop(str(error))

    def reached(self) -> None:
        self._never_reached, self._unreached = False, 0

    def is_unreachable(self, trouble: Trouble) -> bool:
        """Tell whether the endpoint, not the request, is at fault.

        It is when nobody has ever answered, or when as many requests in a row as are
        on their way together have used up their attempts without a connection.
        """
        if not trouble.unreached:
            self.reached()
            return False
        self._unreached += 1
        return self._never_reached or self._unreached > self._patience


async def _all(tasks: Iterator[asyncio.Task[None]]) -> None:
    """Wait for tasks; if one breaks, stop the others and raise what it raised.

    An asyncio.TaskGroup would wrap the error of one in a group.
    """
    started = list(tasks)
    try:
        await asyncio.gather(*started)
    finally:
        for task in started:
            task.cancel()
        await asyncio.gather(*started, return_exceptions=True)
