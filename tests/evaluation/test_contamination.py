"""What an evaluation has in common with a run's training set."""

from pathlib import Path

from PIL import Image

from jaxalign.data import records, seen
from jaxalign.data.picture import Picture
from jaxalign.evaluation.contamination import overlap_with_training
from jaxalign.evaluation.questions import question
from jaxalign.evaluation.task import Question


def picture(path: Path, colour: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return path


def test_items_that_were_trained_on_are_counted_by_how_they_are_known(
    tmp_path: Path,
) -> None:
    trained = picture(tmp_path / "train" / "1.png", "red")
    rows = [
        {"prompt": "<image>What is it?", "chosen": "A", "rejected": "B"},
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": "Well?"}],
                }
            ],
            "images": [str(trained)],
            "chosen": [{"role": "assistant", "content": "A"}],
            "rejected": [{"role": "assistant", "content": "B"}],
        },
    ]
    made = seen.seen_of([*records.from_rows(rows[1:]), *records.from_rows(rows[:1])])
    seen.write(tmp_path / "seen.txt", made)
    same = Picture(picture(tmp_path / "test" / "9.png", "red"), "same bytes")
    named = Picture(picture(tmp_path / "test" / "1.png", "blue"), "same name")
    system: Question = Question(
        "q",
        (
            {"role": "system", "content": "What is it?"},
            {"role": "user", "content": "New?"},
        ),
    )
    questions = {
        3: [question("q", " What is it? ")],
        5: [question("q", "Something else", same)],
        8: [question("q", "Something else", named)],
        9: [question("one", "New?"), question("two", "Well?", same)],
        11: [system],
    }
    assert overlap_with_training(tmp_path, questions) == {
        "compared": 5,
        "items": 3,
        "by_text": 2,
        "by_picture": 2,
        "by_name_alone": 1,
        "indices": [3, 5, 9],
    }


def test_a_directory_without_hashes_says_nothing(tmp_path: Path) -> None:
    assert overlap_with_training(tmp_path, {}) is None
