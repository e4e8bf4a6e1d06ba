"""Which attention kernel a run gets, what it is told, and what is refused."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxalign.checkpoints import load as load_lib
from jaxalign.errors import UserError
from jaxalign.models.attention import choice, splash, trial, xla
from jaxalign.models.attention.choice import Machine, Work
from jaxalign.objectives import policy
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from jaxalign.training import attention, run
from jaxalign.training.config import TrainConfig
from tests import scenes


CPU = Machine("cpu")
TPU = Machine("tpu")
HOPPER = Machine("gpu", (9, 0), 91002)
AMPERE = Machine("gpu", (8, 0), 91002)
WORK = Work(dtype="bfloat16", heads=8, kv_heads=2, head_dim=64, rows=4, row_length=2048)


@pytest.fixture
def interpreted(monkeypatch):
    """Let splash run on a CPU, step by step."""
    attend = splash.attend
    monkeypatch.setattr(
        splash,
        "attend",
        lambda *args, **options: attend(*args, **{**options, "interpret": True}),
    )


def work(**changes):
    return dataclasses.replace(WORK, **changes)


@pytest.mark.parametrize(
    ("machine", "given", "wanted", "reason"),
    [
        (CPU, {}, "xla", "cpu: cudnn needs an NVIDIA GPU, splash a TPU"),
        (Machine("gpu"), {}, "xla", "it needs an NVIDIA GPU"),  # another maker's
        (HOPPER, {}, "cudnn", "gpu"),
        (TPU, {}, "splash", "tpu"),
        (TPU, {"windows": True, "softcap": True, "prefix": True}, "splash", "tpu"),
        (AMPERE, {}, "xla", "a Hopper GPU or a later one .9.0.: this is 8.0"),
        (HOPPER._replace(cudnn=90100), {}, "xla", "cuDNN 9.6 .90600.: found 90100"),
        (HOPPER._replace(cudnn=None), {}, "xla", "found None"),
        (HOPPER, {"dtype": "float32"}, "xla", "takes bfloat16: dtype is float32"),
        (HOPPER, {"head_dim": 60}, "xla", "multiple of 8 up to 256: .* have 60"),
        (HOPPER, {"head_dim": 512}, "xla", "have 512"),
        (HOPPER, {"windows": True}, "xla", "no sliding windows"),
        (HOPPER, {"softcap": True}, "xla", "no soft cap"),
        (HOPPER, {"prefix": True}, "xla", "no derivative of the log-sum-exp"),
        (HOPPER, {"rows": 1024}, "xla", "too many tokens for it: lower batch_rows"),
        (TPU, {"row_length": 40000}, "xla", "up to 32768 places: row_length is 40000"),
        (TPU, {"tensor": 4}, "splash", "tpu"),
        (TPU, {"tensor": 16}, "xla", "8 heads with 2 .* mesh.tensor = 16"),
        (TPU, {"heads": 9, "kv_heads": 3, "tensor": 2}, "xla", "9 heads with 3"),
    ],
)
def test_auto_takes_the_platform_s_kernel_if_it_can(
    machine, given, wanted, reason
) -> None:
    chosen = choice.choose("auto", machine, work(**given))
    assert chosen.implementation == wanted
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(chosen.reason)
    # Asked for by name, what auto leaves out for a reason is refused for that reason.
    name = {"gpu": "cudnn", "tpu": "splash"}.get(machine.platform)
    if name is not None and wanted == "xla":
        with pytest.raises(UserError, match=f"attention {name} cannot run: .*{reason}"):
            choice.choose(name, machine, work(**given))


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ("cudnn", "cannot run: it needs an NVIDIA GPU. Use attention auto, or xla"),
        ("splash", "cannot run: it needs a TPU"),
    ],
)
def test_a_kernel_that_is_asked_for_and_cannot_run_is_an_error(asked, match) -> None:
    with pytest.raises(UserError, match=match):
        choice.choose(asked, CPU, WORK)
    for name in ("xla", "dense"):
        assert choice.choose(name, HOPPER, WORK).implementation == name


def test_env_says_what_runs() -> None:
    said = choice.available(choice.machine_of(jax.devices()[0]))
    assert said["xla"].startswith("runs on cpu")
    assert said["cudnn"] == "does not run: it needs an NVIDIA GPU"
    assert choice.available(HOPPER)["cudnn"].startswith("runs on gpu; for bfloat16")
    assert choice.available(TPU)["splash"].startswith("runs on tpu; for rows of up")
    gpu = SimpleNamespace(platform="gpu", compute_capability="9.0")
    assert choice.machine_of(gpu).capability == (9, 0)


def test_a_kernel_is_tried_out_and_a_wrong_one_refused(monkeypatch) -> None:
    small = work(dtype="float32", heads=2, kv_heads=1, head_dim=8, windows=True)
    device = jax.devices()[0]
    error = trial.try_out("splash", device, small, 5.0, interpret=True)
    assert error < 1e-5

    def wrong(q, k, v, layout, **options):
        out, lse = xla.attend(q, k, v, layout, scale=0.1, softcap=5.0)
        return out, lse

    monkeypatch.setattr(splash, "attend", wrong)
    with pytest.raises(UserError, match="attention splash is wrong on cpu: on a small"):
        trial.try_out("splash", device, small, 5.0)
    monkeypatch.setattr(
        splash, "attend", lambda q, *_, **__: (q * jnp.nan, q[..., 0] * jnp.nan)
    )
    with pytest.raises(UserError, match="by inf of the largest value"):
        trial.try_out("splash", device, small, 5.0)

    def broken(*_, **__):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(splash, "attend", broken)
    with pytest.raises(UserError, match="fails on cpu: no such kernel. Use"):
        trial.try_out("splash", device, small, 5.0)


def test_a_run_on_a_tpu_s_mesh_says_what_it_chose_and_why(
    tiny_llama, monkeypatch, interpreted
) -> None:
    model = load_lib.open_config(tiny_llama)[0].text
    mesh = make_mesh(MeshConfig())
    config = TrainConfig(model=str(tiny_llama), data="d", out="o")
    chosen = attention.choose(config, model, mesh, prefix=False)
    assert chosen.implementation == "xla"
    monkeypatch.setattr(trial, "machine_of", lambda _: TPU)
    chosen = attention.choose(config, model, mesh, prefix=True)
    assert chosen == ("splash", "tpu; within 0.0% of the plain formula on a trial")
    config = dataclasses.replace(config, attention="splash", row_length=2**16)
    with pytest.raises(UserError, match="row_length is 65536"):
        attention.choose(config, model, mesh, prefix=True)


def test_a_kernel_that_cannot_run_stops_a_run_before_its_data_is_read(
    tiny_llama, tmp_path
) -> None:
    config = TrainConfig(
        model=str(tiny_llama),
        data=str(tmp_path / "absent.jsonl"),
        out=str(tmp_path / "run"),
        attention="cudnn",
    )
    with pytest.raises(UserError, match="attention cudnn cannot run"):
        run.train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mesh", [None, {"data": 2, "tensor": 2}], ids=str)
def test_a_model_computes_the_same_with_splash(tiny_llama, interpreted, mesh) -> None:
    """Scanned and rematerialised layers; log-probabilities and LoRA's gradients."""
    data = scenes.dataset(tiny_llama, 4)
    batch = scenes.batch(data, row_length=2 * int(data.lengths.max()), rows=2)
    found = []
    for name in ("xla", "splash"):
        loaded = load_lib.load(
            tiny_llama,
            remat="dots",
            attention_implementation=name,
            mesh=None if mesh is None else make_mesh(MeshConfig(**mesh)),
        )
        adapters = scenes.random_lora(loaded.variables["params"])

        def total(adapters, loaded=loaded):
            variables = {**loaded.variables, "lora": adapters}
            logps = policy.policy_token_logps(variables, batch, model=loaded.model)
            return logps.sum()

        value, grads = jax.jit(jax.value_and_grad(total))(adapters)
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
        found.append((float(value), float(norm)))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
