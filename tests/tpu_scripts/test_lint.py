"""What others say of the scripts: shellcheck, yamllint, the real tools' parsers."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tpu_scripts.stage import SCRIPTS


SHELL = ["setup_host.sh", "slurm.sbatch", "tpu_vm.sh"]
README = (SCRIPTS / "README.md").read_text(encoding="utf-8")


def run(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        words, capture_output=True, text=True, env=os.environ | environment
    )


def jobset(*more: str) -> str:
    command = [sys.executable, str(SCRIPTS / "gke_jobset.py"), "--dry_run"]
    flags = ["--name=pairs", "--image=lab/jaxalign:1", "--accelerator_type=v6e-16"]
    found = run(*command, *flags, *more, "--", "jaxalign", "train", "a b")
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="shellcheck is not installed"
)
@pytest.mark.parametrize("name", SHELL)
def test_shellcheck_finds_nothing(name: str) -> None:
    found = run("shellcheck", "--shell=bash", str(SCRIPTS / name))
    assert found.returncode == 0, found.stdout


@pytest.mark.skipif(
    importlib.util.find_spec("yamllint") is None, reason="yamllint is not installed"
)
def test_yamllint_finds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "jobset.yaml"
    path.write_text(jobset("--spot", "--queue=tpus", "--secret=keys"))
    rules = "{extends: default, rules: {line-length: {max: 88}}}"
    for one in (path, SCRIPTS / "skypilot.yaml"):
        found = run(sys.executable, "-m", "yamllint", "--strict", "-d", rules, str(one))
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", SHELL)
def test_bash_reads_it(name: str) -> None:
    assert run("bash", "-n", str(SCRIPTS / name)).returncode == 0


@pytest.mark.parametrize("path", sorted(SCRIPTS.iterdir()), ids=lambda p: p.name)
def test_scripts_can_be_called_and_hold_no_secret(path: Path) -> None:
    if path.is_dir():
        pytest.skip("no script")
    text = path.read_text(encoding="utf-8")
    called = path.suffix in {".sh", ".py", ".sbatch"}
    assert os.access(path, os.X_OK) is called
    assert text.startswith("#!") is called
    # Keys of the usual kinds, and variables that are given one.
    assert not re.search(r"\b(sk-|hf_|ghp_|AIza|ya29\.)\w{8}", text)
    assert not re.search(r"(?i)(token|secret|password|api_key)=\w", text)


def test_skypilot_s_task_asks_for_a_command_and_restarts_by_the_table() -> None:
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    # A variable without a value is one that SkyPilot wants given.
    assert task["envs"]["COMMAND"] is None
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [42, 134, 137, 143]
    assert recovery["max_restarts_on_errors"] == 0
    for part in ("setup", "run"):
        done = run("bash", "-n", "-c", task[part])
        assert done.returncode == 0, done.stderr
    for status in (0, 42):
        sent = {"COMMAND": f"test 'a b' = \"a b\" && exit {status}", "DRY_RUN": ""}
        assert run("bash", "-c", task["run"], **sent).returncode == status
    dry = run("bash", "-c", task["run"], COMMAND="exit 3", DRY_RUN="1")
    assert (dry.returncode, dry.stdout) == (0, "exit 3\n")


def test_the_table_of_statuses_is_one() -> None:
    """In the scripts, in what they write, and as README.md tells it."""
    statuses = "42 134 137 143"
    for name in ("tpu_vm.sh", "slurm.sbatch"):
        assert f'AGAIN=" {statuses} "' in (SCRIPTS / name).read_text()
    found = yaml.safe_load(jobset())
    (replicated,) = found["spec"]["replicatedJobs"]
    rules = replicated["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[1]["onExitCodes"]["values"] == [*map(int, statuses.split())]
    rows = dict(re.findall(r"^\| (\d[\d, ]*|other) \|[^|]*\| ([^|]*) \|", README, re.M))
    assert rows["42"].startswith("again") and rows["134, 137, 143"].startswith("again")
    assert "5 times" in rows["255"] and rows["other"].startswith("not again")


def calls(*more: str) -> dict[str, list[str]]:
    """Return what tpu_vm.sh would call, by what it is for."""
    found = run(
        *(str(SCRIPTS / "tpu_vm.sh"), "--dry_run", "--name=pairs", "--project=lab"),
        *("--zone=us-east5-b", "--accelerator_type=v6e-16", "--runtime_version=v2"),
        *("--package=jaxalign==0.1.0", *more, "--", "jaxalign", "train", "a b"),
    )
    lines = [shlex.split(line) for line in found.stdout.splitlines()]
    names = ("describe", "create", "describe again", "copy", "set up", "run", "delete")
    return dict(zip(names, lines, strict=True))


GCLOUD = shutil.which("gcloud")


@pytest.mark.slow
@pytest.mark.skipif(GCLOUD is None, reason="gcloud is not installed")
@pytest.mark.parametrize(
    "case",
    ["describe", "create", "create 2", "copy", "copy 2", "run", "run 2", "delete"],
)
def test_gcloud_knows_every_flag(tmp_path: Path, case: str) -> None:
    """Its own parser ends with 2 at a flag it does not know; then it asks who we are.

    Nothing is sent: without an account it has nobody to send it as.
    """
    offline = {
        "CLOUDSDK_CONFIG": str(tmp_path),
        "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "HOME": str(tmp_path),
    }
    name, _, slices = case.partition(" ")
    call = calls("--spot", f"--num_slices={slices or 1}")[name]
    found = run(*call, **offline)
    assert found.returncode == 1, found.stderr
    assert "active account" in found.stderr
    if case == "create":
        wrong = run(*call, "--no-such-flag", **offline)
        assert wrong.returncode == 2 and "--no-such-flag" in wrong.stderr


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize(
    "words",
    [
        "get jobset pairs --output=json --ignore-not-found",
        "create --filename=- --validate=false",
        "delete jobset pairs --ignore-not-found",
        "logs --selector=jobset.sigs.k8s.io/jobset-name=pairs --prefix --tail=100",
        "get pods --selector=jobset.sigs.k8s.io/jobset-name=pairs --output=json",
    ],
)
def test_kubectl_knows_every_flag(words: str) -> None:
    # Nobody listens on port 9 of this computer.
    here = ["--namespace=lab", "--server=http://127.0.0.1:9", "--kubeconfig=/dev/null"]
    found = subprocess.run(
        ["kubectl", *words.split(), *here],
        input=jobset(),
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1 and "unknown flag" not in found.stderr
    assert "127.0.0.1:9" in found.stderr


def test_readme_names_each_script_and_its_commands_are_read() -> None:
    for path in SCRIPTS.iterdir():
        if path.is_file() and path.name != "README.md":
            assert f"`{path.name}`" in README
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        done = run("bash", "-n", "-c", block)
        assert done.returncode == 0, done.stderr


def test_readme_s_hosts_are_those_that_the_scripts_count() -> None:
    spec = importlib.util.spec_from_file_location("gke", SCRIPTS / "gke_jobset.py")
    assert spec is not None and spec.loader is not None
    gke = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gke)
    rows = re.findall(
        r"^\| `([a-z0-9]+-\d+)` \| (\d+) \| (\d+) \| `([\dx]+)` \|", README, re.M
    )
    assert len(rows) >= 8
    for name, chips, hosts, topology in rows:
        found = gke.slice_of(name)
        assert (found.topology, found.hosts) == (topology, int(hosts))
        assert int(chips) == 4 * found.hosts
