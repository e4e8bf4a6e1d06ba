"""Reading a checkpoint's options of pictures, and what is refused of them."""

import json
import pickle
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import transformers

from jaxalign.data.patchers import AnySize, FixedSquare, SplitTiles
from jaxalign.errors import UserError
from tests.data.patchers import published


@pytest.mark.parametrize(
    "kind, family",
    [(SplitTiles, "smolvlm-2.2b"), (FixedSquare, "llava-1.5"), (AnySize, "qwen2-vl")],
)
def test_both_eras_of_files_say_the_same(tmp_path, kind: Any, family: str) -> None:
    made = []
    for era in (4, 5):
        (tmp_path / str(era)).mkdir()
        checkpoint = published.write(tmp_path / str(era), family, era=era)
        made.append(kind.from_files(*checkpoint.arguments))
    old, new = made
    assert old == new and old.settings == new.settings
    assert old.processor is not new.processor
    copied = pickle.loads(pickle.dumps(old))
    picture = published.drawn(9, 40)  # for tiles, one column of them
    for ours, theirs in zip(copied.patches(picture), new.patches(picture), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_files_that_transformers_saves_are_read(tmp_path) -> None:
    checkpoint = published.write(tmp_path, "qwen2.5-vl")
    asked = AnySize.from_files(*checkpoint.arguments)
    asked.processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["size"] == {"longest_edge": 12845056, "shortest_edge": 3136}
    assert "max_pixels" not in saved
    assert AnySize.from_files(*checkpoint.arguments) == asked


def test_settings_hold_what_decides_the_numbers(tmp_path) -> None:
    checkpoint = published.write(tmp_path, "qwen2.5-vl")
    patcher = AnySize.from_files(*checkpoint.arguments)
    told = json.loads(patcher.settings)
    assert told["patcher"] == "AnySize" and told["window"] == 8
    assert told["processor"] == "Qwen2VLImageProcessorPil"
    options = told["options"]
    assert options["size"] == {"shortest_edge": 3136, "longest_edge": 12845056}
    assert options["image_mean"] == published.CLIP_MEAN and options["resample"] == 3
    assert PIL.__version__.startswith(told["pillow"] + ".")
    assert transformers.__version__.startswith(told["transformers"] + ".")
    other = AnySize.from_files(*checkpoint.arguments, max_pixels=784 * 64)
    assert other.settings != patcher.settings and other != patcher
    with pytest.raises(AttributeError):
        patcher.token = ""  # type: ignore


def test_names_of_older_files(tmp_path) -> None:
    """Those that no longer are, and a file that names no class."""
    names: list[dict[str, Any]] = [
        {"image_processor_type": "CLIPImageProcessorFast"},
        {
            "image_processor_type": None,
            "feature_extractor_type": "CLIPFeatureExtractor",
        },
        {"image_processor_type": None},
        {"image_processor_type": None, "crop_size": 336, "size": 336},
    ]
    picture = published.drawn(80, 50)
    found = []
    for changes in names:
        checkpoint = published.write(tmp_path, "llava-1.5", changes=changes)
        patcher = FixedSquare.from_files(*checkpoint.arguments)
        found.append(patcher.patches(picture).values)
    for values in found[1:]:
        np.testing.assert_array_equal(values, found[0])


@pytest.mark.parametrize("most, edge", [
    (512**2, 512), (512**2 + 1, 512), (1024**2 - 1, 512), (1_500_000, 1024),
    (2048**2, 2048),
])  # fmt: skip
def test_max_pixels_of_tiles(tmp_path, most: int, edge: int) -> None:
    checkpoint = published.write(tmp_path, "smolvlm-256m")
    patcher = SplitTiles.from_files(*checkpoint.arguments, max_pixels=most)
    assert patcher.processor.size.longest_edge == edge
    for size in ((1, 1), (640, 480), (480, 640), (2000, 30), (513, 511)):
        layout = patcher.layout(*size)
        tiles = max(len(layout.grids) - 1, 1)
        assert tiles * 512**2 <= most
        assert len(layout.text.split("<image>")) == len(layout.grids) * 64 + 1
    patches = patcher.patches(published.drawn(9, 48))
    assert patches.images.max() + 1 == len(patcher.layout(9, 48).grids)


def test_max_pixels_of_tiles_keeps_a_longest_edge_below_it(tmp_path) -> None:
    uneven = {"size": {"longest_edge": 1300}}
    checkpoint = published.write(tmp_path, "smolvlm-256m", changes=uneven)
    patcher = SplitTiles.from_files(*checkpoint.arguments, max_pixels=1536**2)
    assert patcher.processor.size.longest_edge == 1300
    with pytest.raises(UserError, match=r"max_pixels 4194304.*to 2359296"):
        SplitTiles.from_files(*checkpoint.arguments, max_pixels=2048**2)


def test_max_pixels_of_any_size(tmp_path) -> None:
    checkpoint = published.write(tmp_path, "qwen2.5-vl")
    for most in (6272, 100_000, 20_000_000):
        patcher = AnySize.from_files(*checkpoint.arguments, max_pixels=most)
        for size in ((640, 480), (30, 30), (5000, 4900)):
            ((rows, columns),) = patcher.layout(*size).grids
            assert 3136 <= rows * columns * 196 <= most
    patches = patcher.patches(published.drawn(30, 30))
    assert len(patches.features) == 4
    patcher = AnySize.from_files(*checkpoint.arguments, max_pixels=100_000)
    patches = patcher.patches(published.drawn(640, 480))
    assert len(patches.features) == patcher.units(patcher.layout(640, 480)) == 117


@pytest.mark.parametrize("most", [-1, 0, 512**2 - 1, 2560**2])
def test_max_pixels_that_tiles_cannot_keep(tmp_path, most: int) -> None:
    checkpoint = published.write(tmp_path, "smolvlm-256m")
    with pytest.raises(
        UserError, match=f"max_pixels {most}: expected 262144 .* 4194304"
    ):
        SplitTiles.from_files(*checkpoint.arguments, max_pixels=most)


def test_max_pixels_without_effect(tmp_path) -> None:
    checkpoint = published.write(tmp_path, "llava-1.5")
    with pytest.raises(UserError, match=r"max_pixels 9 has no effect.*336 x 336"):
        FixedSquare.from_files(*checkpoint.arguments, max_pixels=9)
    whole = {"do_image_splitting": False}
    checkpoint = published.write(tmp_path, "smolvlm-256m", changes=whole)
    with pytest.raises(UserError, match=r"max_pixels 262144 has no effect.*512 x 512"):
        SplitTiles.from_files(*checkpoint.arguments, max_pixels=512**2)
    patcher = SplitTiles.from_files(*checkpoint.arguments)
    assert patcher.layout(90, 700).grids == ((32, 32),)
    assert patcher.patches(published.drawn(90, 70)).values.shape == (1024, 768)


def test_max_pixels_below_the_least(tmp_path) -> None:
    checkpoint = published.write(tmp_path, "qwen2-vl")
    with pytest.raises(UserError, match=r"max_pixels 3135.*3136"):
        AnySize.from_files(*checkpoint.arguments, max_pixels=3135)


def test_pictures_too_long(tmp_path) -> None:
    patcher = AnySize.from_files(*published.write(tmp_path, "qwen2-vl").arguments)
    assert patcher.layout(200, 1).text
    for size in ((201, 1), (3, 601)):
        with pytest.raises(UserError, match=f"{size[0]} x {size[1]} pixels.*200 times"):
            patcher.layout(*size)
    square = FixedSquare.from_files(*published.write(tmp_path, "llava-1.5").arguments)
    assert square.layout(1, 1000).text
    with pytest.raises(UserError, match=r"1 x 5000 pixels would have 564480000.*crop"):
        square.layout(1, 5000)
    with pytest.raises(UserError, match="5000 x 1 pixels"):
        square.patches(published.drawn(5000, 1))


VISION = {name: f.config["vision_config"] for name, f in published.FAMILIES.items()}


@pytest.mark.parametrize("kind, family, changes, config, message", [
    (SplitTiles, "smolvlm-256m", {"image_processor_type": "CLIPImageProcessor"}, {},
     r"image processor is CLIPImageProcessor.*fed by Idefics3ImageProcessor or Smol"),
    (SplitTiles, "smolvlm-256m", {"do_resize": False}, {}, "do_resize is False"),
    (SplitTiles, "smolvlm-256m", {"image_mean": [0.5, 0.5]}, {},
     r"preprocessor_config.json: with these options SmolVLMImageProcessor fails"),
    (SplitTiles, "smolvlm-256m", {"size": {"height": 64, "width": 64}}, {},
     "size is {'height': 64, 'width': 64}. Expected longest_edge"),
    (SplitTiles, "smolvlm-256m", {}, {"scale_factor": None}, "has no scale_factor"),
    (SplitTiles, "smolvlm-256m", {}, {"scale_factor": 5}, "scale_factor 5 does not di"),
    (SplitTiles, "smolvlm-256m", {}, {"vision_config": {}},
     "has no vision_config.patch_size"),
    (SplitTiles, "smolvlm-256m", {}, {"image_token_id": 7}, "token 7 stands for a pic"),
    (SplitTiles, "smolvlm-256m", {}, {"image_token_id": 99999}, "tokenizer has None"),
    (FixedSquare, "llava-1.5", {}, {"image_token_index": None}, "neither image_token"),
    (FixedSquare, "llava-1.5", {}, {"vision_feature_select_strategy": "cls"},
     "select_strategy of config.json is 'cls'. Expected default or full"),
    (FixedSquare, "llava-1.5", {}, {"vision_config": {
        **VISION["llava-1.5"], "model_type": "resnet"}}, r"resnet'.*dinov2"),
    (FixedSquare, "llava-1.5", {"crop_size": {"height": 224, "width": 224}}, {},
     r"pictures of \(224, 224\) pixels .*takes \(336, 336\)"),
    (FixedSquare, "llava-1.5", {"do_center_crop": False}, {}, r"\(None, None\) pixels"),
    (AnySize, "qwen2-vl", {"merge_size": 1}, {}, "spatial_merge_size .* is 2, the im"),
    (AnySize, "qwen2-vl", {"size": {"longest_edge": 9}, "min_pixels": None,
                           "max_pixels": None}, {}, "fails on any picture"),
    (AnySize, "qwen2.5-vl", {}, {"vision_config": VISION["qwen2-vl"]},
     "no vision_config.window_size"),
])  # fmt: skip
def test_what_does_not_fit(tmp_path, kind: Any, family, changes, config, message):
    checkpoint = published.write(tmp_path, family, changes=changes, config=config)
    with pytest.raises(UserError, match=message):
        kind.from_files(*checkpoint.arguments)


@pytest.mark.parametrize("text, message", [
    (None, "has no image processor. Expected preprocessor_config.json"),
    ("{", "preprocessor_config.json: it is no JSON"),
    ("[]", "expected an object, got list"),
])  # fmt: skip
def test_files_that_are_none(tmp_path, text: str | None, message: str) -> None:
    checkpoint = published.write(tmp_path, "qwen2-vl")
    path = tmp_path / "preprocessor_config.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        AnySize.from_files(*checkpoint.arguments)


WITHOUT_TORCH = """
import json, sys
from pathlib import Path
from PIL import Image
from jaxalign.data.patchers import AnySize, FixedSquare, SplitTiles
from transformers import AutoTokenizer
from transformers.utils import is_torch_available

for kind, directory in zip((SplitTiles, FixedSquare, AnySize), sys.argv[1:]):
    config = json.loads(Path(directory, "config.json").read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    patcher = kind.from_files(directory, config, tokenizer)
    print(len(patcher.patches(Image.new("RGB", (97, 61))).features))
print(is_torch_available(), "torch" in sys.modules)
"""


def test_nothing_of_it_needs_torch_or_warns(tmp_path) -> None:
    """In an environment that is this one without torch."""
    installed = Path(sysconfig.get_path("purelib"))
    apart = tmp_path / "site-packages"
    apart.mkdir()
    for path in installed.iterdir():
        if not path.name.startswith(("torch", "functorch")) and path.suffix != ".pth":
            (apart / path.name).symlink_to(path)
    places = []
    for family in ("smolvlm-256m", "llava-1.5", "qwen2.5-vl"):
        place = tmp_path / family
        place.mkdir()
        published.write(place, family, changes={"size": {"longest_edge": 512}}
                        if family == "smolvlm-256m" else None)  # fmt: skip
        places.append(str(place))
    repository = str(Path(__file__).parents[3])
    code = f"import sys\nsys.path += [{repository!r}, {str(apart)!r}]\n{WITHOUT_TORCH}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c", code, *places],
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["64", "577", "6", "False", "False"], done.stderr
    said = [line for line in done.stderr.splitlines() if "PyTorch was not" not in line]
    assert not said
