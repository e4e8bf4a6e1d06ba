"""The judge of the options."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.judge import Judge


__all__ = ["make_judge", "settings_of"]


def make_judge(
    config: JudgeConfig, *, load_image: Callable[[str], bytes] | None = None
) -> Judge:
    """Return the judge of the options.

    Args:
      config: its options.
      load_image: gives the bytes of the image that a request's reference names.
    Raises:
      UserError: it lacks a library, a key, a checkpoint or a function.
    """
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

        return function.FunctionJudge(config)
    if config.name == "local":
        assert config.model is not None  # checked with the options
        if config.local_method == "json":
            from jaxalign.judging import writing

            return writing.WritingJudge(
                config.model,
                temperature=config.temperature,
                max_reply_tokens=config.max_reply_tokens,
                template_kwargs=config.chat_template_kwargs,
            )
        from jaxalign.judging import local

        return local.LocalJudge(
            config.model,
            method=config.local_method,
            own=config.own_wording,
            template_kwargs=config.chat_template_kwargs,
        )
    from jaxalign.judging import openai

    return openai.make(config, load_image=load_image)


def settings_of(config: JudgeConfig) -> Mapping[str, Any]:
    """Return what the verdicts of the options' judge depend on.

    That needs neither a key nor a client, and executes nothing of the user's.

    Raises:
      UserError: a checkpoint or file cannot be read.
    """
    if config.name == "openai":
        from jaxalign.judging import openai

        return openai.settings_of(config)
    if config.name == "python":
        from jaxalign.judging import function

        return function.settings_of(config)
    return make_judge(config).settings
