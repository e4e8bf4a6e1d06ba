"""Fixtures of all tests, and the environment that they run in."""

import os
from importlib import metadata


# Before jax or transformers is imported: eight CPU devices, and no hub. The tests spend
# most of their time compiling tiny models. That takes half as long without LLVM's
# optimisations, and half of that with the elder of XLA's two ways to emit code and
# without splitting programs that small. Later versions may lack these flags, and end
# the process at one that they do not know. Set XLA_FLAGS to test with others. What only
# a GPU or TPU can show is tested with JAXALIGN_TEST_PLATFORMS=cuda,cpu (or tpu,cpu).
os.environ["JAX_PLATFORMS"] = os.environ.get("JAXALIGN_TEST_PLATFORMS", "cpu")
_FAST_COMPILATION = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        *(_FAST_COMPILATION if metadata.version("jaxlib").startswith("0.10.") else ()),
        os.environ.get("XLA_FLAGS", ""),
    )
).strip()
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"
# No compiled program is kept in the user's cache; a test may name a place of its own.
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""

import functools  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402

from tests import synthetic  # noqa: E402


# The same examples on every run and every machine; a slow machine is no failure.
hypothesis.settings.register_profile(
    "jaxalign", derandomize=True, deadline=None, database=None
)
hypothesis.settings.load_profile("jaxalign")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Drop compiled programs after a file once they have piled up to gigabytes."""
    yield
    statm = Path("/proc/self/statm")  # of Linux
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    if pages * os.sysconf("SC_PAGE_SIZE") > 3e9:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return ``make_tokenizer(**options)``, see ``synthetic.make_tokenizer``."""

    @functools.cache
    def made(options: str) -> Any:
        directory = tmp_path_factory.mktemp("tokenizer")
        return synthetic.make_tokenizer(directory, **json.loads(options))

    return lambda **options: made(json.dumps(options, sort_keys=True))


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return ``make_llama(**overrides)``, which writes a new tiny checkpoint.

    Options are those of ``synthetic.make_llama``: ``tokenizer={...}``, ``seed=1`` and
    any field of LlamaConfig.
    """

    def make(**options: Any) -> Path:
        return synthetic.make_llama(tmp_path_factory.mktemp("llama"), **options)

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_llama: Callable[..., Path]) -> Path:
    """Return the directory of a tiny random Llama with a ChatML tokenizer."""
    return make_llama()


@pytest.fixture
def shared_data() -> Path:
    """Return the folder of the data sets; skip the test where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the data sets are absent: {SHARED_DATA}")
    return SHARED_DATA
