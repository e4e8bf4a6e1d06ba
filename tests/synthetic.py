"""What tests run on, made here: a tiny tokenizer, tiny checkpoints, feedback records.

Nothing is downloaded and no text is taken from anywhere.
"""

import functools
import gzip
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WORDS = ("the", "answer", "is", "not", "and", "river", "seven", "blue", "Über", "好")

# Spellings in the byte-level alphabet (Ġ is a space, Ċ a newline). "Ġå" holds a space
# and the first byte of 好, whose other two bytes are tokens of their own.
_MERGED = (
    *("Ġthe", "Ġanswer", "Ġis", "Ġnot", "Ġand", "Ġri", "Ġse", "en", "user", "assist"),
    *("ab", "bab", "ĠĠ", "ĠĠĠĠ", "ĊĊ", "Ġå"),
)


def make_tokenizer(
    directory: Path,
    *,
    bos: bool = False,
    trim_offsets: bool = True,
    template: str | None = CHATML,
    eos: str | None = "<|im_end|>",
    swallow: bool = False,
) -> Any:
    """Write a byte-level BPE tokenizer whose pad token is its EOS; return it loaded.

    Args:
      directory: where to.
      bos: put ``<s>`` in front of what the tokenizer's own call encodes.
      trim_offsets: leave leading spaces out of the tokens' offsets.
      template: chat template; None for none.
      eos: the EOS token.
      swallow: special tokens take in the whitespace around them, as those of Phi do.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    merges: list[tuple[str, str]] = []
    for word in _MERGED:
        for cut in range(1, len(word)):
            if (word[:cut], word[cut]) not in merges:
                merges.append((word[:cut], word[cut]))
    names = [
        *SPECIAL,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *dict.fromkeys(a + b for a, b in merges),
    ]
    raw = Tokenizer(BPE({name: i for i, name in enumerate(names)}, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    level = processors.ByteLevel(trim_offsets=trim_offsets)
    start = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    raw.post_processor = processors.Sequence([level, start]) if bos else level
    raw.add_special_tokens(
        [
            AddedToken(name, special=True, lstrip=swallow, rstrip=swallow)
            for name in SPECIAL
        ]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>" if bos else None,
        eos_token=eos,
        pad_token=eos,
        clean_up_tokenization_spaces=False,
    )
    if template is not None:
        made.chat_template = template
    made.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def make_llama(
    directory: Path,
    *,
    tokenizer: dict[str, Any] | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a random Llama with a tokenizer, see :func:`make_checkpoint`."""
    settings = {"tie_word_embeddings": False, **overrides}
    return make_checkpoint(
        directory, "llama", tokenizer=tokenizer, seed=seed, **settings
    )


def make_checkpoint(
    directory: Path,
    model_type: str,
    *,
    tokenizer: dict[str, Any] | None = None,
    seed: int = 0,
    save: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write a random model of a family with a tokenizer; return its directory.

    It is made once a run of the tests, and every caller has a copy to change. The sizes
    are odd on purpose: 4 heads on 2 key-value heads, a head size that is not width /
    heads, norm weights that are not 1, biases that are not 0.

    Args:
      directory: where to.
      model_type: as in config.json.
      tokenizer: options of :func:`make_tokenizer`.
      seed: of the weights.
      save: options of ``save_pretrained``.
      **overrides: fields of the config.
    """
    options = {"tokenizer": tokenizer, "seed": seed, "save": save, **overrides}
    text = json.dumps([model_type, options], sort_keys=True, default=repr)
    kept = made_once(
        text, lambda empty: _write_checkpoint(empty, model_type, **options)
    )
    shutil.copytree(kept, directory, dirs_exist_ok=True)
    return directory


_PLACES: list[Path] = []


def keep_in(place: Path) -> None:
    """Say where :func:`made_once` keeps things: one place for all workers of a run."""
    _PLACES[:] = [place]


def made_once(key: str, make: Callable[[Path], Any]) -> Path:
    """Return a directory that ``make`` filled once a run, whoever asks for it.

    Args:
      key: tells what is in it; equal keys, equal contents.
      make: fills an empty directory.
    """
    if not _PLACES:
        keep_in(Path(tempfile.mkdtemp()))
    kept = _PLACES[0] / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not kept.exists():
        _PLACES[0].mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=_PLACES[0]))
        make(draft)
        try:
            draft.rename(kept)
        except OSError:  # another worker was faster
            shutil.rmtree(draft)
    return kept


def _write_checkpoint(
    directory: Path,
    model_type: str,
    *,
    tokenizer: dict[str, Any] | None,
    seed: int,
    save: dict[str, Any] | None,
    **overrides: Any,
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = make_tokenizer(directory, **(tokenizer or {}))
    settings: dict[str, Any] = {
        "vocab_size": len(made),
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
        "bos_token_id": made.bos_token_id,
        "eos_token_id": made.eos_token_id,
        "pad_token_id": made.pad_token_id,
    }
    settings |= overrides
    settings = {name: value for name, value in settings.items() if value is not ...}
    config = AutoConfig.for_model(model_type, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                torch.nn.init.normal_(weight, mean=1.0, std=0.3)
            elif name.endswith("bias") and model_type != "llama":
                torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(directory, **(save or {}))


def sentence(rng: random.Random, words: int = 5) -> str:
    """Return a sentence without sense."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, words))) + "."


def response(
    rng: random.Random,
    *,
    sentences: int = 3,
    aspects: Sequence[str] = ("correctness", "helpfulness"),
) -> tuple[str, list[dict[str, Any]]]:
    """Return a completion and its segments, one a sentence, scores 0 to 4."""
    text, segments = "", []
    for _ in range(rng.randint(1, sentences)):
        text += " " if text else ""
        start = len(text)
        text += sentence(rng)
        scores = {aspect: rng.randint(0, 4) for aspect in aspects}
        segments.append({"start": start, "end": len(text), "scores": scores})
    return text, segments


def feedback_record(
    rng: random.Random, *, chat: bool = True, segments: bool = True, **options: Any
) -> dict[str, Any]:
    """Return one feedback record; ``options`` are those of :func:`response`."""
    question = f"what is {sentence(rng)}"
    chosen, chosen_segments = response(rng, **options)
    rejected, rejected_segments = response(rng, **options)
    record: dict[str, Any] = {
        "prompt": f"Q: {question}\nA:",
        "chosen": f" {chosen}",
        "rejected": f" {rejected}",
    }
    shift = 1
    if chat:
        shift = 0
        record = {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
    if segments:
        for name, found in (
            ("chosen_segments", chosen_segments),
            ("rejected_segments", rejected_segments),
        ):
            record[name] = [
                {**s, "start": s["start"] + shift, "end": s["end"] + shift}
                for s in found
            ]
    return record


def feedback_records(n: int, *, seed: int = 0, **options: Any) -> list[dict[str, Any]]:
    """Return n records; ``options`` are those of :func:`feedback_record`."""
    rng = random.Random(seed)
    return [feedback_record(rng, **options) for _ in range(n)]


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    """Write JSON Lines, gzipped where the name ends in .gz; return the path."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    # GPT-2's byte-level alphabet: printable bytes are themselves, the others follow
    # from U+0100 in order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes that a token of :func:`make_tokenizer` stands for."""
    name = tokenizer.convert_ids_to_tokens(int(token))
    if name in SPECIAL:
        return name.encode()
    return bytes(_bytes_of_letters()[letter] for letter in name)
