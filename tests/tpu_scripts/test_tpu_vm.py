"""tpu_vm.sh against a gcloud that plays: what it calls, in which order, and its end."""

import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.tpu_scripts.stage import SCRIPTS, Played, Stage, stage


SCRIPT = str(SCRIPTS / "tpu_vm.sh")
SETTINGS = {
    "--name": "pairs",
    "--project": "lab",
    "--zone": "us-east5-b",
    "--accelerator_type": "v6e-16",
    "--runtime_version": "v2-alpha-tpuv6e",
    "--package": "jaxalign==0.1.0",
}
COMMAND = ["jaxalign", "train", "--config", "train.yaml"]
PARTS = {
    "describe": '*" queued-resources describe "*',
    "create": '*" queued-resources create "*',
    "delete": '*" queued-resources delete "*',
    "copy": '*" scp "*',
    "set_up": '*" ssh "*"--command=bash setup_host.sh "*',
    "stop": '*" ssh "*"--command=fuser -k -TERM "*',
    "run": '*" ssh "*',
}
ABSENT = "fail 1 'ERROR: (gcloud.describe) NOT_FOUND: Resource was not found'"
ACTIVE, WAITING = "say ACTIVE", "say WAITING_FOR_RESOURCES"
UNTIL_RUN = "describe create describe copy set_up run "
FRESH = "describe delete create describe copy set_up run "


@pytest.fixture
def gcloud(tmp_path: Path) -> Stage:
    made = stage(tmp_path)
    made.tool("gcloud", PARTS)
    made.scene(describe=[ABSENT, ACTIVE], watch=[ACTIVE])
    # Commands that are run here end nobody else's work.
    made.program("fuser", "#!/bin/sh\n")
    return made


def words(*more: str, command: list[str] | None = None, **settings: Any) -> list[str]:
    given = SETTINGS | {f"--{name}": value for name, value in settings.items()}
    flags = [word for flag, value in given.items() for word in (flag, value)]
    return [SCRIPT, *flags, *more, "--", *(COMMAND if command is None else command)]


def play(gcloud: Stage, *more: str, **settings: Any) -> Played:
    return gcloud.play(*words(*more, **settings))


def option(call: list[str], name: str) -> str:
    (found,) = [word for word in call if word.startswith(f"{name}=")]
    return found.removeprefix(f"{name}=")


def test_a_run_from_first_to_last(gcloud: Stage) -> None:
    gcloud.scene(run=["say step 1; say warned >&2"])
    played = play(gcloud, "--spot")
    assert played.status == 0
    assert " ".join(played.parts) == UNTIL_RUN + "delete"
    assert played.out == "step 1\nwarned\n"
    assert (gcloud.folder / "pairs.log").read_text().endswith("step 1\nwarned\n")
    for call in played.calls:
        assert {"--project=lab", "--zone=us-east5-b", "pairs"} - {*call} <= {"pairs"}
    (create,) = played.words("create")
    assert create[1:6] == ["compute", "tpus", "queued-resources", "create", "pairs"]
    assert {*create[6:]} == {
        *("--project=lab", "--zone=us-east5-b", "--node-id=pairs", "--spot"),
        *("--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"),
    }
    (delete,) = played.words("delete")
    assert {"pairs", "--force", "--quiet"} < {*delete}
    for call in (*played.words("copy"), *played.words("set_up"), *played.words("run")):
        assert "--worker=all" in call and call[1:4] == ["compute", "tpus", "tpu-vm"]


def test_set_up_installs_the_package_with_what_a_tpu_needs(gcloud: Stage) -> None:
    wheel = gcloud.folder / "jaxalign 2.whl"
    wheel.touch()
    played = play(gcloud, package=str(wheel))
    (copy,) = played.words("copy")
    assert copy[5:8] == [str(wheel), str(SCRIPTS / "setup_host.sh"), "pairs:"]
    (call,) = played.words("set_up")
    said = shlex.split(option(call, "--command"))
    assert said == [
        *("bash", "setup_host.sh", "--package", "jaxalign 2.whl"),
        *("--extras", "tpu,gcs"),
    ]


def test_a_wheel_of_this_checkout_is_built_before_anything_costs(
    gcloud: Stage,
) -> None:
    gcloud.tool("python3", {"build": '*" -m pip wheel "*'})
    given = [w for w in words() if w not in ("--package", "jaxalign==0.1.0")]
    played = gcloud.play(*given)
    assert " ".join(played.parts) == "build " + UNTIL_RUN + "delete"
    (built,) = played.words("build")
    (copied,) = played.words("copy")
    assert built[-1] == str(SCRIPTS.parent)
    place = Path(copied[5])
    assert str(place.parent) == built[built.index("--wheel-dir") + 1]
    assert place.name.startswith("jaxalign-") and place.suffix == ".whl"
    gcloud.scene(build=["exit 3"])
    (gcloud.folder / "log").unlink()
    played = gcloud.play(*given)
    assert (played.status, played.parts) == (3, ["build"])


def test_it_waits_for_capacity(gcloud: Stage) -> None:
    gcloud.scene(describe=[ABSENT, WAITING, WAITING, "say PROVISIONING", ACTIVE])
    played = play(gcloud)
    assert played.status == 0
    assert " ".join(played.parts) == (
        "describe create describe describe describe describe copy set_up run delete"
    )


def test_a_machine_that_fails_while_waited_for_is_asked_for_anew(gcloud: Stage) -> None:
    gcloud.scene(describe=[ABSENT, WAITING, "say FAILED", WAITING, ACTIVE])
    played = play(gcloud)
    assert played.status == 0
    assert " ".join(played.parts) == (
        "describe create describe describe delete create describe describe "
        "copy set_up run delete"
    )


def test_a_machine_that_always_fails_is_given_up(gcloud: Stage) -> None:
    gcloud.scene(describe=[ABSENT, "say FAILED"])
    played = gcloud.play(*words())
    assert played.status == 1
    assert "failed 6 times in a row" in played.err
    assert " ".join(played.parts) == (
        "describe create " + 5 * "describe delete create " + "describe delete"
    )


@pytest.mark.parametrize("status", [42, 134, 137, 143, 1, 255])
def test_a_preemption_whatever_the_status(gcloud: Stage, status: int) -> None:
    gcloud.scene(
        run=[f"exit {status}", ""],
        describe=[ABSENT, ACTIVE, "say SUSPENDED", WAITING, ACTIVE],
    )
    played = play(gcloud, "--spot")
    assert played.status == 0
    assert " ".join(played.parts) == (
        UNTIL_RUN + "describe delete create describe describe copy set_up run delete"
    )
    for part in ("create", "copy", "set_up", "run"):
        first, second = played.words(part)
        assert first == second


def test_a_preemption_while_the_machine_is_set_up(gcloud: Stage) -> None:
    gcloud.scene(
        set_up=["exit 255", ""],
        describe=[ABSENT, ACTIVE, "say SUSPENDING", ACTIVE],
    )
    played = play(gcloud)
    assert played.status == 0
    assert " ".join(played.parts) == (
        "describe create describe copy set_up " + FRESH + "delete"
    )


def test_a_machine_that_is_gone_is_asked_for_again(gcloud: Stage) -> None:
    gcloud.scene(run=["exit 42", ""], describe=[ABSENT, ACTIVE, ABSENT, ACTIVE])
    gcloud.scene(delete=["fail 1 'ERROR: NOT_FOUND: Resource was not found'", ""])
    played = play(gcloud)
    assert played.status == 0
    assert " ".join(played.parts) == UNTIL_RUN + FRESH + "delete"


@pytest.mark.parametrize("status", [42, 134, 137, 143])
def test_it_runs_again_without_limit_on_a_machine_that_is_there(
    gcloud: Stage, status: int
) -> None:
    gcloud.scene(run=7 * [f"exit {status}"] + [""])
    played = play(gcloud)
    assert played.status == 0
    assert " ".join(played.parts) == UNTIL_RUN + 7 * "describe run " + "delete"
    assert all(call == played.words("run")[0] for call in played.words("run"))


@pytest.mark.parametrize("status", [1, 2, 3, 126, 127, 139])
def test_any_other_status_is_the_scripts_and_its_output_kept(
    gcloud: Stage, status: int
) -> None:
    gcloud.scene(run=[f"fail {status} 'ValueError: beta'"])
    played = play(gcloud)
    assert played.status == status
    assert " ".join(played.parts) == UNTIL_RUN + "describe delete"
    assert "ValueError: beta\n" in (gcloud.folder / "pairs.log").read_text()


def test_a_failed_set_up_is_not_tried_again(gcloud: Stage) -> None:
    gcloud.scene(set_up=["fail 1 'no space left'"])
    played = play(gcloud)
    assert played.status == 1
    assert " ".join(played.parts) == (
        "describe create describe copy set_up describe delete"
    )


def test_a_lost_connection_is_made_again_five_times(gcloud: Stage) -> None:
    gcloud.scene(run=["exit 255"])
    played = gcloud.play(*words())
    assert played.status == 255
    assert " ".join(played.parts) == UNTIL_RUN + 5 * "describe run " + "describe delete"


def test_the_count_of_lost_connections_is_of_those_in_a_row(gcloud: Stage) -> None:
    gcloud.scene(run=4 * ["exit 255"] + ["exit 42"] + 5 * ["exit 255"] + [""])
    played = gcloud.play(*words())
    assert played.status == 0
    assert " ".join(played.parts) == UNTIL_RUN + 10 * "describe run " + "delete"


def test_a_long_run_starts_that_count_anew(gcloud: Stage) -> None:
    gcloud.scene(run=8 * ["exit 255"] + [""])
    played = gcloud.play(*words(), TPU_VM_LONG_RUN_SECONDS="0")
    assert played.status == 0
    assert " ".join(played.parts) == UNTIL_RUN + 8 * "describe run " + "delete"


LOST = "fail 1 'ERROR: there was a problem refreshing your tokens'"


def test_where_nobody_answers_the_machine_is_asked_until_it_does(gcloud: Stage) -> None:
    """It is no preemption: the laptop may be off the net while the machine works."""
    gcloud.scene(
        run=["exit 255", ""], describe=[ABSENT, ACTIVE, LOST, LOST, LOST, ACTIVE]
    )
    played = play(gcloud)
    assert played.status == 0
    assert " ".join(played.parts) == UNTIL_RUN + 4 * "describe " + "run delete"
    assert "problem refreshing your tokens" in played.err


def test_no_answer_at_all_is_a_lost_connection(gcloud: Stage) -> None:
    gcloud.scene(run=["exit 1", ""], describe=[ABSENT, ACTIVE, *5 * [LOST], ACTIVE])
    played = play(gcloud)
    assert played.status == 0
    assert " ".join(played.parts) == UNTIL_RUN + 5 * "describe " + "run delete"


def test_a_machine_on_its_way_out_is_deleted_with_patience(gcloud: Stage) -> None:
    refused = "fail 1 'FAILED_PRECONDITION: is being suspended'"
    gcloud.scene(
        run=["exit 255", ""],
        delete=[*7 * [refused], ""],
        describe=[ABSENT, ACTIVE, "say SUSPENDING", ACTIVE],
    )
    played = play(gcloud, "--spot")
    assert played.status == 0
    assert (
        " ".join(played.parts)
        == (UNTIL_RUN + "describe " + 7 * "delete " + FRESH.removeprefix("describe "))
        + "delete"
    )


def test_an_ssh_that_hangs_is_ended_once_the_machine_is_gone(gcloud: Stage) -> None:
    gcloud.scene(
        run=["trap '' TERM INT; sleep 100", ""],
        watch=[ACTIVE, "fail 1 'no answer'", "say SUSPENDED", ACTIVE],
        describe=[ABSENT, ACTIVE, "say SUSPENDED", ACTIVE],
    )
    played = play(gcloud, "--spot")
    assert played.status == 0
    assert " ".join(played.parts) == UNTIL_RUN + FRESH + "delete"
    assert "is SUSPENDED while the connection stands" in played.err


def test_a_run_longer_than_a_look_is_left_alone(gcloud: Stage) -> None:
    gcloud.scene(run=["until grep -q watch $here/log; do sleep 0.1; done; say done"])
    played = play(gcloud)
    assert (played.status, played.out) == (0, "done\n")
    assert " ".join(played.parts) == UNTIL_RUN + "delete"


@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_ends_the_run_and_gives_the_machine_back(
    gcloud: Stage, whole_group: bool
) -> None:
    gcloud.scene(run=["say at work; sleep 100"])
    process = gcloud.start(*words(), TPU_VM_POLL_SECONDS="30")
    gcloud.await_part("run")
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    played = gcloud.end(process)
    assert played.status == 130
    assert " ".join(played.parts) == UNTIL_RUN + "delete"


def test_ctrl_c_with_keep_ends_the_run_and_leaves_the_machine(gcloud: Stage) -> None:
    gcloud.scene(run=["sleep 100"])
    process = gcloud.start(*words("--keep"), TPU_VM_POLL_SECONDS="30")
    gcloud.await_part("run")
    process.send_signal(signal.SIGINT)
    played = gcloud.end(process)
    assert played.status == 130
    assert " ".join(played.parts) == UNTIL_RUN + "stop"
    assert "queued-resources delete pairs" in played.err


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_machine_that_is_waited_for_is_given_back_too(
    gcloud: Stage, number: int, status: int
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(
            "the signal is ignored here, as by nohup, and no script can undo that"
        )
    gcloud.scene(describe=[ABSENT, WAITING])
    process = gcloud.start(*words(), TPU_VM_POLL_SECONDS="30")
    gcloud.await_part("create")
    process.send_signal(number)
    played = gcloud.end(process)
    assert played.status == status
    assert played.parts[-1] == "delete" and "run" not in played.parts


def test_ctrl_c_while_it_is_asked_for(gcloud: Stage) -> None:
    gcloud.scene(create=["sleep 100"])
    process = gcloud.start(*words())
    gcloud.await_part("create")
    process.send_signal(signal.SIGINT)
    played = gcloud.end(process)
    assert (played.status, played.parts) == (130, ["describe", "create", "delete"])


def test_keep_leaves_the_machine_and_says_what_deletes_it(gcloud: Stage) -> None:
    for scene, status in (("", 0), ("exit 1", 1)):
        gcloud.scene(describe=[ABSENT, ACTIVE], run=[scene])
        played = play(gcloud, "--keep")
        assert played.status == status
        assert "delete" not in played.parts and "stop" not in played.parts
        assert "queued-resources delete pairs" in played.err


def test_a_machine_that_is_there_is_used(gcloud: Stage) -> None:
    gcloud.scene(describe=[ACTIVE])
    played = play(gcloud)
    assert played.status == 0
    assert " ".join(played.parts) == "describe describe copy set_up run delete"


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_a_dead_machine_of_that_name_is_deleted_first(
    gcloud: Stage, state: str
) -> None:
    gcloud.scene(describe=[f"say {state}", ACTIVE])
    played = play(gcloud)
    assert played.status == 0
    assert " ".join(played.parts) == FRESH + "delete"


def test_one_that_is_queued_already_is_waited_for(gcloud: Stage) -> None:
    gcloud.scene(describe=[WAITING, WAITING, ACTIVE])
    played = play(gcloud)
    assert "create" not in played.parts and played.status == 0


def test_a_refused_machine_is_an_end_and_none_of_ours_to_delete(gcloud: Stage) -> None:
    gcloud.scene(create=["fail 7 'ALREADY_EXISTS'"])
    played = play(gcloud)
    assert (played.status, played.parts) == (7, ["describe", "create"])


def test_after_a_preemption_it_is_asked_for_more_than_once(gcloud: Stage) -> None:
    gcloud.scene(
        run=["exit 255", ""],
        create=["", "fail 1 'RESOURCE_EXHAUSTED'", ""],
        describe=[ABSENT, ACTIVE, "say SUSPENDED", ACTIVE],
    )
    played = play(gcloud)
    assert played.status == 0
    assert " ".join(played.parts) == (
        UNTIL_RUN + "describe delete create create describe copy set_up run delete"
    )


def test_a_machine_that_cannot_be_deleted_is_no_success(gcloud: Stage) -> None:
    gcloud.scene(delete=["fail 1 'ERROR: unavailable'"])
    played = gcloud.play(*words())
    assert played.status == 1
    assert played.parts.count("delete") == 5
    assert "It costs until this succeeds" in played.err


def test_several_slices_are_one_request_and_every_node_is_called(
    gcloud: Stage,
) -> None:
    played = play(gcloud, num_slices="3")
    assert " ".join(played.parts) == UNTIL_RUN + "delete"
    (create,) = played.words("create")
    assert {"--node-count=3", "--node-prefix=pairs"} < {*create}
    assert not any(word.startswith("--node-id") for word in create)
    for part in ("copy", "set_up", "run"):
        (call,) = played.words(part)
        assert call[3] == "queued-resources"
        assert {"--node=all", "--worker=all", "pairs", "pairs:"} - {*call} in (
            {"pairs"},
            {"pairs:"},
        )


HARD = [
    *("show", "a b", "$HOME", "`id`", "it's", 'say "so"', "back\\slash", "*", ""),
    *("two  spaces", "line\nline", "--beta=0.1", "é", "a;b", "#"),
]


def test_arguments_arrive_as_they_were_given(gcloud: Stage) -> None:
    """gcloud cuts the command at each space, and ssh joins it with spaces."""
    gcloud.program("show", "#!/bin/sh\nprintf '%s\\37' \"$@\"\n")
    played = gcloud.play(*words(command=HARD))
    (call,) = played.words("run")
    sent = " ".join(option(call, "--command").split(" "))
    done = subprocess.run(
        ["bash", "-c", sent], env=gcloud.environment(), capture_output=True, text=True
    )
    assert done.stdout.split("\x1f")[:-1] == HARD[1:]


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 42", 42), ("kill -ABRT $$", 134), ("kill -KILL $$", 137), ("exit 0", 0)],
)
def test_a_signal_comes_out_as_a_status(
    gcloud: Stage, script: str, status: int
) -> None:
    """ssh says 255 where the shell that it started is itself what a signal ended."""
    command = ["bash", "-c", script]
    played = gcloud.play(*words("--keep", command=command))
    (call,) = played.words("run")
    done = subprocess.run(
        ["bash", "-c", option(call, "--command")], env=gcloud.environment()
    )
    assert done.returncode == status


def test_dry_run_prints_the_calls_that_are_made(gcloud: Stage) -> None:
    for more in ([], ["--spot", "--num_slices", "2"], ["--keep"]):
        gcloud.scene(describe=[ABSENT, ACTIVE])
        (gcloud.folder / "log").unlink(missing_ok=True)
        dry = gcloud.play(*words("--dry_run", *more, command=HARD))
        assert (dry.status, dry.parts) == (0, [])
        made = gcloud.play(*words(*more, command=HARD))
        # A shell reads each line back as the very call.
        read = subprocess.run(
            ["bash", "-c", dry.out],
            cwd=gcloud.folder,
            env=gcloud.environment(),
            capture_output=True,
            start_new_session=True,
        )
        assert read.returncode in (0, 1)
        assert [words[1:] for words in gcloud.log()] == 2 * made.calls


def test_dry_run_needs_no_gcloud(tmp_path: Path) -> None:
    given = [word for word in words("--dry_run") if not word.startswith("jaxalign==")]
    given.remove("--package")
    found = subprocess.run(
        given,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    lines = found.stdout.splitlines()
    assert [shlex.split(line)[0] for line in lines] == ["python3"] + 7 * ["gcloud"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", [*SETTINGS][:5])
def test_a_missing_setting_is_named_before_any_call(gcloud: Stage, flag: str) -> None:
    given = words()
    at = given.index(flag)
    for broken in (
        given[:at] + given[at + 2 :],
        given[: at + 1] + given[at + 2 :],
        given[: at + 1] + [""] + given[at + 2 :],
        given[:at] + [f"{flag}="] + given[at + 2 :],
    ):
        played = gcloud.play(*broken)
        assert (played.status, played.parts) == (2, [])
        assert flag in played.err and "--help" in played.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--name", "Pairs"], "--name Pairs: expected a small letter"),
        (["--num_slices", "0"], "--num_slices 0: expected a whole number"),
        (["--num_slices", "two"], "--num_slices two: expected a whole number"),
        (["--num_slices", "17"], "68 hosts"),
        (["--package", "missing.whl"], "--package missing.whl: no such file"),
        (["--best_effort"], "unknown argument --best_effort"),
        (["--spot=yes"], "unknown argument --spot=yes"),
        (["train"], "unknown argument train"),
    ],
)
def test_a_wrong_setting_is_refused_before_any_call(
    gcloud: Stage, change: list[str], said: str
) -> None:
    played = gcloud.play(*words(*change))
    assert (played.status, played.parts) == (2, [])
    assert said in played.err


def test_no_command_is_refused(gcloud: Stage) -> None:
    for given in (words(command=[]), words(command=[])[:-1]):
        played = gcloud.play(*given)
        assert (played.status, played.parts) == (2, [])
        assert "no command" in played.err


@pytest.mark.parametrize(
    ("accelerator", "slices", "fits"),
    [
        # Chips by fours: 64 hosts are the most that gcloud serves at once.
        ("v6e-256", 1, True),  # 64 hosts, and no such limit for one slice
        ("v6e-256", 2, False),
        ("v6e-128", 2, True),
        ("v5litepod-8", 64, True),  # one host each
        # Cores by eights.
        ("v5p-512", 1, True),
        ("v5p-256", 2, True),
        ("v5p-264", 2, False),
    ],
)
def test_more_hosts_than_gcloud_starts_at_once_are_refused(
    gcloud: Stage, accelerator: str, slices: int, fits: bool
) -> None:
    played = gcloud.play(
        *words("--dry_run", accelerator_type=accelerator, num_slices=str(slices))
    )
    assert played.status == (0 if fits else 2)


def test_a_setting_may_be_one_word(gcloud: Stage) -> None:
    flags = [f"{flag}={value}" for flag, value in SETTINGS.items()]
    one = gcloud.play(SCRIPT, *flags, "--dry_run", "--", *COMMAND)
    assert one.out == gcloud.play(*words("--dry_run")).out


@pytest.mark.skipif(shutil.which("fuser") is None, reason="fuser is not installed")
def test_what_still_holds_the_chips_is_ended_first(gcloud: Stage) -> None:
    played = gcloud.play(*words(command=["true"]))
    (call,) = played.words("run")
    device = gcloud.folder / "accel0"
    device.touch()
    sent = option(call, "--command").replace("/dev/vfio/[0-9]*", "")
    sent = sent.replace("/dev/accel*", str(device))
    assert str(device) in sent and "/dev/vfio" not in sent
    (gcloud.folder / "bin" / "fuser").unlink()
    with device.open() as held:
        left = subprocess.Popen(["sleep", "100"], stdin=held)
    # Nobody else holds it now, this process least of all.
    subprocess.run(["bash", "-c", sent], env=gcloud.environment(), check=True)
    assert left.wait(timeout=10) == -signal.SIGKILL
