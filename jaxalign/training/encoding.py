"""Pictures encoded once: what a frozen tower makes of a run's pictures, on disk."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign import progress, trees
from jaxalign.checkpoints import adapter_start, contents
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.data import image_rows, kept_features
from jaxalign.data.kept_features import Filling, Kept
from jaxalign.data.pairs import PairDataset
from jaxalign.data.patches import Patcher, Patches, PictureLayout
from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from jaxalign.models import decoder
from jaxalign.models.quantised import Quantize
from jaxalign.parallel import multihost, sharding
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from jaxalign.stacks import SCOPES
from jaxalign.training.inputs import RunInputs
from jaxalign.training.kept_parts import encoded_scopes
from jaxalign.types import ImageInputs


__all__ = ["Encoder", "encoded", "encoded_inputs"]

Waiting = tuple[str, Picture, PictureLayout]
"""A picture that is not encoded yet: its file's SHA-256, and what becomes of it."""


class Encoder(NamedTuple):
    """What makes features of pictures, not loaded before some are wanted."""

    model: str
    kept: Kept
    dtype: Any
    quantize: Quantize
    mesh: Mesh
    rows: int
    """Of pictures that are encoded at once, over all devices."""
    options: Mapping[str, Any] = {}
    """Of the model, see ``models.decoder.make_model``."""
    given: Checkpoint | None = None
    """The model, if it is loaded already."""

    def key(self, patcher: Patcher) -> dict[str, str]:
        """Return all that the numbers depend on beside a picture's file."""
        scopes = encoded_scopes(self.kept)
        if self.given is None:
            weights = contents.fingerprint_of(self.model, scopes)
        else:
            weights = _digest(
                load_lib.of_scopes(self.given.variables["params"], scopes)
            )
        return {
            "kept": self.kept,
            "weights": weights,
            "dtype": str(self.dtype),
            "quantize": self.quantize,
            "pictures": patcher.settings,
        }

    def load(self) -> Checkpoint:
        """Return tower and connector, ready to run."""
        if self.given is not None:
            return self._moved(self.given)
        with progress.reading(f"loading the {' and '.join(SCOPES)}") as show:
            return load_lib.load(
                self.model,
                dtype=self.dtype,
                quantize=self.quantize,
                mesh=self.mesh,
                scopes=SCOPES,
                progress=show,
                **self.options,
            )

    def _moved(self, given: Checkpoint) -> Checkpoint:
        """Return tower and connector of a loaded model on the mesh."""
        model = decoder.make_model(
            given.config,
            groups=given.groups,
            vision_groups=given.vision_groups,
            dtype=given.dtype,
            mesh=self.mesh,
            **self.options,
        )
        params = load_lib.of_scopes(given.variables["params"], SCOPES)
        placed = adapter_start.place({"params": params}, self.mesh, given.family)
        return given._replace(model=model, variables=placed)


def _digest(params: Any) -> str:
    digest = hashlib.sha256()
    for path, leaf in sorted(trees.by_path(params).items()):
        digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()


def encoded(
    datasets: Sequence[PairDataset], encoder: Encoder, directory: Path
) -> list[PairDataset]:
    """Return data whose pictures are encoded, those that are not yet now.

    Args:
      datasets: of one run.
      encoder: of the pictures.
      directory: has a folder for each key.
    Raises:
      UserError: no record has a picture, one cannot be read, or the disk is full.
    """
    pairs = [pair for data in datasets for pair in data.pairs]
    pictures = [picture for pair in pairs for picture in pair.images]
    patcher = next((d.patcher for d in datasets if d.patcher is not None), None)
    if patcher is None or not pictures:
        raise UserError(
            "image_features cached has no effect: no record has a picture. Leave it out"
        )
    known = kept_features.digests(pictures)
    key = encoder.key(patcher)
    folder = kept_features.folder_of(directory, key)
    with kept_features.filling(folder, encoder.kept, key) as store:
        missing = {
            known[picture.source]: (known[picture.source], picture, layout)
            for pair in pairs
            for picture, layout in zip(pair.images, pair.layouts, strict=True)
            if known[picture.source] not in store
        }
        count = len(set(known.values()))
        progress.say(
            f"pictures: {count}, {count - len(missing)} of them encoded in {folder}"
        )
        if missing:
            _fill(store, list(missing.values()), encoder, patcher)
        kept = store.kept(known)
    return [data._replace(kept=kept) for data in datasets]


class _Laid(NamedTuple):
    """Pictures in the rows of one call of the tower."""

    images: ImageInputs
    pictures: list[tuple[str, int, int, Patches]]
    """SHA-256, row, units before it, and patches of each."""


def encoded_inputs(inputs: RunInputs, run: Path | None) -> RunInputs:
    """Return a run whose pictures are encoded, where features of them are kept.

    Args:
      inputs: of the run.
      run: its directory, if it has one.
    Raises:
      UserError: see :func:`encoded`; or there is no place for them.
    """
    config, data = inputs.config, inputs.data
    if inputs.kept is None:
        return inputs
    place = config.reference_cache or run
    if place is None:
        raise UserError(
            "image_features cached keeps files, and this session has no directory: "
            "give out, or reference_cache"
        )
    given = inputs.objects.checkpoint
    assert inputs.kernel is not None  # of a model of the library's
    mesh = inputs.mesh
    if multihost.several():
        # The first that has the folder encodes them all, by itself; the others find
        # them there.
        mesh = make_mesh(MeshConfig(), jax.local_devices())
    encoder = Encoder(
        config.model,
        inputs.kept,
        config.dtype if given is None else given.dtype,
        config.quantize,
        mesh,
        config.batch_rows,
        {
            "attention_implementation": inputs.kernel.implementation,
            "attention_block": config.attention_block,
        },
        given,
    )
    parts = [data.train, *([] if data.evaluation is None else [data.evaluation])]
    train, *rest = encoded(parts, encoder, Path(place) / "features")
    inputs.source.data = train
    held_out = rest[0] if rest else None
    return inputs._replace(data=data._replace(train=train, evaluation=held_out))


def _fill(
    store: Filling, missing: Sequence[Waiting], encoder: Encoder, patcher: Patcher
) -> None:
    """Encode pictures, and keep those of each call before the next one's."""
    units = max(patcher.units(layout) for _, _, layout in missing)
    batches = list(_batches(missing, patcher, encoder.rows, units))
    eyes = encoder.load()
    image_fn = eyes.model.image_fn
    assert image_fn is not None
    states = encoder.kept == "states"
    run = jax.jit(lambda variables, images: image_fn(variables, images, states=states))
    # Decoding and cutting go on beside the tower, one call ahead of it.
    with ThreadPoolExecutor(1) as pool:
        rest = iter(batches)
        ahead = pool.submit(_lay, next(rest), patcher, units)
        for _ in progress.track(batches, len(batches), "encoding pictures"):
            laid, following = ahead.result(), next(rest, None)
            if following is not None:
                ahead = pool.submit(_lay, following, patcher, units)
            images = sharding.put_batch(laid.images, encoder.mesh)
            made = np.asarray(run(eyes.variables, images))
            made = made.reshape(made.shape[0], units, -1)
            store.add(
                [(picture[0], _in_text(made, *picture[1:])) for picture in laid[1]]
            )


def _batches(
    missing: Sequence[Waiting], patcher: Patcher, rows: int, units: int
) -> Iterator[list[list[Waiting]]]:
    """Yield rows of pictures for each call; a row has room for so many units."""
    batch: list[list[Waiting]] = [[]]
    used = 0
    for waiting in missing:
        size = patcher.units(waiting[2])
        if used + size > units:
            if len(batch) == rows:
                yield batch
                batch = []
            batch.append([])
            used = 0
        batch[-1].append(waiting)
        used += size
    yield batch + [[]] * (rows - len(batch))


def _lay(batch: Sequence[Sequence[Waiting]], patcher: Patcher, units: int) -> _Laid:
    """Open pictures and lay their patches into rows."""
    images = image_rows.no_images(len(batch), units * patcher.merge**2, patcher)
    pictures = []
    for row, waiting in enumerate(batch):
        begin = count = 0
        for digest, picture, layout in waiting:
            patches = image_rows.open_patches(picture, layout, patcher)
            image_rows.lay_patches(images, row, patches, units=begin, count=count)
            pictures.append((digest, row, begin, patches))
            begin += len(patches.features)
            count += len(layout.grids)
    return _Laid(images, pictures)


def _in_text(made: np.ndarray, row: int, begin: int, patches: Patches) -> np.ndarray:
    """Return what was made of a picture's units, in the order of the text."""
    units = np.flatnonzero(patches.features >= 0)
    ordered = np.empty((len(units), made.shape[2]), made.dtype)
    ordered[patches.features[units]] = made[row, begin + units]
    return ordered
