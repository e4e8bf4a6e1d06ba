#!/usr/bin/env python3
"""Runs one command on TPU slices of a GKE cluster, as a JobSet.

Writes the JobSet, hands it to kubectl and watches it until it ends; the cluster starts
it again where that helps, by the same table of statuses as ``tpu_vm.sh`` (README.md). A
first start and a restart are the same call: the run directory knows the rest, and a
JobSet of that name that runs already is watched.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml


__all__ = ["AGAIN", "Slice", "jobset", "main", "parse", "slice_of", "to_yaml"]

AGAIN = (42, 134, 137, 143)
"""A container's statuses after which the JobSet is started again."""

RULES = (
    ("bug", "FailJobSet", "PodFailurePolicy"),
    ("again", "RestartJobSetAndIgnoreMaxRestarts", "BackoffLimitExceeded"),
)
"""What the JobSet does by the reason for which a Job of it failed."""

MOST = 5
"""How often in a row kubectl may fail while the JobSet is watched."""

CHIPS_A_HOST = 4


def _chips(topology: str) -> int:
    return math.prod(map(int, topology.split("x")))


def _sizes(topologies: str) -> dict[int, str]:
    return {_chips(topology): topology for topology in topologies.split()}


PLANES = _sizes("2x4 4x4 4x8 8x8 8x16 16x16")
CUBES = _sizes("2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16")
# GKE's word for the accelerator, what the number in a type counts a chip, the shapes.
KINDS = {
    "v4": ("tpu-v4-podslice", 2, CUBES),
    "v5litepod": ("tpu-v5-lite-podslice", 1, PLANES),
    "v5p": ("tpu-v5p-slice", 2, CUBES),
    "v6e": ("tpu-v6e-slice", 1, _sizes("2x2") | PLANES),
    "tpu7x": ("tpu7x", 2, CUBES),
}


class Slice(NamedTuple):
    """A slice in GKE's words."""

    accelerator: str
    topology: str
    hosts: int


def slice_of(accelerator_type: str) -> Slice:
    """Return the slice of a type, ``v5p-512``, or of a shape, ``v5p:4x8x8``.

    Raises:
      ValueError: there is no such type or shape; the text names the flag.

    >>> slice_of("v5p-512")
    Slice(accelerator='tpu-v5p-slice', topology='4x8x8', hosts=64)
    >>> slice_of("v6e:4x4").hosts
    4
    """
    wrong = f"--accelerator_type {accelerator_type}: expected"
    found = re.fullmatch(r"(\w+)(?:-(\d+)|:(\d+(?:x\d+)+))", accelerator_type)
    if found is None or found[1] not in KINDS:
        raise ValueError(
            f"{wrong} a type such as v6e-16 or a shape such as v5p:4x8x8, of "
            + ", ".join(KINDS)
        )
    kind, number, topology = found.groups()
    accelerator, counted, shapes = KINDS[kind]
    if topology is None:
        topology = shapes.get(int(number) // counted)
        if topology is None or int(number) % counted:
            types = ", ".join(f"{kind}-{chips * counted}" for chips in shapes)
            shape = f"{kind}:{[*shapes.values()][-1]}"
            raise ValueError(f"{wrong} one of {types}, or a shape such as {shape}")
    hosts, rest = divmod(_chips(topology), CHIPS_A_HOST)
    if rest or not hosts:
        raise ValueError(f"{wrong} a multiple of {CHIPS_A_HOST} chips, one host")
    return Slice(accelerator, topology, hosts)


def jobset(options: argparse.Namespace) -> dict[str, Any]:
    """Return the JobSet that the options ask for.

    One Job a slice, one Pod a host. A container's status decides: what is in ``AGAIN``
    uses up the Job's ``backoffLimit`` of 0, and so does a Pod that is taken off its
    node; any other status fails the Job by its ``podFailurePolicy``, and the JobSet.
    """
    queue = options.queue and {"kueue.x-k8s.io/queue-name": options.queue}
    # All hosts of a slice in one node pool: their links end there.
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _given(
            name=options.name,
            namespace=options.namespace,
            labels=queue,
            annotations={exclusive: "cloud.google.com/gke-nodepool"},
        ),
        "spec": {
            "failurePolicy": {
                "maxRestarts": 0,
                "rules": [
                    {"name": name, "action": action, "onJobFailureReasons": [reason]}
                    for name, action, reason in RULES
                ],
            },
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": options.num_slices,
                    "template": {"spec": _job(options)},
                }
            ],
        },
    }


def _given(**fields: Any) -> dict[str, Any]:
    """Leave out what has no value."""
    return {name: value for name, value in fields.items() if value}


def _job(options: argparse.Namespace) -> dict[str, Any]:
    hosts = slice_of(options.accelerator_type).hosts
    # First of the rules, for a process may end with anything while its node goes.
    taken = [{"type": "DisruptionTarget", "status": "True"}]
    bug = {"operator": "NotIn", "values": list(AGAIN)}
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "Count", "onPodConditions": taken},
                {"action": "FailJob", "onExitCodes": bug},
            ]
        },
        "template": {"spec": _pod(options)},
    }


def _pod(options: argparse.Namespace) -> dict[str, Any]:
    accelerator, topology, _ = slice_of(options.accelerator_type)
    spot = "cloud.google.com/gke-spot"
    return _given(
        restartPolicy="Never",
        hostNetwork=True,
        dnsPolicy="ClusterFirstWithHostNet",
        # The kernel spares a container's first process its own SIGABRT: JAX's end where
        # host 0 died would come out as 139, a bug. So another process is the first.
        shareProcessNamespace=True,
        terminationGracePeriodSeconds=options.grace_seconds,
        serviceAccountName=options.service_account,
        nodeSelector={
            "cloud.google.com/gke-tpu-accelerator": accelerator,
            "cloud.google.com/gke-tpu-topology": topology,
        }
        | ({spot: "true"} if options.spot else {}),
        tolerations=[
            {"key": key, "operator": "Exists", "effect": "NoSchedule"}
            for key in ("google.com/tpu", *([spot] if options.spot else []))
        ],
        containers=[_container(options)],
    )


def _container(options: argparse.Namespace) -> dict[str, Any]:
    secret = options.secret and [{"secretRef": {"name": options.secret}}]
    return _given(
        name="jaxalign",
        image=options.image,
        # No shell: each argument arrives as it is, and TERM reaches the command.
        command=options.command,
        envFrom=secret,
        ports=[{"containerPort": port} for port in (8471, 8080)],
        resources={"limits": {"google.com/tpu": CHIPS_A_HOST}},
    )


class _Indented(yaml.SafeDumper):
    """YAML whose lists are indented, as most people write it."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def to_yaml(manifest: dict[str, Any]) -> str:
    """Return a manifest as YAML, in the order it has."""
    return yaml.dump(
        manifest,
        Dumper=_Indented,
        sort_keys=False,
        explicit_start=True,
        allow_unicode=True,
        width=10_000,
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options; those that are wrong or missing end with 2, by name."""
    parser = argparse.ArgumentParser(
        prog="gke_jobset.py",
        usage="%(prog)s --name N --image I --accelerator_type v6e-16 [options] -- "
        "COMMAND [ARGUMENT ...]",
        description="Run COMMAND on every host of TPU slices of the cluster that "
        "kubectl is at, until it ends. The cluster needs JobSet 0.6 or later.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", required=True, help="of the JobSet, 28 characters at most")
    add("--image", required=True, help="of the container, with jaxalign[tpu,gcs] in it")
    add("--accelerator_type", required=True, help="v6e-16, or a shape: v5p:4x8x8")
    add("--num_slices", type=int, default=1, help="slices that train together (1)")
    add("--spot", action="store_true", help="nodes that are taken away at any time")
    add("--queue", help="Kueue's LocalQueue to wait in")
    add("--namespace", default="default", help="(default)")
    add("--service_account", help="of Kubernetes, where the default may not read gs://")
    add("--secret", help="a Secret of the cluster whose keys become variables")
    add("--grace_seconds", type=int, default=120, help="from TERM to KILL (120)")
    add("--keep", action="store_true", help="leave the JobSet there at the end")
    add("--dry_run", action="store_true", help="print the JobSet and call nothing")
    given = list(argv)
    at = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:at])
    options.command = given[at + 1 :]
    try:
        _check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _check(options: argparse.Namespace) -> None:
    for flag in ("name", "image", "queue", "namespace", "service_account", "secret"):
        value = getattr(options, flag)
        if value == "":
            raise ValueError(f"--{flag} wants a value: got none")
        name = re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", value or "0")
        if flag != "image" and name is None:
            raise ValueError(
                f"--{flag} {value}: expected small letters, digits and - between them"
            )
    if len(options.name) > 28 or not options.name[0].isalpha():
        raise ValueError(
            f"--name {options.name}: expected a letter first and 28 characters at "
            "most, which leaves the cluster room for its own"
        )
    for flag in ("num_slices", "grace_seconds"):
        if getattr(options, flag) < 1:
            raise ValueError(f"--{flag} {getattr(options, flag)}: expected 1 or more")
    if slice_of(options.accelerator_type).hosts == 1 and options.num_slices > 1:
        raise ValueError(
            f"--num_slices {options.num_slices}: slices of one host, such as "
            f"{options.accelerator_type}, cannot train together on GKE. Take a larger "
            "--accelerator_type"
        )
    if not options.command:
        raise ValueError("no command: it comes after --, as in -- jaxalign train")


def _say(text: str) -> None:
    """Tell the person; standard output is for the run's own."""
    print(f"gke_jobset.py: {text}", file=sys.stderr, flush=True)


def _kubectl(
    options: argparse.Namespace, *words: str, text: str | None = None
) -> "subprocess.CompletedProcess[str]":
    call = ["kubectl", *words, f"--namespace={options.namespace}"]
    return subprocess.run(call, input=text, text=True, capture_output=True)


def _ask(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return the JobSet as it stands, None where there is none.

    Raises:
      ConnectionError: no answer.
    """
    words = ("get", "jobset", options.name, "--output=json", "--ignore-not-found")
    said = _kubectl(options, *words)
    if said.returncode:
        raise ConnectionError(f"kubectl: {said.stderr.strip()}")
    return json.loads(said.stdout) if said.stdout.strip() else None


def _create(options: argparse.Namespace) -> None:
    """Make the JobSet; exit with kubectl's status where it refuses."""
    _say(f"creating {options.name}")
    manifest = to_yaml(jobset(options))
    said = _kubectl(options, "create", "--filename=-", text=manifest)
    if said.returncode:
        _say(said.stderr.strip())
        sys.exit(said.returncode)


def _delete(options: argparse.Namespace) -> None:
    """Take the JobSet away, and what runs of it."""
    _say(f"deleting {options.name}")
    said = _kubectl(options, "delete", "jobset", options.name, "--ignore-not-found")
    if said.returncode:
        _say(f"{said.stderr.strip()}: {options.name} may still run, and cost")


def _last_words(options: argparse.Namespace) -> int:
    """Print the end of what each Pod wrote, return the status that ended them all."""
    pods = f"--selector=jobset.sigs.k8s.io/jobset-name={options.name}"
    print(_kubectl(options, "logs", pods, "--prefix", "--tail=100").stdout, end="")
    found = _kubectl(options, "get", "pods", pods, "--output=json").stdout
    ended = [
        state["terminated"]["exitCode"]
        for pod in json.loads(found or "{}").get("items", ())
        for container in pod.get("status", {}).get("containerStatuses", ())
        if "terminated" in (state := container.get("state", {}))
    ]
    return next((status for status in ended if status and status not in AGAIN), 1)


def _end_of(found: dict[str, Any]) -> str | None:
    """Return Completed or Failed once a JobSet is that, else None."""
    for condition in found.get("status", {}).get("conditions", ()):
        kind, status = condition["type"], condition["status"]
        if kind in ("Completed", "Failed") and status == "True":
            return kind
    return None


def _run(options: argparse.Namespace) -> int:
    """Run the JobSet until it ends, and return its status."""
    found = _ask(options)
    if found is not None and (end := _end_of(found)):
        _say(f"{options.name} is there: {end}")
        _delete(options)
        found = None
    if found is None:
        _create(options)
    else:
        _say(f"{options.name} is there, and is watched")
    end = _watch(options)
    status = 0 if end == "Completed" else _last_words(options)
    _say(f"{options.name} {end.lower()}, status {status}")
    if not options.keep:
        _delete(options)
    return status


def _watch(options: argparse.Namespace) -> str:
    """Return how the JobSet ended.

    Raises:
      ConnectionError: the cluster does not answer any more, or has no such JobSet.
    """
    poll = float(os.environ.get("GKE_JOBSET_POLL_SECONDS", "10"))
    restarts, silent, waits = 0, 0, None
    while True:
        time.sleep(poll)
        try:
            found = _ask(options)
        except ConnectionError as error:
            silent += 1
            _say(f"{error} ({silent} times in a row)")
            if silent > MOST:
                raise
            continue
        silent = 0
        if found is None:
            raise ConnectionError(f"{options.name} was deleted by someone")
        if (end := _end_of(found)) is not None:
            return end
        if (now := found.get("status", {}).get("restarts", 0)) > restarts:
            restarts = now
            _say(f"{options.name} was started again, {restarts} times now")
        if (queued := bool(found.get("spec", {}).get("suspend"))) != waits:
            waits = queued
            _say(f"{options.name} {'waits in its queue' if waits else 'is admitted'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.dry_run:
        print(to_yaml(jobset(options)), end="")
        return 0
    goes_on = (
        f"what runs of {options.name} goes on in the cluster: this call watches it"
    )
    try:
        return _run(options)
    except FileNotFoundError:
        _say("error: kubectl is not on the PATH")
        return 2
    except ConnectionError as error:
        _say(f"{error}. {goes_on}")
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if options.keep:
            _say(goes_on)
        else:
            _delete(options)
        return 130


if __name__ == "__main__":
    sys.exit(main())
