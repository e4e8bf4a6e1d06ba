"""Rows in ChineseSimpleVQA's layout, made up, with a picture each; and who answers."""

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image


TOPICS = ("建筑|桥", "生物|鸟类", "生物|文学与神话与神话", "科学|天文学")
GRADES = ("correct", "incorrect", "not_attempted")


def write(folder: Path, count: int = 24) -> list[dict[str, Any]]:
    """Write the file and its pictures as they are published; return the rows.

    Rows 0 and 1 share their id; every row's words are its own.
    """
    place = folder / "chinese_simplevqa"
    (place / "images").mkdir(parents=True)
    rows = []
    for n in range(count):
        name = f"{max(n, 1)}" if n < 2 else f"{n}"
        rows.append(
            {
                "ID": f"id{name}",
                "image_url": f"https://upload.example.org/thumb/Secretplace{n}.jpg",
                "recognition_question": f"图中的第{n}号东西叫什么?",
                "recognition_answer": f"宝物{n}甲 (Treasure{n} of Old)",
                "final_question": f"第{n}号东西建于哪一年?",
                "final_answer": f"{1200 + n}年乙",
                "Topic": TOPICS[n % len(TOPICS)],
                "matched_image": f"picture{n}.png",
                "desc": "" if n == 3 else f"说明{n}丙:宝物{n}甲,{1200 + n}年乙。",
            }
        )
        size = (17 + n, 40 - n % 9)
        picture = Image.new("RGB", size, (n * 9 % 256, 255 - n * 7 % 256, 90))
        picture.save(place / "images" / f"picture{n}.png")
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (place / "chinese_simplevqa.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return rows


def grade_of(row: int, question: str) -> str:
    """Return the known grade of a row's question."""
    return GRADES[(row * 7 + (question == "final") * row * row) % 5 % 3]


def say(body: dict[str, Any]) -> str:
    """Play the model, or the judge who knows every grade."""
    if "response_format" not in body:
        number = re.search(r"第(\d+)号", json.dumps(body, ensure_ascii=False))
        assert number is not None
        return f"答案{number[1]}"
    material = json.loads(text_of(body["messages"][-1]))
    number = re.search(r"第(\d+)号", material["question"])
    assert number is not None and material["response"] == f"答案{number[1]}"
    question = "recognition" if "叫什么" in material["question"] else "final"
    return json.dumps({"grade": grade_of(int(number[1]), question)})


def text_of(message: dict[str, Any]) -> str:
    """Return what a message says, pictures left out."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)
