"""gke_jobset.py: the JobSet that it writes, and its calls of a kubectl that plays."""

import importlib.util
import json
import signal
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.tpu_scripts.stage import SCRIPTS, Played, Stage, stage


SCRIPT = str(SCRIPTS / "gke_jobset.py")
SETTINGS = {
    "--name": "pairs",
    "--image": "europe-docker.pkg.dev/lab/jaxalign:1",
    "--accelerator_type": "v6e-16",
}
COMMAND = ["jaxalign", "train", "--x", "a b", "$HOME", "it's", "", "line\nline", "yes"]
PARTS = {
    "ask": '*" get jobset "*',
    "create": '*" create "*',
    "delete": '*" delete jobset "*',
    "logs": '*" logs "*',
    "pods": '*" get pods "*',
}
SELECTOR = "--selector=jobset.sigs.k8s.io/jobset-name=pairs"


def loaded() -> Any:
    spec = importlib.util.spec_from_file_location("gke_jobset", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gke_jobset = loaded()


def words(*more: str, command: list[str] | None = None, **settings: Any) -> list[str]:
    given = SETTINGS | {f"--{name}": value for name, value in settings.items()}
    flags = [word for flag, value in given.items() for word in (flag, value)]
    return [*flags, *more, "--", *(COMMAND if command is None else command)]


def written(capsys: pytest.CaptureFixture[str], *more: str, **settings: Any) -> Any:
    assert gke_jobset.main(words("--dry_run", *more, **settings)) == 0
    return yaml.safe_load(capsys.readouterr().out)


def strict(
    properties: dict[str, Any], required: tuple[str, ...] | None = None
) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties if required is None else required),
        "additionalProperties": False,
    }


STRINGS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
BY_STRING = {"type": "object", "additionalProperties": {"type": "string"}}

# The fields of jobset.x-k8s.io/v1alpha2 that are used, as its CRD has them. Templates
# of Jobs are Kubernetes' own, below.
JOBSET = strict(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": strict(
            {
                "name": {"type": "string", "maxLength": 28},
                "namespace": {"type": "string"},
                "labels": BY_STRING,
                "annotations": BY_STRING,
            },
            ("name", "namespace", "annotations"),
        ),
        "spec": strict(
            {
                "failurePolicy": strict(
                    {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "rules": {
                            "type": "array",
                            "items": strict(
                                {
                                    "name": {
                                        "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*"
                                        "[A-Za-z0-9_])?$"
                                    },
                                    "action": {
                                        "enum": [
                                            "FailJobSet",
                                            "RestartJobSet",
                                            "RestartJobSetAndIgnoreMaxRestarts",
                                        ]
                                    },
                                    "onJobFailureReasons": STRINGS,
                                }
                            ),
                        },
                    }
                ),
                "replicatedJobs": {
                    "type": "array",
                    "items": strict(
                        {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": strict({"spec": {"type": "object"}}),
                        }
                    ),
                },
            }
        ),
    }
)

EVERYTHING = [
    *("--num_slices", "2", "--spot", "--queue", "tpus", "--namespace", "research"),
    *("--service_account", "trainer", "--secret", "keys", "--grace_seconds", "30"),
]


@pytest.mark.parametrize("more", [[], EVERYTHING], ids=["little", "everything"])
def test_it_has_the_fields_of_jobset_and_of_kubernetes(
    capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    found = written(capsys, *more)
    jsonschema.validate(found, JOBSET)
    misspelt = json.loads(json.dumps(found).replace("maxRestarts", "maxRestart"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(misspelt, JOBSET)
    validate = pytest.importorskip("kubernetes_validate").validate
    (replicated,) = found["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}}
    validate(job | replicated["template"], "1.31", strict=True)


def test_a_host_is_a_pod_and_a_slice_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    found = written(capsys, *EVERYTHING)
    assert found["metadata"]["name"] == "pairs"
    assert found["metadata"]["namespace"] == "research"
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    (replicated,) = found["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    # 16 chips are 4 hosts.
    assert (job["parallelism"], job["completions"]) == (4, 4)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert "cloud.google.com/gke-spot" in [one["key"] for one in pod["tolerations"]]
    assert pod["serviceAccountName"] == "trainer"
    assert pod["terminationGracePeriodSeconds"] == 30
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert container["command"] == COMMAND


def test_without_spot_and_queue_it_speaks_of_neither(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = json.dumps(written(capsys))
    assert "spot" not in text and "kueue" not in text and "secret" not in text


def test_what_a_pod_ends_with_decides(capsys: pytest.CaptureFixture[str]) -> None:
    """Rules as Kubernetes and JobSet read them: in order, the first that fits."""
    spec = written(capsys)["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]

    def action(status: int, disrupted: bool = False) -> str:
        reason = "BackoffLimitExceeded" if job["backoffLimit"] == 0 else None
        for rule in job["podFailurePolicy"]["rules"]:
            if "onPodConditions" in rule:
                fits = disrupted and rule["onPodConditions"] == [
                    {"type": "DisruptionTarget", "status": "True"}
                ]
            else:
                assert rule["onExitCodes"]["operator"] == "NotIn"
                fits = status not in rule["onExitCodes"]["values"]
            if fits:
                if rule["action"] == "FailJob":
                    reason = "PodFailurePolicy"
                break
        rules = spec["failurePolicy"]["rules"]
        return next(r["action"] for r in rules if reason in r["onJobFailureReasons"])

    for status in (42, 134, 137, 143):
        assert action(status) == "RestartJobSetAndIgnoreMaxRestarts"
    for status in (1, 2, 127, 139, 255):
        assert action(status) == "FailJobSet"
        assert action(status, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["template"]["spec"]["shareProcessNamespace"] is True


@pytest.mark.parametrize(
    ("accelerator_type", "expected"),
    [
        # By cores, 2 a chip and 4 chips a host: 512 / 2 / 4 = 64.
        ("v5p-512", ("tpu-v5p-slice", "4x8x8", 64)),
        ("v5p-2048", ("tpu-v5p-slice", "8x8x16", 256)),
        ("v4-8", ("tpu-v4-podslice", "2x2x1", 1)),
        ("tpu7x-128", ("tpu7x", "4x4x4", 16)),
        # By chips: 256 / 4 = 64.
        ("v6e-256", ("tpu-v6e-slice", "16x16", 64)),
        ("v5litepod-8", ("tpu-v5-lite-podslice", "2x4", 2)),
        ("v5p:8x8x4", ("tpu-v5p-slice", "8x8x4", 64)),
    ],
)
def test_slices_by_name(accelerator_type: str, expected: tuple[str, str, int]) -> None:
    assert gke_jobset.slice_of(accelerator_type) == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"accelerator_type": "v6e"}, "--accelerator_type v6e: expected a type"),
        ({"accelerator_type": "v9-16"}, "of v4, v5litepod, v5p, v6e, tpu7x"),
        ({"accelerator_type": "v5p-513"}, "expected one of v5p-8, v5p-16"),
        ({"accelerator_type": "v6e:1x1"}, "expected a multiple of 4 chips"),
        ({"accelerator_type": "v6e-4", "num_slices": "2"}, "--num_slices 2: slices of"),
        ({"num_slices": "0"}, "--num_slices 0: expected 1 or more"),
        ({"num_slices": "two"}, "--num_slices"),
        ({"name": "Pairs"}, "--name Pairs: expected small letters"),
        ({"name": "p" * 29}, "28 characters at most"),
        ({"queue": "my queue"}, "--queue my queue: expected small letters"),
        ({"queue": ""}, "--queue wants a value"),
        ({"que": "tpus"}, "--que"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(SystemExit) as error:
        gke_jobset.main(words(**change))
    assert error.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("flag", [*SETTINGS, "command"])
def test_a_missing_setting_is_named_before_any_call(
    capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    given = words(command=[] if flag == "command" else None)
    if flag != "command":
        at = given.index(flag)
        given = given[:at] + given[at + 2 :]
    with pytest.raises(SystemExit) as error:
        gke_jobset.main(given)
    assert error.value.code == 2
    assert flag in capsys.readouterr().err


@pytest.fixture
def kubectl(tmp_path: Path) -> Stage:
    made = stage(tmp_path)
    made.tool("kubectl", PARTS)
    made.scene(create=["cat >$here/manifest"], logs=["say last words"])
    return made


def play(kubectl: Stage, *more: str) -> Played:
    return kubectl.play(sys.executable, SCRIPT, *words(*more))


def answer(restarts: int = 0, suspend: bool = False, **conditions: str) -> str:
    """Return a line that says how a JobSet stands, as kubectl does."""
    found = [{"type": t, "status": status} for t, status in conditions.items()]
    status = {"restarts": restarts, "conditions": found}
    return f"say '{json.dumps({'spec': {'suspend': suspend}, 'status': status})}'"


RUNNING, DONE, FAILED = answer(), answer(Completed="True"), answer(Failed="True")


def exits(*codes: int) -> str:
    pods = [
        {"status": {"containerStatuses": [{"state": {"terminated": {"exitCode": c}}}]}}
        for c in codes
    ]
    return f"say '{json.dumps({'items': pods})}'"


def test_a_run_from_first_to_last(kubectl: Stage) -> None:
    kubectl.scene(ask=["", answer(suspend=True), RUNNING, DONE])
    played = play(kubectl, "--queue", "tpus")
    assert played.status == 0
    assert played.parts == ["ask", "create", "ask", "ask", "ask", "delete"]
    assert "waits in its queue" in played.err and "is admitted" in played.err
    sent = yaml.safe_load((kubectl.folder / "manifest").read_text())
    options = gke_jobset.parse(words("--queue", "tpus"))
    assert sent == gke_jobset.jobset(options)
    assert all("--namespace=default" in call for call in played.calls)


def test_restarts_are_the_clusters_and_are_told(kubectl: Stage) -> None:
    """A preemption, then a failed host: its controller makes the Jobs anew."""
    kubectl.scene(ask=["", RUNNING, answer(1), answer(1), answer(2), DONE])
    played = play(kubectl)
    assert played.status == 0
    assert played.parts == ["ask", "create", *5 * ["ask"], "delete"]
    assert "started again, 1 times now" in played.err
    assert "started again, 2 times now" in played.err


def test_a_bug_ends_it_with_its_status_and_its_last_words(kubectl: Stage) -> None:
    kubectl.scene(ask=["", RUNNING, FAILED], pods=[exits(0, 42, 3)])
    played = play(kubectl)
    assert played.status == 3
    assert played.parts == ["ask", "create", "ask", "ask", "logs", "pods", "delete"]
    assert played.out == "last words\n"
    assert SELECTOR in played.words("logs")[0] and SELECTOR in played.words("pods")[0]


def test_one_that_is_there_is_watched_and_a_finished_one_deleted_first(
    kubectl: Stage,
) -> None:
    kubectl.scene(ask=[RUNNING, DONE])
    assert play(kubectl).parts == ["ask", "ask", "delete"]
    (kubectl.folder / "log").unlink()
    kubectl.scene(ask=[FAILED, DONE])
    assert play(kubectl).parts == ["ask", "delete", "create", "ask", "delete"]


def test_keep_leaves_it_there(kubectl: Stage) -> None:
    kubectl.scene(ask=["", DONE])
    assert play(kubectl, "--keep").parts == ["ask", "create", "ask"]


def test_a_cluster_that_does_not_answer_is_asked_five_times_more(
    kubectl: Stage,
) -> None:
    lost = "fail 1 'Unable to connect to the server'"
    kubectl.scene(ask=["", *5 * [lost], RUNNING, *6 * [lost]])
    played = play(kubectl)
    assert played.status == 1
    assert played.parts == ["ask", "create", *12 * ["ask"]]
    assert "goes on in the cluster" in played.err


def test_what_kubectl_refuses_is_the_end(kubectl: Stage) -> None:
    kubectl.scene(ask=[""], create=["fail 4 'forbidden'"])
    played = play(kubectl)
    assert (played.status, played.parts) == (4, ["ask", "create"])
    assert "forbidden" in played.err


@pytest.mark.parametrize("keep", [True, False])
def test_ctrl_c(kubectl: Stage, keep: bool) -> None:
    kubectl.scene(ask=["", RUNNING])
    more = ["--keep"] if keep else []
    process = kubectl.start(
        sys.executable, SCRIPT, *words(*more), GKE_JOBSET_POLL_SECONDS="20"
    )
    kubectl.await_part("create")
    process.send_signal(signal.SIGINT)
    played = kubectl.end(process)
    assert played.status == 130
    assert played.parts[:2] == ["ask", "create"]
    assert ("delete" in played.parts) is not keep


def test_dry_run_calls_nothing(kubectl: Stage) -> None:
    played = play(kubectl, "--dry_run")
    assert (played.status, played.parts) == (0, [])
