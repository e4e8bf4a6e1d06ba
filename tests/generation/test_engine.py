"""The engine: transformers' tokens, and each text its own whatever is beside it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.adapters.hybrid import H2LPTConfig, HLPTConfig
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.adapters.prefix import PrefixConfig
from jaxalign.checkpoints import load as load_lib
from jaxalign.data.rendering import Renderer
from jaxalign.errors import UserError
from jaxalign.generation import text_model
from jaxalign.generation.engine import Completion, Engine, Request, Sampling, generate
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from tests import scenes as rows
from tests import synthetic
from tests.adapters import scenes
from tests.models.test_families import CASES


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, 200, length).tolist() for length in lengths]


def by_layer(made: scenes.Adapted) -> tuple[Any, Any]:
    """Return the model and its variables cut for generation."""
    return text_model.cut(made.checkpoint, made.variables)


def torch_greedy(model: Any, tokens: list[int], count: int) -> tuple[Any, ...]:
    """Return what transformers generates, with log-probs, and gaps of the best two."""
    import torch

    out = model.generate(
        torch.tensor([tokens]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [step[0].topk(2).values for step in out.logits]
    logps = [float(step[0].double().log_softmax(-1).max()) for step in out.logits]
    text = out.sequences[0, len(tokens) :].tolist()
    return text, logps, [float(a - b) for a, b in best]


def assert_greedy(
    made: Completion, want: list[int], logps: list[float], gaps: list[float]
) -> None:
    """Compare up to the first place where the best two are as good as equal."""
    for place, (got, token) in enumerate(zip(made.tokens, want, strict=True)):
        if got != token:
            assert gaps[place] < 1e-3, (place, made.tokens, want)
            return
        assert abs(made.logps[place] - logps[place]) < 1e-4, place


@pytest.mark.parametrize("name", CASES)
def test_greedy_text_is_that_of_transformers(tmp_path, name) -> None:
    """Prompts below and above a chunk, more of them than slots; 24 tokens each.

    Log-probs too: decoding against a cache is the full forward pass of each family.
    """
    model_type, options = CASES[name]
    directory = synthetic.make_checkpoint(tmp_path, model_type, **options)
    torch_model = rows.torch_model(directory)
    layers = [(i, i + 1) for i in range(torch_model.config.num_hidden_layers)]
    made = load_lib.load(directory, groups=layers)
    greedy = Sampling(max_new_tokens=24, temperature=0.0)
    texts = prompts(3, 45, 150)
    found = generate(
        made.model, made.variables, [Request(text, greedy) for text in texts], slots=2
    )
    for text, (completion,) in zip(texts, found, strict=True):
        assert_greedy(completion, *torch_greedy(torch_model, text, 24))
        assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj", "lm_head")),
        LoRAConfig(rank=2, alpha=4.0, dora=True),
        PrefixConfig(prefix_length=3, mode="separate", gate="sequence"),
        HLPTConfig(rank=2, prefix_length=3),
        H2LPTConfig(rank=2, prefix_length=3, gate="sequence"),
    ],
    ids=str,
)
def test_greedy_text_with_an_adapter_is_that_of_the_full_forward_pass(
    tiny_llama, config
) -> None:
    """Each token is the best of one pass over all before it, and has its log-prob."""
    made = scenes.adapted(tiny_llama, config)
    greedy = Sampling(max_new_tokens=12, temperature=0.0)
    texts = prompts(4, 140)
    found = generate(*by_layer(made), [Request(t, greedy) for t in texts], slots=2)
    for text, (completion,) in zip(texts, found, strict=True):
        whole = np.array([*text, *completion.tokens])
        logits = scenes.logits(made, scenes.one_sequence(whole[None]))[0]
        logps = np.asarray(jax.nn.log_softmax(logits, -1))[len(text) - 1 : -1]
        taken = logps[np.arange(12), completion.tokens]
        np.testing.assert_allclose(completion.logps, taken, atol=1e-4)
        np.testing.assert_allclose(taken, logps.max(-1), atol=1e-4)


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> text_model.TextModel:
    return text_model.load(str(tiny_llama))


OPTIONS = Sampling(max_new_tokens=10, temperature=1.3, top_p=0.9, num_samples=2)


def test_a_request_alone_and_among_31_others(tiny) -> None:
    """Other lengths, other settings, another order, other slots: the same tokens."""
    texts = prompts(*range(1, 160, 5))
    assert len(texts) == 32
    requests = [
        Request(
            text,
            dataclasses.replace(
                OPTIONS,
                seed=n,
                top_k=(0, 7)[n % 2],
                max_new_tokens=5 + n % 7,
                repetition_penalty=(1.0, 1.4)[n % 3 == 1],
            ),
        )
        for n, text in enumerate(texts)
    ]
    model, variables = tiny.model, tiny.variables
    options = {"slots": 6, "length": 256}
    together = generate(model, variables, requests, **options)
    backwards = generate(model, variables, requests[::-1], **options)[::-1]
    tokens = [[c.tokens for c in made] for made in together]
    assert tokens == [[c.tokens for c in made] for made in backwards]
    for n in (0, 7, 31):
        (alone,) = generate(model, variables, [requests[n]], **options)
        assert [c.tokens for c in alone] == tokens[n]
        for one, other in zip(alone, together[n], strict=True):
            np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)
    # Samples of a request differ, and so do equal prompts with other seeds.
    assert tokens[9][0] != tokens[9][1]
    again = requests[9]._replace(sampling=dataclasses.replace(OPTIONS, seed=100))
    (other,) = generate(model, variables, [again], **options)
    assert [c.tokens for c in other] != tokens[9]


def test_log_probs_are_those_of_the_untempered_model(tiny, tiny_llama) -> None:
    (text,) = prompts(9)
    options = dataclasses.replace(OPTIONS, temperature=0.6, repetition_penalty=1.5)
    (found,) = generate(tiny.model, tiny.variables, [Request(text, options)])
    checkpoint = load_lib.load(tiny_llama)
    for completion in found:
        whole = np.array([*text, *completion.tokens])[None]
        made = scenes.Adapted(checkpoint, {})
        logits = scenes.logits(made, scenes.one_sequence(whole))[0, 8:-1]
        logps = np.asarray(jax.nn.log_softmax(logits, -1))
        want = logps[np.arange(len(completion.tokens)), completion.tokens]
        np.testing.assert_allclose(completion.logps, want, atol=1e-4)


def test_stops(tiny) -> None:
    """A stop token belongs to the tokens but not to the text; a stop text to neither
    the text nor what follows it."""
    (prompt,) = prompts(6)
    text_of = text_model.text_with(tiny.tokenizer)
    run = lambda options, stops=(): generate(  # noqa: E731
        tiny.model,
        tiny.variables,
        [Request(prompt, options, frozenset(stops))],
        text_of=text_of,
        length=128,
    )[0][0]
    plain = Sampling(max_new_tokens=20, temperature=0.0, repetition_penalty=1.8)
    whole = run(plain)
    assert whole.finish_reason == "length" and len(whole.tokens) == 20
    assert whole.text == text_of(whole.tokens)
    stop = whole.tokens[5]
    first = whole.tokens.index(stop)
    ended = run(plain, [stop])
    assert ended.tokens == whole.tokens[: first + 1]
    assert ended.finish_reason == "stop" and ended.text == text_of(ended.tokens[:-1])
    # A text over the border of two tokens.
    at = len(text_of(whole.tokens[:8]))
    words = whole.text[at - 1 : at + 1]
    assert len(words) == 2
    ended = run(dataclasses.replace(plain, stop=("never there", words)))
    assert ended.finish_reason == "stop"
    assert ended.text == whole.text[: whole.text.find(words)]
    assert words in text_of(ended.tokens)
    assert words not in text_of(ended.tokens[:-1])
    assert ended.tokens == whole.tokens[: len(ended.tokens)]


def test_a_cancelled_request_frees_its_slots(tiny) -> None:
    texts = prompts(5, 6, 7)
    engine = Engine(tiny.model, tiny.variables, slots=2, length=128)
    long = dataclasses.replace(OPTIONS, max_new_tokens=100)
    first = engine.submit(Request(texts[0], long))
    waiting = engine.submit(Request(texts[1], long))
    last = engine.submit(Request(texts[2], OPTIONS))
    for _ in range(3):
        events = engine.step()
    assert {event.request for event in events} == {first}
    engine.cancel(first)
    engine.cancel(waiting)
    events = []
    while engine.busy:
        events += engine.step()
    assert {event.request for event in events} == {last}
    (alone,) = generate(
        tiny.model, tiny.variables, [Request(texts[2], OPTIONS)], length=128
    )
    for sample, completion in enumerate(alone):
        mine = [event.token for event in events if event.sample == sample]
        assert mine == completion.tokens


def test_prompts_read_piece_by_piece_between_steps(tiny) -> None:
    """A server reads one piece at a time, so that running texts go on."""
    texts = prompts(5, 150)
    engine = Engine(tiny.model, tiny.variables, slots=4, length=256)
    numbers = [engine.submit(Request(text, OPTIONS)) for text in texts]
    found: dict[tuple[int, int], list[int]] = {}
    while engine.busy:
        for event in engine.step(chunks=1):
            found.setdefault((event.request, event.sample), []).append(event.token)
    want = generate(
        tiny.model, tiny.variables, [Request(t, OPTIONS) for t in texts], length=256
    )
    for number, made in zip(numbers, want, strict=True):
        for sample, completion in enumerate(made):
            assert found[number, sample] == completion.tokens


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 2}, {"fsdp": 4}], ids=str)
def test_a_mesh_changes_no_token(tiny, tiny_llama, axes) -> None:
    mesh = make_mesh(MeshConfig(**axes))
    layers = [(i, i + 1) for i in range(3)]
    spread = load_lib.load(tiny_llama, groups=layers, mesh=mesh)
    requests = [Request(text, OPTIONS) for text in prompts(4, 33, 8)]
    options = {"slots": 4, "length": 128}
    want = generate(tiny.model, tiny.variables, requests, **options)
    got = generate(spread.model, spread.variables, requests, **options)
    assert [[c.tokens for c in made] for made in got] == [
        [c.tokens for c in made] for made in want
    ]


def test_stacks_and_single_layers_are_one_model(tiny, tiny_llama) -> None:
    stacked = load_lib.load(tiny_llama)
    requests = [Request(text, OPTIONS) for text in prompts(4, 33)]
    want = generate(tiny.model, tiny.variables, requests)
    got = generate(stacked.model, stacked.variables, requests)
    assert [[c.tokens for c in made] for made in got] == [
        [c.tokens for c in made] for made in want
    ]


def test_a_bfloat16_cache_takes_half_the_memory(tiny) -> None:
    (text,) = prompts(20)
    greedy = Sampling(max_new_tokens=8, temperature=0.0)
    whole, half = (
        generate(tiny.model, tiny.variables, [Request(text, greedy)], cache_dtype=kind)[
            0
        ][0]
        for kind in (None, "bfloat16")
    )
    np.testing.assert_allclose(half.logps[0], whole.logps[0], atol=0.2)
    engine = Engine(
        tiny.model, tiny.variables, slots=1, length=64, cache_dtype="bfloat16"
    )
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(engine._slots.cache)}
    assert kinds == {"bfloat16"}


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (Request([]), "the prompt has no token"),
        (Request([5] * 120, Sampling(max_new_tokens=9)), "make 129: expected at most"),
        (Request([5, 100_000]), "the token 100000, and the model"),
        (Request([5], Sampling(stop=("x",), max_new_tokens=3)), "need text_of"),
    ],
)
def test_requests_that_are_refused(tiny, request_, match) -> None:
    engine = Engine(tiny.model, tiny.variables, slots=1, length=128)
    with pytest.raises(UserError, match=match):
        engine.submit(request_)
    assert not engine.busy


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0: got -0.1"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_p": 1.2}, r"top_p must be in \[0, 1\]"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"stop": ("a", "")}, "stop has an empty text"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_options_that_are_refused(options, match) -> None:
    with pytest.raises(UserError, match=match):
        Sampling(**options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_have_diverged_are_told(tiny, temperature) -> None:
    variables = jax.tree.map(lambda leaf: leaf * np.nan, tiny.variables)
    asked = Request([5, 9], Sampling(temperature=temperature, top_p=0.5))
    with pytest.raises(UserError, match="logits are not finite"):
        generate(tiny.model, variables, [asked])


def test_an_adapter_that_reads_ahead_is_refused(tiny_llama) -> None:
    made = scenes.adapted(tiny_llama, HLPTConfig(rank=2, faithful=True))
    with pytest.raises(UserError, match="cannot decode token by token"):
        Engine(*by_layer(made), slots=1, length=64)


def test_prompt_tokens_are_those_of_the_template(tiny) -> None:
    from jaxalign.data import records

    tokenizer, renderer = tiny.tokenizer, Renderer(tiny.tokenizer)
    turns = [{"role": "user", "content": "What is up?"}]
    prompt = records.parse_prompt({"prompt": turns})
    want = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    assert renderer.prompt_tokens(prompt) == list(want["input_ids"])
    text = records.parse_prompt({"prompt": "What is up?"})
    assert renderer.prompt_tokens(text) == tokenizer("What is up?")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in renderer.stop_tokens()
    assert tokenizer.eos_token_id in tiny.stop_tokens


def test_every_program_is_compiled_once(tiny) -> None:
    """What is compiled ahead is what is called, also by the next engine."""
    compiled: list[str] = []

    def listen(event: str, seconds: float, **facts: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(facts["fun_name"])

    requests = [
        Request(text, OPTIONS, judged=judged)
        for text, judged in zip(prompts(5, 150), (False, True), strict=True)
    ]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        # Sizes, and a dtype of the cache, that no other test has.
        options: Any = {"slots": 7, "length": 384, "cache_dtype": "float16"}
        generate(tiny.model, tiny.variables, requests, **options)
        found = sorted(name for name in compiled if "empty" not in name)
        compiled.clear()
        generate(tiny.model, tiny.variables, requests, **options)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    names = "admit", "admit", "prefill", "prefill", "step"
    assert found == [f"jit({name})" for name in names]
    assert not compiled
