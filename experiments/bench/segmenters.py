"""Sentence segmenters side by side, on the sentences that are marked by hand.

    pip install pysbd sentencex  # jaxalign needs neither
    python -m experiments.bench.segmenters

Run from the repository's root; half a minute. Expected: ours first in every column.
"fresh" are texts that were marked after all rules; one abbreviation was put back since.
"ours + sentencex" keeps our blocks, masks, line breaks and joining, and asks sentencex
where sentences of the prose end; likewise pysbd. F1 is of the boundaries inside the
texts, exact the share of texts without any error. The speed is on the marked texts,
each a call of its own.

sentencex (Wikimedia, MIT, wheels for CPython 3.10 to 3.15) is kept up and gives
offsets, but takes quadratic time on unpaired quotation marks and backticks and refuses
halves of surrogate pairs. pysbd (MIT, pure Python) had its last release in 2021.
"""

import importlib
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

from jaxalign.feedback.segmenters import sentences
from jaxalign.feedback.segmenters.plain import cut
from tests.feedback import marked


LANGUAGES = ("english", "chinese", "structured")

Segmenter = Callable[[str], marked.Spans]
Cut = Callable[[str, str], Iterable[str]]


def pieces_of_sentencex(language: str, text: str) -> Iterable[str]:
    """Cut with sentencex."""
    sentencex: Any = importlib.import_module("sentencex")  # it has no types
    return sentencex.segment(language, text)


def pieces_of_pysbd(language: str, text: str) -> Iterable[str]:
    """Cut with pysbd."""
    import pysbd

    return pysbd.Segmenter(language=language, clean=False).segment(text)


def offsets(pieces: Iterable[str], text: str) -> list[int]:
    """Return where the pieces end; a piece that the text lacks is an error."""
    found, at = [], 0
    for piece in pieces:
        at = text.index(piece.strip(), at) + len(piece.strip())
        found.append(at)
    return found


def alone(library: Cut, language: str) -> Segmenter:
    """Return the library as a segmenter."""
    return lambda text: cut(text, 0, len(text), offsets(library(language, text), text))


def inside_ours(library: Cut, language: str) -> Segmenter:
    """Return our segmenter with the ends of sentences from the library."""
    return lambda text: sentences(
        text, ends=lambda prose: offsets(library(language, prose), prose)
    )


def main() -> None:
    """Print the table."""
    texts = marked.read()
    columns = {
        **{g: [t for t in texts if t.language == g] for g in LANGUAGES},
        "fresh": [t for t in texts if t.part == "fresh"],
    }
    code = {t.text: "zh" if t.language == "chinese" else "en" for t in texts}
    print(f"{len(texts)} texts, {sum(len(t.spans) for t in texts)} segments")
    print(f"{'':18}" + "".join(f"{name:>20}" for name in columns) + f"{'MB/s':>8}")
    print(f"{'':18}" + f"{'F1   exact':>20}" * len(columns))
    rows: dict[str, Callable[[str], Segmenter]] = {"ours": lambda _: sentences}
    for name, library in (
        ("sentencex", pieces_of_sentencex),
        ("pysbd", pieces_of_pysbd),
    ):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed")
            continue
        rows[f"ours + {name}"] = lambda code, x=library: inside_ours(x, code)
        rows[name] = lambda code, x=library: alone(x, code)
    for name, make in rows.items():
        line = f"{name:18}"
        for of_column in columns.values():
            score = marked.agreement(lambda t, m=make: m(code[t])(t), of_column)
            line += f"{score.f1:13.3f}{score.exact:7.2f}"
        print(f"{line}{speed(make('en'), [t.text for t in texts]):8.2f}")


def speed(segmenter: Segmenter, texts: list[str]) -> float:
    """Return megabytes (UTF-8) a second, over a second at least."""
    done, began = 0, time.perf_counter()
    for text in itertools.cycle(texts):
        segmenter(text)
        done += len(text.encode())
        seconds = time.perf_counter() - began
        if seconds > 1:
            return done / seconds / 1e6
    raise ValueError("there is no text")


if __name__ == "__main__":
    main()
