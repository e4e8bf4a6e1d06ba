"""A run says what it was trained on."""

from pathlib import Path

from jaxalign.data import records, seen
from jaxalign.training.config import from_dict
from jaxalign.training.run import train
from tests import synthetic


def test_a_run_keeps_the_hashes_of_what_it_is_trained_on(
    tiny_llama: Path, tmp_path: Path
) -> None:
    made = synthetic.feedback_records(4)
    held_out = synthetic.feedback_records(2, seed=1)
    synthetic.write_jsonl(tmp_path / "train.jsonl", made)
    synthetic.write_jsonl(tmp_path / "eval.jsonl", held_out)
    options = {
        "model": str(tiny_llama),
        "data": str(tmp_path / "train.jsonl"),
        "eval_data": str(tmp_path / "eval.jsonl"),
        "out": str(tmp_path / "run"),
        "max_steps": 1,
        "row_length": 192,
        "max_length": 96,
    }
    train(from_dict(options))
    path = tmp_path / "run" / seen.SEEN
    found = seen.read(path)
    assert found == seen.seen_of(records.from_rows(made))
    assert len(found.texts) == 4
    # What is only evaluated on was not trained on.
    others = seen.seen_of(records.from_rows(held_out)).texts
    assert not found.texts & others
    # Going on writes nothing anew.
    before = path.stat().st_mtime_ns
    train(from_dict(options))
    assert path.stat().st_mtime_ns == before
