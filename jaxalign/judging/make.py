"""The judge of the options."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from jaxalign.errors import UserError
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.judge import Judge


__all__ = ["Function", "as_judge", "given_judge", "make_judge", "settings_of"]

Function: TypeAlias = Callable[[list[dict[str, Any]]], Any]
"""From a list of requests to a list of replies, or a coroutine of that."""


def make_judge(
    config: JudgeConfig,
    judge: Judge | Function | None = None,
    *,
    load_image: Callable[[str], bytes] | None = None,
) -> Judge:
    """Return the judge of the options, or one that is given as an object.

    Args:
      config: its options.
      judge: the judge itself, or a function ``judge(requests) -> replies`` of one's
        own, plain or ``async``: see ``jaxalign.judging.function``.
      load_image: gives the bytes of the image that a request's reference names.
    Raises:
      UserError: it lacks a library, a key, a checkpoint or a function.
    Example:
      >>> type(make_judge(JudgeConfig(name="rules"))).__name__
      'RulesJudge'
    """
    if (given := given_judge(config, judge, load_image=load_image)) is not None:
        return given
    if config.name == "rules":
        from jaxalign.judging import exact_match

        return exact_match.RulesJudge()
    if config.name == "reward":
        from jaxalign.judging import reward

        assert config.model is not None
        (aspect,) = config.scored_aspects
        return reward.RewardJudge(
            config.model, aspect=aspect, template_kwargs=config.chat_template_kwargs
        )
    if config.name == "python":
        from jaxalign.judging import function

        return function.FunctionJudge.of_file(config, load_image)
    if config.name == "local":
        assert config.model is not None  # checked with the options
        if config.local_method == "json":
            from jaxalign.judging import writing

            return writing.WritingJudge(
                config.model,
                temperature=config.temperature,
                max_reply_tokens=config.max_reply_tokens,
                template_kwargs=config.chat_template_kwargs,
                load_image=load_image,
            )
        from jaxalign.judging import local

        return local.LocalJudge(
            config.model,
            method=config.local_method,
            own=config.own_wording,
            template_kwargs=config.chat_template_kwargs,
            load_image=load_image,
        )
    from jaxalign.judging import openai

    return openai.make(config, load_image=load_image)


def given_judge(
    config: JudgeConfig,
    judge: Judge | Function | None,
    *,
    load_image: Callable[[str], bytes] | None = None,
) -> Judge | None:
    """Return the judge that is given as an object, None where the options name one.

    Args:
      config: its options.
      judge: the object, if there is one.
      load_image: as of :func:`make_judge`, for a function; a Judge has its own.
    Raises:
      UserError: there is none either way.
    Example:
      >>> given_judge(JudgeConfig(name="rules"), None) is None
      True
    """
    if judge is not None:
        options = {"width": config.concurrency, "attempts": config.max_attempts}
        return as_judge(judge, load_image=load_image, **options)
    if config.name == "python":
        settings_of(config)
    return None


def as_judge(judge: Judge | Function, **options: Any) -> Judge:
    """Return a judge as it is, and a function ``judge(requests)`` as one.

    Args:
      judge: either.
      **options: ``width``, ``attempts`` and ``load_image`` of
        ``function.FunctionJudge``.
    Raises:
      UserError: it is neither.
    Example:
      >>> def longest(requests): return [{"score": 1} for _ in requests]
      >>> sorted(as_judge(longest).settings)
      ['code', 'judge', 'name', 'version']
    """
    if isinstance(judge, Judge) and not isinstance(judge, type):
        return judge
    if not callable(judge):
        raise UserError(
            f"judge: got {judge!r}; expected a function from a list of requests to a "
            "list of replies (see jaxalign.judging.function), or a Judge"
        )
    from jaxalign.judging import function

    return function.FunctionJudge(judge, **options)


def settings_of(config: JudgeConfig) -> Mapping[str, Any]:
    """Return what the verdicts of the options' judge depend on.

    That needs neither a key nor a client, and executes nothing of the user's.

    Raises:
      UserError: a checkpoint or file cannot be read.
    Example:
      >>> sorted(settings_of(JudgeConfig(name="rules")))
      ['judge', 'version']
    """
    if config.name == "openai":
        from jaxalign.judging import openai

        return openai.settings_of(config)
    if config.name == "python":
        from jaxalign.judging import function

        return function.settings_of(config)
    return make_judge(config).settings
