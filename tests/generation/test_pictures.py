"""Prompts with pictures: transformers' tokens, and each picture encoded once."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers.models.smolvlm import processing_smolvlm

from jaxalign.errors import UserError
from jaxalign.generation import programs, text_model
from jaxalign.generation.engine import Request, Sampling
from jaxalign.generation.prefill import PIECE
from jaxalign.parallel.mesh import MeshConfig
from tests import vision_models
from tests.data.patchers import published, test_parity
from tests.generation.test_engine import assert_greedy


GREEDY = Sampling(max_new_tokens=12, temperature=0.0)

PICTURES = [published.drawn(61, 97), published.drawn(200, 33), published.drawn(48, 48)]


def user(*content: str | None) -> dict[str, Any]:
    """Return a user's turn: a picture for every None, and the texts."""
    parts = [
        {"type": "image"} if part is None else {"type": "text", "text": part}
        for part in content
    ]
    return {"role": "user", "content": parts}


PROMPTS = {
    "one": ([user(None, "is it blue?")], PICTURES[:1]),
    "text between": ([user("is the river blue?")], []),
    "several": (
        [
            user(None, "and", None, "which is blue?"),
            {"role": "assistant", "content": [{"type": "text", "text": "seven"}]},
            user("and that?", None),
        ],
        PICTURES,
    ),
}


@pytest.fixture(scope="module", params=["llava", "idefics3", "smolvlm", "qwen2_5_vl"])
def checkpoint(request, tmp_path_factory) -> Path:
    return vision_models.write(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sees(tmp_path_factory) -> text_model.TextModel:
    directory = vision_models.write("qwen2_5_vl", tmp_path_factory.mktemp("sees"))
    return text_model.load(directory)


def over_pieces(made: text_model.TextModel) -> tuple[Any, Any]:
    """Return a prompt that has a picture in two of the pieces that it is read in."""
    for count in range(5, 120):
        turns = [user("river " * count, None, "and", None, "is it?")]
        request = made.request(turns, images=PICTURES[:2])
        assert callable(request.images)
        images: Any = request.images()
        if {PIECE - 1, PIECE} <= set(images.features_to[0].tolist()):
            return turns, PICTURES[:2]
    raise AssertionError("no picture lies over the end of a piece")


def torch_greedy(directory: Path, turns: Any, pictures: Any) -> tuple[Any, ...]:
    """Return the prompt's tokens, and what transformers generates with its processor.

    With log-probs, and gaps of the best two.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    files = published.Checkpoint(directory, config, tokenizer)
    patcher = test_parity.PATCHERS[config["model_type"]].from_files(*files.arguments)
    processor = test_parity.reference(files, **test_parity.options_of(patcher, config))
    model: Any = AutoModelForImageTextToText.from_pretrained(directory).eval()
    text = tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    images: Any = list(pictures)
    if config["model_type"] in ("idefics3", "smolvlm"):
        images = [images]
    if pictures:
        inputs = dict(processor(text=[text], images=images, return_tensors="pt"))
    else:
        inputs = dict(tokenizer(text, return_tensors="pt"))
    tokens = inputs["input_ids"]
    if config["model_type"] == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (tokens == config["image_token_id"]).long()
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=GREEDY.max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = [step[0].topk(2).values for step in out.logits]
    logps = [float(step[0].double().log_softmax(-1).max()) for step in out.logits]
    made = out.sequences[0, tokens.shape[1] :].tolist()
    return tokens[0].tolist(), (made, logps, [float(a - b) for a, b in best])


def test_greedy_text_is_that_of_transformers(checkpoint, monkeypatch) -> None:
    """One picture, several, none; prompts of one piece, and one in two of them."""
    # It is not installed, and spells the number of a video's frames.
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    made = text_model.load(checkpoint)
    prompts = [*PROMPTS.values(), over_pieces(made)]
    requests = [
        made.request(turns, GREEDY, images=pictures)._replace(stop_tokens=frozenset())
        for turns, pictures in prompts
    ]
    found = made.complete(requests, slots=2)
    for (turns, pictures), request, (completion,) in zip(
        prompts, requests, found, strict=True
    ):
        tokens, wanted = torch_greedy(checkpoint, turns, pictures)
        assert request.tokens == tokens
        assert_greedy(completion, *wanted)


def test_a_picture_is_encoded_once_for_all_samples(sees, monkeypatch) -> None:
    encoded = []

    def encode(*given: Any, **options: Any) -> Any:
        encoded.append(given[1].features_to.shape)
        return jitted(*given, **options)

    jitted = programs.encode
    encode.lower = jitted.lower  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(programs, "encode", encode)
    sampling = Sampling(num_samples=5, max_new_tokens=6, seed=3)
    turns, pictures = PROMPTS["several"]
    (together,) = sees.complete([sees.request(turns, sampling, images=pictures)])
    assert len(encoded) == 1
    # In the same slots one after the other: the same texts.
    (again,) = sees.complete([sees.request(turns, sampling, images=pictures)], slots=2)
    assert [c.tokens for c in again] == [c.tokens for c in together]
    assert len({tuple(c.tokens) for c in together}) > 1


def test_texts_beside_change_nothing_and_another_picture_does(sees) -> None:
    requests = [sees.request(t, GREEDY, images=p) for t, p in PROMPTS.values()]
    together = sees.complete(requests, slots=3)
    for request, (completion,) in zip(requests, together, strict=True):
        ((alone,),) = sees.complete([request])
        assert alone.tokens == completion.tokens
        np.testing.assert_allclose(alone.logps, completion.logps, atol=1e-5)
    turns, _ = PROMPTS["one"]
    ((other,),) = sees.complete([sees.request(turns, GREEDY, images=PICTURES[1:2])])
    assert not np.allclose(other.logps[0], together[0][0].logps[0], atol=1e-4)


def test_features_take_the_place_of_patches(sees) -> None:
    """What an own encoder made, or the cache of a frozen one, needs no tower."""
    turns, pictures = PROMPTS["several"]
    request = sees.request(turns, GREEDY, images=pictures)
    assert callable(request.images)
    images: Any = request.images()
    features = sees.model.image_fn(sees.variables, jax.tree.map(jnp.asarray, images))
    given = images._replace(patches=None, features=np.asarray(features))
    ((made,),) = sees.complete([request])
    ((same,),) = sees.complete([request._replace(images=given)])
    assert same.tokens == made.tokens


def test_a_text_runs_the_programs_of_texts(sees) -> None:
    names = functools.partial(programs.names_of, length=256)
    turns, pictures = PROMPTS["one"]
    text, shown = sees.request("river"), sees.request(turns, images=pictures)
    assert ("prefill", False, None) in set(names(text))
    assert set(names(shown)) - set(names(text)) == {("prefill", False, 2)}
    assert text.images is None and text.positions is None


def test_a_mesh_changes_no_text(tmp_path) -> None:
    directory = vision_models.write("qwen2_5_vl", tmp_path)
    found = []
    for mesh in (MeshConfig(), MeshConfig(data=2, tensor=2)):
        made = text_model.load(directory, mesh=mesh)
        requests = [made.request(t, GREEDY, images=p) for t, p in PROMPTS.values()]
        found.append([c.tokens for (c,) in made.complete(requests, slots=2)])
    assert found[0] == found[1]


def test_what_cannot_be_seen_is_refused(sees, tiny_llama) -> None:
    turns, pictures = PROMPTS["one"]
    with pytest.raises(UserError, match="1 picture.s., but .* does not see"):
        text_model.load(tiny_llama).request(turns, images=pictures)
    request = sees.request(turns, GREEDY, images=pictures)
    blind = sees._replace(model=sees.model._replace(image_fn=None))
    with pytest.raises(UserError, match="expected one with image_fn, decode_fn and"):
        blind.complete([request])
    slow = sees._replace(model=sees.model._replace(decode_fn=None))
    with pytest.raises(UserError, match="expected one with image_fn, decode_fn and"):
        slow.complete([request])
    with pytest.raises(UserError, match=r"positions \[3\] are not those of the prom"):
        sees.complete([request._replace(positions=np.arange(3))])
    with pytest.raises(UserError, match="positions go with pictures"):
        sees.complete([Request([1, 2], GREEDY, positions=np.arange(2))])
    with pytest.raises(UserError, match="no picture there: tried .*absent.png"):
        sees.request(turns, images=["absent.png"])
