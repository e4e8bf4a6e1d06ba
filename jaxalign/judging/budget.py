"""What calls have cost, and when there must be no more of them."""

import dataclasses

from jaxalign.errors import UserError
from jaxalign.judging.config import JudgeConfig


__all__ = ["Budget", "cost_of"]


def cost_of(config: JudgeConfig, prompt_tokens: int, completion_tokens: int) -> float:
    """Return what tokens cost by the user's prices."""
    return (
        prompt_tokens * config.prompt_price
        + completion_tokens * config.completion_price
    ) / 1e6


@dataclasses.dataclass
class Budget:
    """Counts calls and tokens of a run against the options' limits.

    Calls are counted before they are sent and the limit on them is exact. Tokens are
    known afterwards: their limits stop the next call, so at most as many calls as are
    on their way go over.
    """

    config: JudgeConfig
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def cost(self) -> float:
        """What the tokens cost by the user's prices."""
        return cost_of(self.config, self.prompt_tokens, self.completion_tokens)

    def draw(self) -> str | None:
        """Count one more call; or say which limit forbids it, and count none."""
        limits = (
            ("max_requests", self.config.max_requests, self.requests),
            (
                "max_total_tokens",
                self.config.max_total_tokens,
                self.prompt_tokens + self.completion_tokens,
            ),
            ("max_cost", self.config.max_cost, self.cost),
        )
        for name, limit, spent in limits:
            if limit is not None and spent >= limit:
                return (
                    f"the budget is spent: judge.{name} is {limit} and {spent:g} "
                    "is used. What was judged is in the store: the same command with "
                    "a new budget asks only for the rest"
                )
        self.requests += 1
        return None

    def count(self, usage: tuple[int, int] | None) -> None:
        """Add the tokens of a reply.

        Raises:
          UserError: there is a limit on tokens or cost and the endpoint counts none.
        """
        if usage is not None:
            self.prompt_tokens += usage[0]
            self.completion_tokens += usage[1]
        elif (self.config.max_total_tokens or self.config.max_cost) is not None:
            raise UserError(
                "the endpoint does not say how many tokens its replies took, so "
                "judge.max_total_tokens and judge.max_cost cannot be kept: use "
                "judge.max_requests"
            )
