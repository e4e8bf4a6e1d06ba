"""Fixtures of all tests, and the environment that they run in."""

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path


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


def _place_of_programs() -> str:
    """Return where compiled programs are kept, for all workers and later runs.

    They fit one version of the compiler, its flags and one kind of processor.
    """
    cpu = Path("/proc/cpuinfo")  # of Linux
    told = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    wanted = ("model name", "flags", "Features")
    processor = {line for line in told if line.startswith(wanted)}
    parts = (
        metadata.version("jaxlib"),
        os.environ["XLA_FLAGS"],
        platform.machine(),
        *sorted(processor),
    )
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return str(Path(__file__).parents[1] / ".cache" / f"xla-tests-{name}")


# Never the user's cache. JAXALIGN_TEST_PROGRAMS names another place; empty for none.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "JAXALIGN_TEST_PROGRAMS", _place_of_programs()
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import functools  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import hypothesis  # noqa: E402
import pytest  # noqa: E402

from tests import kinds, synthetic  # noqa: E402


# The same examples on every run and every machine; a slow machine is no failure.
hypothesis.settings.register_profile(
    "jaxalign", derandomize=True, deadline=None, database=None
)
hypothesis.settings.load_profile("jaxalign")

_LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_configure(config: pytest.Config) -> None:
    """Name the kinds of tests that the short run leaves out."""
    for kind, meaning in kinds.KINDS.items():
        config.addinivalue_line("markers", f"{kind}: {meaning}")
    config.stash[_LEFT_OUT] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Mark tests with their kinds, keep the short run short, begin with what is long.

    With ``-m`` or a test's own name the user says what is to run.
    """
    if config.args == config.getini("testpaths") and (wrong := kinds.stale(items)):
        raise pytest.UsageError("tests/kinds.py: " + "; ".join(wrong))
    for item in items:
        for kind in kinds.kinds_of(item):
            item.add_marker(kind)
    items.sort(key=lambda item: -kinds.seconds_of(item))
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    kept, left = [], []
    for item in items:
        (left if kinds.kinds_of(item) else kept).append(item)
    for item in left:
        for kind in kinds.kinds_of(item):
            config.stash[_LEFT_OUT][kind] = config.stash[_LEFT_OUT].get(kind, 0) + 1
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker whole files, the longest first: a file's fixtures are runs."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that prints the summary what a worker left out."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["left_out"] = session.config.stash[_LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker left out; all leave out the same."""
    found = getattr(node, "workeroutput", {}).get("left_out", {})
    node.config.stash[_LEFT_OUT].update(found)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Name what was not run, with the command that runs it."""
    left = config.stash[_LEFT_OUT]
    if not left:
        return
    terminalreporter.section("not run here")
    for kind, meaning in kinds.KINDS.items():
        if count := left.get(kind):
            command = f"pytest -n 2 -m {kind}"
            terminalreporter.line(f"{count:5} {kind:9} {command:24} {meaning}")
    terminalreporter.line(f'all of them: pytest -n 2 -m "{kinds.REST}"')


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


@pytest.fixture(scope="session", autouse=True)
def kept_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have checkpoints written once for all workers of a run."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    synthetic.keep_in(place / "kept")


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
    """Return ``make_llama(**overrides)``, which gives a tiny checkpoint to change.

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
