"""What ``import jaxalign`` opens: every public module, lazily, and nothing else."""

import inspect
import json
import pkgutil
import pydoc
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

import jaxalign


PUBLIC = {
    "": "Model adapters checkpoints data errors evaluation feedback generation judging "
    "load_hf models objectives parallel reports save_hf training trees types variables",
    "adapters": "adapter gates hybrid lora low_rank prefix saved selection",
    "checkpoints": "adapter_files adapter_start contents convert export fetch gguf hub "
    "load policy renderer runs state tensors",
    "data": "chat layouts loader packing pairs patchers patches picture records "
    "reference_cache rendering rows sample seen spans tfds_builders tokenizer",
    "evaluation": "boards calibration choices compare config contamination delimited "
    "differences estimate figstep_pictures grader_agreement grading harness "
    "inspect_log joining letters measures observation_agreement outcomes published "
    "results safety_grading score shares statistics task task_files",
    "feedback": "annotate candidates config decompose disentangle disentangle_file "
    "distill distill_config distill_estimate distill_file distill_filters examining "
    "gate gate_metrics judge_file lessons pair_filters pair_statistics pairing rounds "
    "segmenters",
    "generation": "answer_logps completions context engine files sampling serving "
    "slots steps structure text_model",
    "judging": "agreement asking config endpoint_model engine_model estimate graders "
    "judge make prompts refusals safety store votes writing",
    "models": "attention config decoder decoding families layers quantised rotary "
    "vision",
    "objectives": "anchored aspects diagnostics divergences dpo2d logistic logps "
    "margins mix objective optimal_transport options pairwise policy record "
    "reference_free segment_choice sft stepwise table token_level token_weights "
    "unpaired",
    "parallel": "mesh multihost sharding",
    "reports": "comparison evaluation page rounds run",
    "training": "config data_check describe evaluation loop metrics optimizer publish "
    "reference run run_directory setup start step",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name) -> None:
    package = getattr(jaxalign, name) if name else jaxalign
    want = PUBLIC[name].split()
    assert sorted(package.__all__) == sorted(want)
    assert [n for n in dir(package) if n != "__version__"] == sorted(want)
    for public in want:
        assert getattr(package, public).__doc__, public
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


def test_every_namespace_is_listed() -> None:
    found = {m.name for m in pkgutil.iter_modules(jaxalign.__path__) if m.ispkg}
    assert found - {"cli"} == set(PUBLIC) - {""}


def modules() -> list[types.ModuleType]:
    return [
        getattr(getattr(jaxalign, package), name)
        for package, names in PUBLIC.items()
        if package
        for name in names.split()
    ]


def opened(package: types.ModuleType) -> Iterator[types.ModuleType]:
    """Yield all modules that completion reaches from a package, and the package."""
    yield package
    for name in dir(package):
        value = getattr(package, name)
        if inspect.ismodule(value):
            yield from opened(value)


def test_completion_shows_the_public_names_of_every_module_and_no_others() -> None:
    found = {module.__name__: module for module in opened(jaxalign)}
    assert {module.__name__ for module in modules()} <= found.keys()
    assert "jaxalign.feedback.decompose.claims" in found  # a module of a module
    del found["jaxalign"]  # its version is listed too
    for name, module in found.items():
        assert dir(module) == sorted(module.__all__), name
        assert all(hasattr(module, public) for public in dir(module)), name


@pytest.mark.parametrize(
    "statement",
    [
        "import jaxalign.objectives.dpo2d as m",
        "from jaxalign.objectives import dpo2d as m",
        "from jaxalign.objectives.dpo2d import DPO2DConfig as c; import sys; "
        "m = sys.modules[c.__module__]",
        "import jaxalign.objectives.objective, jaxalign; m = jaxalign.objectives.dpo2d",
    ],
)
def test_dir_is_the_same_however_a_module_was_imported(statement) -> None:
    code = f"{statement}\nprint(dir(m) == sorted(m.__all__), 'jnp' in dir(m))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["True", "False"]


def test_public_names_of_modules_have_docstrings() -> None:
    lacking = []
    for module in modules():
        for name in module.__all__:
            value = getattr(module, name)
            own = getattr(value, "__module__", None) == module.__name__
            if own and (inspect.isfunction(value) or inspect.isclass(value)):
                doc = value.__doc__ or ""
                # What NamedTuple and dataclass write by themselves says nothing.
                if not doc or doc.startswith(f"{name}("):
                    lacking.append(f"{module.__name__}.{name}")
    assert not lacking


def test_what_is_public_shows_an_example() -> None:
    """By a doctest, or where a model would have to be loaded, by a block of code."""
    lacking = [
        f"{module.__name__}.{name}"
        for module in modules()
        for name in module.__all__
        if getattr(value := getattr(module, name), "__module__", "") == module.__name__
        and (inspect.isfunction(value) or (inspect.isclass(value)))
        # Of plain data its fields are all there is to see, of a protocol its form.
        and not hasattr(value, "_fields")
        and not getattr(value, "_is_protocol", False)
        and not any(sign in (value.__doc__ or "") for sign in (">>>", "Example::"))
    ]
    assert not lacking


def test_one_name_means_one_thing() -> None:
    """Classes: a name that two modules have is the very same class."""
    owners: dict[str, Any] = {}
    for module in modules():
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value):
                assert owners.setdefault(name, value) is value, name


def test_all_is_reached_from_one_import_without_a_device() -> None:
    code = """
import json, sys, time
began = time.perf_counter()
import jaxalign
took = time.perf_counter() - began
early = [m for m in ("jax", "flax", "numpy", "torch") if m in sys.modules]
row = {"prompt": "Q", "chosen": "a", "rejected": "b"}
records = jaxalign.data.records.from_rows([row])
jaxalign.adapters.lora.LoRAConfig(), jaxalign.training.config, jaxalign.Model
from jax._src import xla_bridge
print(json.dumps([took, early, xla_bridge.backends_are_initialized()]))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    took, early, touched = json.loads(out.stdout)
    assert took < 1 and early == [] and touched is False


def screen_of(value: Any) -> list[str]:
    """Return what help shows before the methods, on a terminal of 100 columns."""
    said = pydoc.plain(pydoc.render_doc(value)).partition("Methods defined here")[0]
    return [
        line[at : at + 100]
        for line in said.splitlines()
        for at in range(0, max(len(line), 1), 100)
    ]


def test_what_help_says_of_an_objective_fits_a_screen() -> None:
    for config in jaxalign.objectives.objective.CONFIGS.values():
        screen = screen_of(config)
        assert any("Attributes:" in line for line in screen)
        assert len(screen) <= 50, config


def test_what_help_says_of_a_loss_fits_a_screen() -> None:
    losses = {
        name: value
        for module in modules()
        if module.__name__.startswith("jaxalign.objectives.")
        for name, value in vars(module).items()
        if name in module.__all__ and name.endswith("_loss")
    }
    assert {"dpo2d_loss", "dpo_loss", "simpo_loss", "kto_loss"} <= losses.keys()
    for loss in losses.values():
        screen = screen_of(loss)
        assert len(screen) <= 50 and any(">>>" in line for line in screen), loss
