"""A row of equal feature tokens is read as one, and nothing of the tokens changes."""

from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken

from jaxalign.data import feature_rows
from jaxalign.data.conversation import Rendering
from jaxalign.data.rendering import Renderer
from tests.data.mosaic import Mosaic, seeing


PIECES = st.one_of(
    st.integers(1, 40).map(lambda count: "<image>" * count),
    st.sampled_from(
        [" ", "\n", "  \n", "the river", "é", "<frame>", "<|im_start|>", "<image", ">"]
    ),
    st.text(alphabet="ab \n<>", max_size=5),
)


def as_a_whole(renderer: Renderer, text: str, *, plain: bool) -> Any:
    """Return the tokens and offsets that the tokenizer gives the whole text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_rows, "stands_alone", lambda *_: False)
        whole = Renderer(renderer.tokenizer, patcher=renderer.patcher)
        return whole.encode([Rendering(text, (), plain)])[0]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"bos": True}, {"trim_offsets": False}, {"swallow": True}],
    ids=["trimmed", "bos", "whole", "swallow"],
)
def test_tokens_and_their_characters_are_those_of_the_whole_text(
    make_tokenizer: Callable[..., Any], options: dict[str, Any], plain: bool
) -> None:
    tokenizer, patcher = seeing(make_tokenizer(template=None, **options))
    renderer = Renderer(tokenizer, patcher=patcher)
    assert feature_rows.stands_alone(tokenizer, patcher.token, patcher.token_id)

    @hypothesis.settings(deadline=None, max_examples=60)
    @hypothesis.given(st.lists(PIECES, max_size=12).map("".join))
    def check(text: str) -> None:
        found = renderer.encode([Rendering(text, (), plain)])[0]
        whole = as_a_whole(renderer, text, plain=plain)
        np.testing.assert_array_equal(found.tokens, whole.tokens)
        np.testing.assert_array_equal(found.spans, whole.spans)

    check()


def test_a_row_is_read_as_one_token(make_tokenizer: Callable[..., Any]) -> None:
    read = []

    class Reader:
        def __init__(self, tokenizer: Any):
            self._tokenizer = tokenizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self._tokenizer, name)

        def __call__(self, text: Any, **options: Any) -> Any:
            read.extend(text)
            return self._tokenizer(text, **options)

    tokenizer, patcher = seeing(make_tokenizer(template=None))
    renderer = Renderer(Reader(tokenizer), patcher=patcher)
    text = f"a{'<image>' * 1000}b{'<image>' * 500}"
    (found,) = renderer.encode([Rendering(text, (), False)])
    assert read == ["a<image>b<image>"]
    assert len(found.tokens) == 1502 and found.spans[-1].tolist() == [
        len(text) - 7,
        len(text),
    ]


@pytest.mark.parametrize("option", ["lstrip", "rstrip", "single_word", "normalized"])
def test_a_token_that_takes_what_is_beside_it_is_read_each_time(
    make_tokenizer: Callable[..., Any], option: str
) -> None:
    tokenizer = make_tokenizer(template=None)
    options = {"normalized": False, option: True}
    tokenizer.add_tokens([AddedToken("<mine>", special=True, **options)])
    index = tokenizer.convert_tokens_to_ids("<mine>")
    assert not feature_rows.stands_alone(tokenizer, "<mine>", index)
    patcher = Mosaic(index, token="<mine>", placeholder="<mine>")
    renderer = Renderer(tokenizer, patcher=patcher)
    text = "a <mine><mine>\n b"
    found = renderer.encode([Rendering(text, (), False)])[0]
    whole = as_a_whole(renderer, text, plain=False)
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    np.testing.assert_array_equal(found.spans, whole.spans)


def test_where_another_token_takes_the_last_of_a_row_all_are_read(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer, patcher = seeing(make_tokenizer(template=None))
    tokenizer.add_tokens([AddedToken("<image>!", special=True, normalized=False)])
    renderer = Renderer(tokenizer, patcher=patcher)
    text = "<image><image><image>! and <image>"
    (found,) = renderer.encode([Rendering(text, (), False)])
    whole = as_a_whole(renderer, text, plain=False)
    assert (whole.tokens == patcher.token_id).sum() == 3
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    np.testing.assert_array_equal(found.spans, whole.spans)
