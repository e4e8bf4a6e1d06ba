"""jaxalign serve with pictures: by OpenAI's client, from the places that may be."""

import functools
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from jaxalign.data import records
from jaxalign.errors import UserError
from jaxalign.generation.engine import Sampling
from jaxalign.generation.serving import fetching, service
from tests import vision_models
from tests.data.patchers import published
from tests.generation.scenes import Served, serving


GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8}

PUBLIC = "93.184.216.34"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("pictures")
    published.drawn(200, 60).save(place / "wide.png")
    published.drawn(60, 97).save(place.parent / "elsewhere.png")
    (place / "link.png").symlink_to(place.parent / "elsewhere.png")
    (place / "text.png").write_text("no picture")
    whole = (place / "wide.png").read_bytes()
    (place / "cut.png").write_bytes(whole[: len(whole) // 2])
    return place


def resolve(host: str, port: int, **_: Any) -> list[Any]:
    """Look up a few names, and none by the network."""
    found = {"pictures.test": PUBLIC, "inside.test": "10.0.0.7"}[host]
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, port))]


@pytest.fixture(scope="module")
def web(folder) -> Iterator[list[Any]]:
    """Serve the folder at the public address; yield whom was connected to."""
    import http.server
    import threading

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    connected: list[Any] = []

    def connect(address: Any, timeout: float) -> socket.socket:
        connected.append(address)
        here: Any = server.server_address
        return socket.create_connection(here, timeout=timeout)

    fetch = functools.partial(fetching.fetch, resolve=resolve, connect=connect)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "fetch", fetch)
        yield connected
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def served(tmp_path_factory, folder, web) -> Iterator[Served]:
    model = vision_models.write("qwen2_5_vl", tmp_path_factory.mktemp("sees"))
    options: dict[str, Any] = {"image_dir": str(folder), "fetch_images": True}
    with serving(model, batch_slots=4, max_pixels=28 * 28 * 12, **options) as found:
        yield found


def shows(*urls: str) -> list[Any]:
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}
        for url in urls
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "blue?"}]}]


def data_url(path: Path) -> str:
    row = {"prompt": "x", "image": str(path)}
    return records.parse_prompt(row).images[0].data_url()


def test_greedy_text_is_generate_s_wherever_the_picture_is(served, folder, web) -> None:
    made = served.service.made
    turns = [{"role": "user", "content": "blue?"}]
    greedy = Sampling(temperature=0.0, max_new_tokens=8)
    asked = made.request(turns, greedy, images=[folder / "wide.png"])
    ((wanted,),) = made.complete([asked], length=200)
    with served.client() as client:
        for url in (
            data_url(folder / "wide.png"),
            "wide.png",
            str(folder / "wide.png"),
            f"file://{folder}/wide.png",
            "http://pictures.test/wide.png",
        ):
            found = client.chat.completions.create(messages=shows(url), **GREEDY)
            assert found.choices[0].message.content == wanted.text
            assert found.usage.prompt_tokens == len(asked.tokens)
        stream = client.chat.completions.create(
            messages=shows("wide.png"), stream=True, n=2, **GREEDY
        )
        texts = {0: "", 1: ""}
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == {0: wanted.text, 1: wanted.text}
    assert web == [(PUBLIC, 80)]


def test_tokenize_counts_the_tokens_of_pictures(served, folder) -> None:
    def count(body: dict[str, Any]) -> Any:
        return httpx.post(f"{served.url}/tokenize", json=body, timeout=60).json()

    # 200 x 60 would be 7 x 2 units of 28 pixels; max_pixels allows 12, which fit as
    # 177 x 53 pixels at these proportions, cut to whole units: 6 x 1.
    text = count({"messages": [{"role": "user", "content": "blue?"}]})
    shown = count({"messages": shows("wide.png")})
    pad = served.service.made.renderer.patcher.token_id
    assert shown["tokens"].count(pad) == 6
    assert shown["count"] == text["count"] + 6 + 2  # begin and end of the picture
    refused = count({"messages": shows("wide.png"), "add_special_tokens": True})
    assert refused["error"]["param"] == "add_special_tokens"


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("absent.png", "no such file below the folder"),
        ("../elsewhere.png", "no such file below the folder"),
        ("link.png", "no such file below the folder"),
        ("/etc/hostname", "no such file below the folder"),
        ("file:///etc/hostname", "no such file below the folder"),
        ("text.png", "no picture: .* begins with b'no pictu'"),
        ("data:image/png;base64,%%", "a data URL that is no base64"),
        ("data:image/png,abc", "expected data:image/png;base64"),
        ("ftp://a/b.png", "expected a data URL, or the path of a file"),
        ("http://inside.test/wide.png", "has an address that is not public"),
        ("http://pictures.test/absent.png", "its server answered 404"),
        ("", "expected a data URL, or the path of a file"),
        ("cut.png", "the picture is broken, cut off"),
    ],
)
def test_a_picture_that_cannot_be_is_refused_with_its_field(served, url, match) -> None:
    with served.client() as client, pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(messages=shows("wide.png", url), **GREEDY)
    field = "messages[0].content[1].image_url.url"
    body: Any = error.value.body
    assert body["param"] == field and body["message"].startswith(f"{field}: ")
    with pytest.raises(UserError, match=match):
        raise UserError(body["message"])


@pytest.mark.parametrize(
    ("part", "param", "match"),
    [
        ({"type": "image_url", "image_url": {"url": 3}}, "image_url.url", "string"),
        ({"type": "image_url", "image_url": {}}, "image_url.url", "is missing"),
        ({"type": "image_url"}, "image_url", "is missing"),
        ({"type": "input_audio"}, "type", 'parts of type "text" and "image_url" are'),
        (
            {"type": "image_url", "image_url": {"url": "wide.png", "detail": "low"}},
            "image_url.detail",
            "'auto'",
        ),
    ],
)
def test_parts_that_are_none_are_named(served, part, param, match) -> None:
    messages: Any = [{"role": "user", "content": [part]}]
    with served.client() as client, pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(messages=messages, **GREEDY)
    body: Any = error.value.body
    assert body["param"] == f"messages[0].content[0].{param}"
    assert match in body["message"]


def test_a_server_that_was_not_told_reads_and_fetches_nothing(served, folder) -> None:
    sources = served.service._sources
    served.service._sources = type(sources)()
    try:
        for url, match in (
            ("wide.png", "it was started without image_dir"),
            ("http://pictures.test/wide.png", "serve with fetch_images true"),
        ):
            with (
                served.client() as client,
                pytest.raises(openai.BadRequestError, match=match),
            ):
                client.chat.completions.create(messages=shows(url), **GREEDY)
    finally:
        served.service._sources = sources


def test_a_model_of_texts_refuses_pictures_in_words(shared, tmp_path, folder) -> None:
    with shared.client() as client, pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(messages=shows("http://a/b.png"), **GREEDY)
    body: Any = error.value.body
    assert body["param"] == "messages[0].content[0].image_url.url"
    assert "the model takes texts only: it does not see" in body["message"]
    config = service.ServeConfig(model="m", image_dir=str(folder))
    with pytest.raises(UserError, match="image_dir and fetch_images have no effect"):
        service.Service(config, shared.service.made, shared.engine)
    with pytest.raises(UserError, match="image_dir nowhere is not a directory"):
        service.ServeConfig(model="m", image_dir="nowhere")
