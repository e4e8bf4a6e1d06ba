"""Structured output: exactly the texts that fit, with exactly their probabilities."""

import dataclasses
import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.generation import drawing, sampling, text_model
from jaxalign.generation.drawing import Edits
from jaxalign.generation.engine import (
    Completion,
    Engine,
    Request,
    Sampling,
    completed,
    generate,
)
from jaxalign.generation.sampling import Controls
from jaxalign.generation.steering import Steering
from jaxalign.generation.steps import Slots
from jaxalign.generation.structure import (
    Grammars,
    Structure,
    choice,
    grammar,
    json_schema,
    regex,
)
from jaxalign.types import ModelInputs


PROMPT = [5, 60, 9, 101, 44]

# All words of a language, so that which tokens may follow is told by prefixes alone.
CHOICES = ["好的", "好吧", "好", " the answer", " the answer is not", 'say "no"\n', "Ü"]
PATTERN = r"(ab|好|é){1,3}-[0-3]?"
OF_PATTERN = [
    "".join(head) + "-" + tail
    for count in (1, 2, 3)
    for head in itertools.product(("ab", "好", "é"), repeat=count)
    for tail in ("", "0", "1", "2", "3")
]
OF_GRAMMAR = [f"{head}-{tail}" for head in ("ab", "好") for tail in range(4)]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "answer": {"enum": ["yes", "好", "no"]},
        "scores": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 4},
            "minItems": 1,
            "maxItems": 2,
        },
    },
    "required": ["answer", "scores"],
    "additionalProperties": False,
}
OF_SCHEMA = [
    json.dumps({"answer": answer, "scores": list(scores)}, ensure_ascii=False)
    for answer in ("yes", "好", "no")
    for count in (1, 2)
    for scores in itertools.product(range(5), repeat=count)
]
LANGUAGES = {
    "choice": (choice(CHOICES), CHOICES),
    "regex": (regex(PATTERN), OF_PATTERN),
    "grammar": (grammar('start: ("ab" | "好") x\nx: "-" /[0-3]/'), OF_GRAMMAR),
    "schema": (json_schema(SCHEMA, one_line=True), OF_SCHEMA),
}


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> text_model.TextModel:
    return text_model.load(str(tiny_llama))


@pytest.fixture(scope="module")
def token_bytes(tiny) -> list[bytes | None]:
    """Return the bytes of every token, by GPT-2's alphabet; special ones have none.

    The alphabet as its authors made it: printable characters of Latin-1 stand for
    themselves, the other bytes for characters from 256 on, in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = (b for b in range(256) if b not in printable)
    of_name = {chr(b): b for b in printable}
    of_name |= {chr(256 + n): b for n, b in enumerate(rest)}
    special = set(tiny.tokenizer.all_special_ids)
    names = tiny.tokenizer.convert_ids_to_tokens(range(len(tiny.tokenizer)))
    return [
        None if n in special else bytes(of_name[c] for c in name)
        for n, name in enumerate(names)
    ]


def may_follow(
    words: list[str], made: bytes, token_bytes: list[bytes | None], ends: frozenset[int]
) -> list[int]:
    """Return the tokens that go on with a word of the language, or end it."""
    language = [word.encode() for word in words]
    found = [
        token
        for token, own in enumerate(token_bytes)
        if own and any(word.startswith(made + own) for word in language)
    ]
    return sorted(found + (sorted(ends) if made in language else []))


def steered(structure: Structure, **options: Any) -> Steering:
    return Steering(structure=structure, **options)


def run(tiny: text_model.TextModel, *requests: Request) -> list[list[Completion]]:
    engine = Engine(
        tiny.model,
        tiny.variables,
        slots=8,
        length=256,
        text_of=text_model.text_with(tiny.tokenizer),
        tokenizer=tiny.tokenizer,
    )
    return [done for _, done in sorted(completed(engine, requests))]


def model_logits(tiny: text_model.TextModel, tokens: list[int]) -> np.ndarray:
    """Return the logits behind every token, in one pass without a cache."""
    whole = np.zeros((1, 128), np.int32)  # one length, one compilation
    whole[0, : len(tokens)] = tokens
    ones, places = np.ones_like(whole), np.arange(128, dtype=np.int32)[None]
    arrays: Any = map(jnp.asarray, (whole, places, ones, 0 * ones))
    logits = _all_logits(tiny.variables, ModelInputs(*arrays), model=tiny.model)
    return np.asarray(logits, np.float64)[: len(tokens)]


@functools.partial(jax.jit, static_argnames="model")
def _all_logits(variables: Any, inputs: ModelInputs, *, model: Any) -> Any:
    return model.logits_fn(variables, model.hidden_fn(variables, inputs)[0])


@pytest.mark.parametrize("name", LANGUAGES)
def test_texts_fit_and_have_the_probabilities_of_what_may_follow(
    tiny, token_bytes, name
) -> None:
    """Every step's log-prob is a float64 softmax over tokens found by other means."""
    structure, words = LANGUAGES[name]
    asked = Request(
        PROMPT,
        Sampling(num_samples=8, max_new_tokens=90, temperature=1.7, seed=4),
        tiny.stop_tokens,
        ranked=20,
        steering=steered(structure),
    )
    engine = Engine(
        tiny.model, tiny.variables, slots=8, length=256, tokenizer=tiny.tokenizer
    )
    engine.submit(asked)
    made: dict[int, list[Any]] = {}
    while engine.busy:
        for event in engine.step():
            made.setdefault(event.sample, []).append(event)
    texts = set()
    for events in made.values():
        tokens = [event.token for event in events]
        assert events[-1].finish_reason == "stop" and tokens[-1] in tiny.stop_tokens
        logits = model_logits(tiny, PROMPT + tokens)[len(PROMPT) - 1 :]
        before = b""
        for event, scores in zip(events, logits, strict=False):
            may = may_follow(words, before, token_bytes, tiny.stop_tokens)
            total = np.logaddexp.reduce(scores[may])
            assert event.token in may
            assert event.logp == pytest.approx(scores[event.token] - total, abs=2e-4)
            best = sorted(scores[may] - total)[::-1][:20]
            assert [logp for _, logp in event.best] == pytest.approx(best, abs=2e-4)
            before += token_bytes[event.token] or b""
        texts.add(before.decode())
    assert texts <= set(words) and len(texts) > 2


def masked(words: np.ndarray, vocab: int) -> np.ndarray:
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    return np.flatnonzero(bits[:vocab])


@pytest.mark.parametrize("name", LANGUAGES)
def test_masks_are_exact_along_every_way(tiny, token_bytes, name) -> None:
    """Along random ways through the language, by the masks alone."""
    structure, words = LANGUAGES[name]
    engine = Engine(
        tiny.model, tiny.variables, slots=1, length=128, tokenizer=tiny.tokenizer
    )
    masks, rng = engine._masks, np.random.default_rng(1)
    seen = set()
    for _ in range(25):
        guide = masks.begin(0, steered(structure), tiny.stop_tokens)
        made, tokens = b"", []
        while True:
            may = masked(masks.words[0], engine.vocab)
            want = may_follow(words, made, token_bytes, tiny.stop_tokens)
            assert may.tolist() == want
            token = int(rng.choice(may))
            if token in tiny.stop_tokens:
                break
            tokens.append(token)
            made += token_bytes[token] or b""
            assert masks.advance([(0, guide, tokens)]) == {}
        seen.add(made)
    assert seen <= {word.encode() for word in words} and len(seen) > 4


def test_outputs_parse_and_validate(tiny) -> None:
    """A schema of strings, numbers, branches; those that end are valid, and some are
    cut by max_new_tokens, which is told as always."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "size": {"anyOf": [{"type": "number", "maximum": 9}, {"type": "null"}]},
            "tags": {"type": "array", "items": {"enum": ["a", "好"]}, "maxItems": 2},
        },
        "required": ["name", "size"],
        "additionalProperties": False,
    }
    asked = Request(
        PROMPT,
        Sampling(num_samples=40, max_new_tokens=120, temperature=1.0),
        tiny.stop_tokens,
        steering=steered(json_schema(schema)),
    )
    (found,) = run(tiny, asked)
    whole = [c for c in found if c.finish_reason == "stop"]
    assert len(whole) > 5
    for completion in whole:
        jsonschema.validate(json.loads(completion.text), schema)
    for completion in found:
        if completion.finish_reason == "length":
            assert len(completion.tokens) == 120
            with pytest.raises(json.JSONDecodeError):
                json.loads(completion.text)
    (short,) = run(tiny, asked._replace(sampling=Sampling(max_new_tokens=3)))[0]
    assert short.finish_reason == "length" and len(short.tokens) == 3


def test_among_others_and_without_them(tiny) -> None:
    """Steered and free requests in one batch: each as it is alone."""
    plain = Sampling(max_new_tokens=12, temperature=1.2, num_samples=2)
    requests = [
        Request([5 + n, *PROMPT], dataclasses.replace(plain, seed=n), tiny.stop_tokens)
        for n in range(6)
    ]
    structures = [LANGUAGES[name][0] for name in LANGUAGES]
    mixed = [
        r._replace(steering=steered(structures[n // 2])) if n % 2 else r
        for n, r in enumerate(requests)
    ]
    mixed[4] = mixed[4]._replace(steering=Steering(presence_penalty=2.0))
    together = run(tiny, *mixed)
    for n in (0, 1, 3, 4):
        request, want = mixed[n], together[n]
        (alone,) = run(tiny, request)
        assert [c.tokens for c in alone] == [c.tokens for c in want]
        for one, other in zip(alone, want, strict=True):
            np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)


def test_a_structure_that_allows_all_changes_no_token(tiny) -> None:
    """The two programs of a steered step are the one of a free step."""
    options = Sampling(max_new_tokens=20, temperature=0.9, top_p=0.9, num_samples=4)
    free = Request(PROMPT, options)
    (want,) = run(tiny, free)
    (got,) = run(tiny, free._replace(steering=Steering()))
    assert [c.tokens for c in got] == [c.tokens for c in want]
    np.testing.assert_allclose(got[0].logps, want[0].logps, atol=1e-5)


def test_stop_texts_and_min_tokens(tiny) -> None:
    """No end before min_tokens: neither a stop token nor a stop text."""
    text_of = text_model.text_with(tiny.tokenizer)
    greedy = Sampling(max_new_tokens=20, temperature=0.0, repetition_penalty=1.8)
    (whole,) = run(tiny, Request(PROMPT, greedy))[0]
    stop = whole.tokens[2]
    assert stop not in whole.tokens[:2]
    ends = frozenset({stop})
    (ended,) = run(tiny, Request(PROMPT, greedy, ends))[0]
    assert len(ended.tokens) == 3
    (later,) = run(
        tiny, Request(PROMPT, greedy, ends, steering=Steering(min_tokens=7))
    )[0]
    assert len(later.tokens) > 7 and stop not in later.tokens[:7]
    # Of a stop text that comes twice, the second one ends it.
    twice = "ab" * 6
    structure = regex(twice)
    for least, text in ((0, ""), (5, None)):
        options = Sampling(max_new_tokens=20, temperature=0.0, stop="ab")
        request = Request(
            PROMPT,
            options,
            tiny.stop_tokens,
            steering=steered(structure, min_tokens=least),
        )
        (made,) = run(tiny, request)[0]
        assert made.finish_reason == "stop" and twice.startswith(text_of(made.tokens))
        if text is not None:
            assert made.text == text
        else:
            assert len(made.tokens) > 5
            assert made.text.startswith(text_of(made.tokens[:5]).rstrip("a"))
            assert not made.text[len(text_of(made.tokens[:5])) :].count("ab")


def test_a_structure_ends_a_text_where_nothing_may_follow(tiny) -> None:
    """Without stop tokens too; and before min_tokens, which cannot be reached."""
    for ends, least in ((tiny.stop_tokens, 9), (frozenset(), 0), (frozenset(), 9)):
        request = Request(
            PROMPT,
            Sampling(max_new_tokens=30),
            ends,
            steering=steered(choice(["好的"]), min_tokens=least),
        )
        (made,) = run(tiny, request)[0]
        assert made.text == "好的" and made.finish_reason == "stop"
        assert (made.tokens[-1] in tiny.stop_tokens) == bool(ends)


def draw_probabilities(
    logits: np.ndarray,
    allowed: np.ndarray,
    bias: np.ndarray,
    counts: np.ndarray,
    seen: np.ndarray,
    *,
    presence: float,
    frequency: float,
    repetition: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> np.ndarray:
    """Return what tokens are drawn with, in float64, from the formulas."""
    scores = np.where(allowed, logits.astype(np.float64) + bias, -np.inf)
    scores = scores - frequency * counts - presence * (counts > 0)
    lowered = np.where(scores > 0, scores / repetition, scores * repetition)
    scores = np.where(seen, lowered, scores) / temperature
    order = np.argsort(-scores, kind="stable")
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    if top_k:
        probs[order[top_k:]] = 0
        probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= top_p]] = 0
    probs[probs < min_p * probs.max()] = 0
    return probs / probs.sum()


FREE: dict[str, Any] = {
    "presence": 0.0,
    "frequency": 0.0,
    "repetition": 1.0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"presence": 0.7, "frequency": 0.4},
        {"presence": -1.0, "frequency": -0.5, "temperature": 0.7},
        {"presence": 1.5, "top_k": 9, "top_p": 0.8},
        {"frequency": 1.1, "min_p": 0.05, "temperature": 1.6},
        {"presence": 0.5, "repetition": 1.3},
    ],
    ids=str,
)
def test_frequencies_are_the_exact_probabilities(options) -> None:
    """Of masks, biases and penalties together; chi-squared at one in a million."""
    values, vocab, count = {**FREE, **options}, 75, 6_000
    rng = np.random.default_rng(5)
    logits = (2 * rng.standard_normal(vocab)).astype(np.float32)
    allowed = rng.random(vocab) < 0.6
    bias = np.where(rng.random(vocab) < 0.2, rng.normal(0, 2, vocab), 0)
    made = rng.integers(0, 3, vocab)
    seen = made > 0
    # Equal and positive where penalised, so that the order of the two does not matter.
    if values["repetition"] != 1:
        logits = logits + 9
        values["presence"] = 0.0
    want = draw_probabilities(
        logits, allowed, bias, made, seen & (values["repetition"] != 1), **values
    )
    full = lambda value, kind=jnp.float32: jnp.full(count, value, kind)  # noqa: E731
    tiled = lambda value: jnp.broadcast_to(jnp.asarray(value), (count, vocab))  # noqa: E731
    slots = Slots(
        None,
        tiled(logits),
        full(0, jnp.int32),
        jnp.arange(count),
        jnp.broadcast_to(sampling.key_of(3, 1), (count, 2)),
        Controls(
            full(values["temperature"]),
            full(values["top_k"], jnp.int32),
            full(values["top_p"]),
            full(values["min_p"]),
            full(values["repetition"]),
        ),
        tiled(seen),
    )
    edits = Edits(
        tiled(bias.astype(np.float32)),
        tiled(made.astype(np.int32)),
        full(values["presence"]),
        full(values["frequency"]),
        full(True, bool),
    )
    words = np.packbits(np.pad(allowed, (0, -vocab % 32)), bitorder="little")
    masks = np.tile(words.view(np.uint32), (count, 1))
    yes = np.ones(count, bool)
    scores, after = jax.jit(drawing.draw)(
        slots, edits, yes, np.array(False), yes, masks
    )
    tokens = np.asarray(scores.tokens)
    found = np.bincount(tokens, minlength=vocab)
    assert not found[want == 0].any()
    assert (np.asarray(after.made) - made).sum() == count
    assert np.asarray(after.made)[7, tokens[7]] == made[tokens[7]] + 1
    expected = count * want
    often = expected >= 5
    statistic = ((found[often] - expected[often]) ** 2 / expected[often]).sum()
    freedom = often.sum() - 1
    spread = 2 / (9 * freedom)
    assert ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5 < 4.9
    # What is told knows of the mask and of nothing else.
    masked_logits = np.where(allowed, logits.astype(np.float64), -np.inf)
    logps = masked_logits - np.logaddexp.reduce(masked_logits)
    np.testing.assert_allclose(scores.logps, logps[tokens], atol=1e-5)


def test_penalties_count_the_tokens_of_the_text(tiny) -> None:
    """Greedy texts against a float64 model of penalties and biases, token by token."""
    steering = Steering(
        presence_penalty=0.3, frequency_penalty=0.2, logit_bias=((77, 1.5), (30, -9.0))
    )
    options = Sampling(max_new_tokens=30, temperature=0.0)
    (made,) = run(tiny, Request(PROMPT, options, steering=steering))[0]
    logits = model_logits(tiny, PROMPT + made.tokens)[len(PROMPT) - 1 :]
    counts = np.zeros(logits.shape[1])
    bias = np.zeros(logits.shape[1])
    bias[77], bias[30] = 1.5, -9.0
    plain = []
    for token, scores in zip(made.tokens, logits, strict=False):
        chosen = scores + bias - 0.2 * counts - 0.3 * (counts > 0)
        assert chosen[token] >= chosen.max() - 1e-4
        plain.append(int(scores.argmax()))
        counts[token] += 1
    assert plain != made.tokens and counts.max() > 1
    logps = logits[:-1] - np.logaddexp.reduce(logits[:-1], axis=-1, keepdims=True)
    want = logps[np.arange(30), made.tokens]
    np.testing.assert_allclose(made.logps, want, atol=2e-4)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: regex("(a"), "regular expression cannot be followed.*unclosed group"),
        (lambda: regex("(?=a)b"), "look-around"),
        (lambda: regex(r"a\1"), "backreferences are not supported"),
        (lambda: json_schema({"type": "obj"}), "Invalid type: obj"),
        (lambda: json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda: json_schema(False), "JSON schema cannot be followed: Unsatisfiable"),
        (lambda: json_schema({"$ref": "#/nowhere"}), "does not exist"),
        (lambda: grammar("start: nothing"), "grammar cannot be followed"),
        (lambda: grammar("root ::= ((("), "grammar cannot be followed"),
        (lambda: choice([]), "at least one text"),
        (lambda: choice(["a", ""]), "none of them empty"),
    ],
)
def test_structures_that_are_refused(tiny, make, match) -> None:
    engine = Engine(
        tiny.model, tiny.variables, slots=1, length=128, tokenizer=tiny.tokenizer
    )
    with pytest.raises(UserError, match=match):
        engine.submit(
            Request(PROMPT, Sampling(max_new_tokens=9), steering=steered(make()))
        )
    assert not engine.busy


@pytest.mark.parametrize(
    ("steering", "match"),
    [
        ({"logit_bias": ((10**6, 1.0),)}, "logit_bias names the token 1000000"),
        ({"min_tokens": 10}, "min_tokens 10 is above max_new_tokens 9"),
        ({"min_tokens": -1}, "min_tokens must be at least 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be finite"),
        ({"structure": regex("a")}, "a structure needs grammars"),
    ],
)
def test_steering_that_is_refused(tiny, steering, match) -> None:
    engine = Engine(tiny.model, tiny.variables, slots=1, length=128)
    with pytest.raises(UserError, match=match):
        options = Sampling(max_new_tokens=9)
        engine.check(Request(PROMPT, options, steering=Steering(**steering)))


def test_patterns_mean_what_they_mean_to_python(tiny) -> None:
    patterns = [
        r"^\d{2,3}$",
        r"[a-c]+|x?y",
        r"[a-z好é]{1,4}@\d\.com",
        "(?i)yes",
        r"[^a-z]{3}",
    ]
    requests = [
        Request(
            PROMPT,
            Sampling(num_samples=6, max_new_tokens=40, temperature=1.5, seed=n),
            tiny.stop_tokens,
            steering=steered(regex(pattern)),
        )
        for n, pattern in enumerate(patterns)
    ]
    for pattern, found in zip(patterns, run(tiny, *requests), strict=True):
        ended = [c.text for c in found if c.finish_reason == "stop"]
        assert ended and all(re.fullmatch(pattern, text) for text in ended), ended


def test_a_structure_that_becomes_too_much_ends_its_text_alone(tiny) -> None:
    """The library gives up on the way: that text ends with an error, others go on."""
    greedy = Sampling(max_new_tokens=12, temperature=0.0)
    engine = Engine(
        tiny.model, tiny.variables, slots=8, length=256, tokenizer=tiny.tokenizer
    )
    requests = [
        Request(PROMPT, greedy, tiny.stop_tokens, steering=steered(regex("[ab]{9}"))),
        Request(PROMPT, greedy, tiny.stop_tokens, steering=Steering(min_tokens=12)),
    ]
    numbers = [engine.submit(request) for request in requests]
    events = []
    for _ in range(4):
        events += engine.step()
    text = next(t for t in engine._texts if t is not None and t.number == numbers[0])
    assert text.guide is not None
    text.guide.matcher.consume_token(PROMPT[0])  # which the structure does not allow
    assert text.guide.matcher.is_error()
    while engine.busy:
        events += engine.step()
    ends = {e.request: e.finish_reason for e in events if e.finish_reason}
    assert ends == dict(zip(numbers, ("error", "length"), strict=True))


def test_the_blanks_of_json(tiny) -> None:
    """On one line or indented, as json.dumps writes; no lines of blanks."""
    grammars = Grammars(tiny.tokenizer, 300)

    def fits(text: str, **options: Any) -> bool:
        matcher = grammars.matcher(json_schema(SCHEMA, **options))
        tokens = tiny.tokenizer(text)["input_ids"]
        return matcher.validate_tokens(tokens) == len(tokens)

    value = {"answer": "yes", "scores": [3, 4]}
    spaced, close = json.dumps(value), json.dumps(value, separators=(",", ":"))
    for text in (spaced, close, *(json.dumps(value, indent=n) for n in (1, 2, 4, 8))):
        assert fits(text)
    assert fits(spaced, one_line=True) and not fits(close, one_line=True)
    assert not fits(json.dumps(value, indent=2), one_line=True)
    for wrong in ("  ", "\n\n", "\n \n", "\n" + 25 * " ", "\r"):
        assert not fits(close.replace(",", "," + wrong))


def test_grammars_are_made_once(tiny, monkeypatch) -> None:
    """Equal structures share a grammar; texts of it do not share their state."""
    grammars = Grammars(tiny.tokenizer, 300)
    made = []
    compiled = grammars._compiled
    monkeypatch.setattr(
        grammars, "_compiled", lambda one: made.append(one) or compiled(one)
    )
    first, second = (grammars.matcher(regex("ab")) for _ in range(2))
    token = tiny.tokenizer.convert_tokens_to_ids("ab")
    assert first.consume_token(token) and first.is_accepting()
    assert not second.is_accepting() and len(made) == 1
    with pytest.raises(UserError, match="needs a fast tokenizer"):
        Grammars(object(), 300).matcher(regex("ab"))


def test_every_program_is_compiled_once(tiny) -> None:
    """Whatever the structures are; and a free request needs none of them."""
    compiled: list[str] = []

    def listen(event: str, seconds: float, **facts: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(facts["fun_name"])

    free = Request(PROMPT, Sampling(max_new_tokens=4), tiny.stop_tokens)
    asked = [
        free._replace(steering=steering)
        for steering in (
            *(steered(structure) for structure, _ in LANGUAGES.values()),
            Steering(logit_bias=((4, 1.0),), presence_penalty=0.5, min_tokens=3),
        )
    ]
    # Sizes that no other test has.
    options: Any = {"slots": 3, "length": 384, "cache_dtype": "float16"}
    engine = Engine(tiny.model, tiny.variables, tokenizer=tiny.tokenizer, **options)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        list(completed(engine, [free]))
        first = sorted(name for name in compiled if "empty" not in name)
        compiled.clear()
        list(completed(engine, [*asked, free]))
        second = sorted(name for name in compiled if "no_edits" not in name)
        compiled.clear()
        list(completed(engine, [free, *asked[::-1]]))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert first == [f"jit({name})" for name in ("admit", "prefill", "step")]
    assert second == [f"jit({name})" for name in ("advance", "begin", "draw")]
    assert not compiled


def test_a_mesh_changes_no_text(tiny, tiny_llama) -> None:
    from jaxalign.checkpoints import load as load_lib
    from jaxalign.parallel.mesh import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    layers = [(i, i + 1) for i in range(3)]
    spread = load_lib.load(tiny_llama, groups=layers, mesh=mesh)
    request = Request(
        PROMPT,
        Sampling(max_new_tokens=20, num_samples=4),
        tiny.stop_tokens,
        steering=steered(choice(CHOICES), frequency_penalty=0.5),
    )
    options: Any = {"slots": 4, "length": 128, "tokenizer": tiny.tokenizer}
    want, got = (
        generate(one.model, one.variables, [request], **options)[0]
        for one in (tiny, spread)
    )
    assert [c.tokens for c in got] == [c.tokens for c in want]


def test_a_cancelled_text_leaves_its_slot_free_of_its_mask(tiny) -> None:
    engine = Engine(
        tiny.model, tiny.variables, slots=8, length=256, tokenizer=tiny.tokenizer
    )
    options = Sampling(max_new_tokens=20, temperature=0.0)
    number = engine.submit(Request(PROMPT, options, steering=steered(regex("a+"))))
    engine.step()
    engine.cancel(number)
    (found,) = [done for _, done in completed(engine, [Request(PROMPT, options)])]
    (want,) = run(tiny, Request(PROMPT, options))
    assert [c.tokens for c in found] == [c.tokens for c in want]
    assert isinstance(found[0], Completion)
