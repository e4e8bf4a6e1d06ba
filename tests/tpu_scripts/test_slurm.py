"""slurm.sbatch against an sbatch, an srun and an scontrol that play."""

import os
import shlex
import signal
from pathlib import Path

import pytest

from tests.tpu_scripts.stage import SCRIPTS, Played, Stage, stage


SCRIPT = str(SCRIPTS / "slurm.sbatch")
COMMAND = ["jaxalign", "train", "a b", "$HOME", "it's", ""]
# As Slurm does: the script runs, and again where it was put back into the queue.
CLUSTER = (
    'while [[ $1 == --*=* ]]; do shift; done; status=0; : >"$here/requeued"; '
    'while [[ -e $here/requeued ]]; do rm "$here/requeued"; status=0; '
    'SLURM_JOB_ID=7 SLURM_SUBMIT_DIR="$here" bash "$@" || status=$?; done; exit $status'
)


@pytest.fixture
def slurm(tmp_path: Path) -> Stage:
    made = stage(tmp_path)
    made.tool("sbatch", {"submit": "*"})
    made.tool("srun", {"step": "*"})
    made.tool("scontrol", {"requeue": '"scontrol requeue "*'})
    made.scene(submit=[CLUSTER], requeue=['touch "$here/requeued"'])
    return made


def play(slurm: Stage, *more: str, **environment: str) -> Played:
    return slurm.play(SCRIPT, "--nodes=2", *more, "--", *COMMAND, **environment)


def test_a_job_from_first_to_last(slurm: Stage) -> None:
    slurm.scene(step=["say step 1"])
    played = play(slurm, "--time=4:00:00", "--partition=gpu")
    assert (played.status, played.out) == (0, "step 1\n")
    assert played.parts == ["submit", "step"]
    ours = ["--nodes=2", "--time=4:00:00", "--partition=gpu", SCRIPT, "--", *COMMAND]
    assert played.words("submit") == [["sbatch", *ours]]
    assert played.words("step") == [["srun", "--kill-on-bad-exit=0", "--", *COMMAND]]


@pytest.mark.parametrize("status", [42, 134, 137, 143])
def test_it_goes_back_into_the_queue_without_limit(slurm: Stage, status: int) -> None:
    slurm.scene(step=7 * [f"exit {status}"] + [""])
    played = play(slurm)
    assert played.status == 0
    assert played.parts == ["submit", *7 * ["step", "requeue"], "step"]
    assert played.words("requeue") == 7 * [["scontrol", "requeue", "7"]]
    assert all(call == played.words("step")[0] for call in played.words("step"))


@pytest.mark.parametrize("status", [1, 2, 127, 139, 253])
def test_any_other_status_is_the_jobs(slurm: Stage, status: int) -> None:
    slurm.scene(step=[f"fail {status} 'ValueError: beta'"])
    played = play(slurm)
    assert (played.status, played.parts) == (status, ["submit", "step"])
    assert "ValueError: beta" in played.err


def test_a_lost_line_is_made_again_five_times_in_a_row(slurm: Stage) -> None:
    slurm.scene(step=4 * ["exit 255"] + ["exit 42"] + ["exit 255"])
    played = play(slurm)
    assert played.status == 255
    # Four, one that asked for it and starts the count anew, five, and the end.
    assert played.parts == ["submit", *10 * ["step", "requeue"], "step"]


def test_a_long_run_starts_that_count_anew(slurm: Stage) -> None:
    slurm.scene(step=8 * ["exit 255"] + [""])
    played = play(slurm, SLURM_LONG_RUN_SECONDS="0")
    assert played.status == 0
    assert played.parts == ["submit", *8 * ["step", "requeue"], "step"]


def test_term_is_left_to_the_processes_and_their_status_counts(slurm: Stage) -> None:
    """Where another job takes the nodes, Slurm tells shell and processes alike."""
    term = "trap 'kill $!; exit 42' TERM; sleep 100 & echo $$ $PPID >$here/pids; wait"
    slurm.scene(step=[term, ""])
    process = slurm.start(SCRIPT, "--nodes=2", "--", *COMMAND)
    step, shell = map(int, slurm.await_text("pids").split())
    os.kill(shell, signal.SIGTERM)
    os.kill(step, signal.SIGTERM)
    played = slurm.end(process)
    assert played.status == 0
    assert played.parts == ["submit", "step", "requeue", "step"]


def test_dry_run_prints_the_call_that_is_made(slurm: Stage) -> None:
    dry = play(slurm, "--dry_run")
    assert (dry.status, dry.parts) == (0, [])
    made = play(slurm)
    assert shlex.split(dry.out) == made.words("submit")[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "no command"),
        (["--nodes=2"], "no command"),
        (["--nodes=2", "--"], "no command"),
        (["--", "jaxalign"], "--nodes"),
        (["--nodes", "--", "jaxalign"], "--nodes"),
        (["--nodes=two", "--", "jaxalign"], "--nodes two: expected a whole number"),
        (["--nodes=2", "--gpus-per-node=4", "--", "jaxalign"], "--ntasks-per-node 8"),
    ],
)
def test_half_given_settings_are_refused_before_any_call(
    slurm: Stage, given: list[str], said: str
) -> None:
    played = slurm.play(SCRIPT, *given)
    assert (played.status, played.parts) == (2, [])
    assert said in played.err


def test_four_gpus_a_node(slurm: Stage) -> None:
    played = play(slurm, "--ntasks-per-node", "4", "--gpus-per-node=4", "--dry_run")
    assert played.status == 0
    assert "--ntasks-per-node 4 --gpus-per-node=4" in played.out


def test_what_slurm_reads_of_the_script() -> None:
    lines = Path(SCRIPT).read_text().splitlines()
    found = [line.split()[1] for line in lines if line.startswith("#SBATCH ")]
    assert {"--requeue", "--open-mode=append", "--signal=TERM@300"} < {*found}
    # Slurm stops reading at the first line that is no comment.
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first:])
