"""A model with its tokenizer: what turns texts into texts."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxalign.checkpoints import hub
from jaxalign.checkpoints import tensors as tensor_files
from jaxalign.checkpoints.load import Checkpoint, DType
from jaxalign.checkpoints.policy import open_policy
from jaxalign.checkpoints.renderer import (
    max_pixels_of,
    open_renderer,
    template_kwargs_of,
)
from jaxalign.data import rows
from jaxalign.data.image_rows import prompt_images
from jaxalign.data.records import Prompt, parse_prompt
from jaxalign.data.rendering import Renderer
from jaxalign.data.tokenizer import Tokenizer, special_tokens
from jaxalign.errors import UserError
from jaxalign.generation.engine import Completion, Request, Sampling, generate
from jaxalign.models import decoder, decoding
from jaxalign.models.quantised import Quantize
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from jaxalign.types import Model, Variables


__all__ = [
    "TextModel",
    "as_request",
    "check_slots",
    "cut",
    "fingerprint",
    "load",
    "text_with",
]


_TEXT_FILES = (
    *("tokenizer*", "*tokens*.json", "vocab.*", "merges.txt"),
    *("chat_template*", "generation_config.json"),
)


class TextModel(NamedTuple):
    """What it takes to turn texts into texts."""

    model: Model
    variables: Variables
    """Cut layer by layer."""
    renderer: Renderer
    stop_tokens: frozenset[int]
    """EOS and end of turn, by the tokenizer and by generation_config.json."""
    name: str
    """Of the model."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Return what turns text into tokens, and tokens into text."""
        return self.renderer.tokenizer

    def request(
        self,
        prompt: Prompt | str | Sequence[Any],
        sampling: Sampling | None = None,
        *,
        images: Sequence[Any] = (),
        image_dir: str | Path | None = None,
        **options: Any,
    ) -> Request:
        """Return what the engine is asked, for a text or messages, maybe with pictures.

        Pictures are opened and encoded when the engine reads the prompt, once for all
        samples.

        Args:
          prompt: a text, or messages, whose contents may have parts
            ``{"type": "image"}``.
          sampling: how it is answered; default ``Sampling()``.
          images: paths, bytes, data URLs, ``PIL.Image`` or arrays: one for each part;
            without parts they stand before the first user turn's text.
          image_dir: where relative paths start; default the working directory.
          **options: of :class:`Request`.
        Raises:
          UserError: see ``Renderer.prompt_encoding`` and ``records.parse_prompt``.
        Example::

          made = text_model.load("smolvlm")
          turns = [{"role": "user", "content": "What is this?"}]
          asked = made.request(turns, Sampling(temperature=0), images=["cat.png"])
          ((said,),) = made.complete([asked])
        """
        if not isinstance(prompt, Prompt):
            columns: dict[str, Any] = {"prompt": prompt}
            columns |= {"images": list(images)} if images else {}
            prompt = parse_prompt(columns, "the prompt", Path(image_dir or ""))
        sampling = sampling or Sampling()
        ends = self.ends(sampling.stop)
        return as_request(self.renderer, prompt, sampling, ends, **options)

    def complete(
        self, requests: Iterable[Request], **options: Any
    ) -> list[list[Completion]]:
        """Return the completions of each request, see ``engine.generate``."""
        return generate(
            self.model,
            self.variables,
            requests,
            **{
                "text_of": text_with(self.tokenizer),
                "tokenizer": self.tokenizer,
                **options,
            },
        )

    def ends(self, stop: Sequence[str]) -> frozenset[int]:
        """Return ``stop_tokens`` and those of stop texts, which no text would show."""
        return self.stop_tokens | special_tokens(self.tokenizer, stop)


def as_request(
    renderer: Renderer,
    prompt: Prompt,
    sampling: Sampling,
    stop_tokens: frozenset[int],
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    open_now: bool = False,
    **options: Any,
) -> Request:
    """Return what the engine is asked.

    Args:
      renderer: of the model.
      prompt: a text or a conversation, with its pictures.
      sampling: how it is answered.
      stop_tokens: that end a completion.
      sizes: width and height of each picture; None: read from their headers.
      open_now: open the pictures here, and not when the prompt is read.
      **options: of :class:`Request`.
    Raises:
      UserError: see ``Renderer.prompt_encoding``; with ``open_now`` also those of
        opening a picture.
    Example::

      renderer = Renderer(load_tokenizer("smollm2"))
      sampling, stops = Sampling(temperature=0), renderer.stop_tokens()
      as_request(renderer, parse_prompt({"prompt": "2 + 2 ="}), sampling, stops)
    """
    found = renderer.prompt_encoding(prompt, sizes)
    request = Request(found.tokens, sampling, stop_tokens, **options)
    if not prompt.images or renderer.patcher is None:
        return request
    images = functools.partial(
        prompt_images,
        *(prompt.images, found.layouts, found.feature_places, renderer.patcher),
    )
    return request._replace(
        images=images() if open_now else images, positions=found.positions
    )


def check_slots(batch_slots: int, cache_dtype: DType | None, mesh: MeshConfig) -> None:
    """Refuse options of an engine that cannot be, before anything is loaded.

    Raises:
      UserError: a number of slots that the devices cannot share, or a dtype that is
        none.
    Example:
      >>> check_slots(8, "bfloat16", MeshConfig())
    """
    if batch_slots < 1:
        raise UserError(f"batch_slots must be at least 1: got {batch_slots}")
    if batch_slots % mesh.rows:
        raise UserError(
            f"batch_slots must be a multiple of mesh.data × mesh.fsdp = {mesh.rows}: "
            f"got {batch_slots}"
        )
    if cache_dtype in ("auto", "fastest"):
        raise UserError(f"cache_dtype {cache_dtype} means nothing: leave it out")


def load(
    model: str | Path,
    adapter: str | None = None,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    dtype: DType = "float32",
    quantize: Quantize | None = None,
    mesh: MeshConfig | None = None,
    max_pixels: int | None = None,
) -> TextModel:
    """Load a model for generation.

    Args:
      model: Hugging Face directory or id.
      adapter: PEFT directory, exported hybrid, run directory, or None.
      template_kwargs: what the chat template is given; default as the run that
        ``adapter`` is was trained.
      dtype: of the weights and of the computation.
      quantize: how base weights are held; default as in the run, elsewhere ``none``.
      mesh: how the devices are arranged.
      max_pixels: of a picture, larger ones are made smaller; default as the run that
        ``adapter`` is was trained, elsewhere what the checkpoint's own files say.
    Raises:
      UserError: see ``policy.open_policy``.
    Example::

      policy = load("smollm2", adapter="run", dtype="bfloat16")
    """
    model = str(model)
    devices = make_mesh(mesh or MeshConfig())
    options = template_kwargs_of(template_kwargs, adapter)
    pixels = max_pixels_of(max_pixels, adapter)
    renderer = open_renderer(model, options, max_pixels=pixels)
    policy = open_policy(model, adapter, dtype=dtype, quantize=quantize, mesh=devices)
    checkpoint = policy.checkpoint
    return TextModel(
        *cut(checkpoint, policy.variables, mesh=devices, donate=True),
        renderer,
        renderer.stop_tokens() | _configured(hub.directory_of(model, weights=False)),
        checkpoint.name,
    )


def cut(
    checkpoint: Checkpoint,
    variables: Variables,
    *,
    mesh: Mesh | None = None,
    donate: bool = False,
) -> tuple[Model, Variables]:
    """Return a model and variables cut layer by layer, see ``decoding.by_layer``.

    Args:
      checkpoint: the base model.
      variables: its weights, or what was trained in their place, and adapters.
      mesh: devices that they lie on, if it is a mesh.
      donate: free every stack once its layers have been copied.
    Example::

      policy = open_policy("smollm2", "run")
      model, variables = cut(policy.checkpoint, policy.variables)
    """
    config = checkpoint.config
    model = decoder.make_model(
        config,
        groups=[(i, i + 1) for i in range(config.text.num_layers)],
        vision_groups=checkpoint.vision_groups,
        dtype=checkpoint.dtype,
        mesh=mesh,
    )
    return model, decoding.by_layer(variables, donate=donate)


def _configured(directory: Path) -> frozenset[int]:
    """Return the ends of text that generation_config.json names."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return frozenset()
    ends = tensor_files.read_json(path).get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    return frozenset(end for end in listed if isinstance(end, int))


def fingerprint(model: str | Path) -> str:
    """Return a hash of what turns messages into tokens, them into text, and ends it.

    Raises:
      UserError: a file cannot be read.
    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> before = fingerprint(folder)
      >>> _ = (folder / "tokenizer.json").write_text("{}")
      >>> fingerprint(folder) == before
      False
    """
    directory = hub.directory_of(model, weights=False)
    found = {path for name in _TEXT_FILES for path in directory.glob(name)}
    return rows.hash_files(sorted(found))


def text_with(tokenizer: Any) -> Any:
    """Return what turns tokens into text, special ones left out.

    Example::

      text_of = text_with(load_tokenizer("smollm2"))
      completions = generate(base.model, base.variables, requests, text_of=text_of)
    """

    def text_of(tokens: Sequence[int]) -> str:
        return tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    return text_of
