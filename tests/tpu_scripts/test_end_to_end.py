"""A launcher, two processes, TERM to one, 42, another start: the same result."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.tpu_scripts.stage import Stage
from tests.tpu_scripts.test_tpu_vm import UNTIL_RUN, gcloud, words


__all__ = ["gcloud"]

# What a run does, without its model: two processes that take every step together, save
# at the same one when either is told to end, go on from there, and end with 42 for
# "again" and for a lost partner.
PROGRAM = """#!/usr/bin/env python3
import json, os, pathlib, signal, sys, time

run, host = pathlib.Path(sys.argv[2]), int(os.environ["HOST"])
run.mkdir(exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: (run / "told").touch())

def write(path, text):
    part = path.with_name(f"{path.name}.{host}.part")
    part.write_text(text)
    part.replace(path)

def exchange(step, value):
    # The sum of both hosts' values, and whether either was told to end.
    told = (run / "told").exists()
    write(run / f"{attempt}-{step}-{host}", json.dumps([value, told]))
    theirs, until = run / f"{attempt}-{step}-{1 - host}", time.monotonic() + 20
    while not theirs.exists():
        if time.monotonic() > until:
            os._exit(42)
        time.sleep(0.002)
    found = [json.loads((run / f"{attempt}-{step}-{h}").read_text()) for h in (0, 1)]
    return sum(v for v, _ in found), any(told for _, told in found)

saved = run / "saved.json"
step, value, attempt = json.loads(saved.read_text()) if saved.exists() else (0, 1, 0)
write(run / f"pid-{host}", f"{os.getpid()}\\n")
print(f"host {host}: step {step}", flush=True)
while step < 60:
    value, told = exchange(step, value * (host + 2) % 99991)
    step += 1
    if told:
        # Both have seen the same: they stop at the same step.
        write(run / f"ready-{attempt}-{host}", "")
        while not (run / f"ready-{attempt}-{1 - host}").exists():
            time.sleep(0.002)
        if host == 0:
            write(saved, json.dumps([step, value, attempt + 1]))
            (run / "told").unlink()
        else:
            while (run / "told").exists():
                time.sleep(0.002)
        sys.exit(42)
    if step == 30:
        write(run / f"half-{host}", "half\\n")
    time.sleep(0.02)
write(run / f"result-{host}", f"{value}\\n")
"""

# As gcloud does: the command on both hosts, and the first status that is not 0.
TWO_HOSTS = (
    'for w in "$@"; do case "$w" in --command=*) c="${w#--command=}" ;; esac; done; '
    'HOST=0 bash -c "$c" & a=$!; HOST=1 bash -c "$c" & b=$!; s=0; wait $a || s=$?; '
    "wait $b || { t=$?; [ $s != 0 ] || s=$t; }; exit $s"
)


@pytest.fixture
def hosts(gcloud: Stage) -> Stage:
    gcloud.program("train", PROGRAM)
    gcloud.scene(run=[TWO_HOSTS])
    return gcloud


def results(folder: Path) -> list[str]:
    return [(folder / f"result-{host}").read_text() for host in (0, 1)]


@pytest.mark.parametrize("victim", [0, 1])
def test_term_to_one_host_changes_no_result(hosts: Stage, victim: int) -> None:
    whole = hosts.play(*words(command=["train", "--out", "whole run"]))
    assert whole.status == 0
    assert " ".join(whole.parts) == UNTIL_RUN + "delete"

    (hosts.folder / "log").unlink()
    hosts.scene(describe=["fail 1 NOT_FOUND", "say ACTIVE"])
    process = hosts.start(*words(command=["train", "--out", "run"]))
    hosts.await_text(f"run/half-{victim}")
    os.kill(int(hosts.await_text(f"run/pid-{victim}")), signal.SIGTERM)
    ended = hosts.end(process)
    assert ended.status == 0
    assert " ".join(ended.parts) == UNTIL_RUN + "describe run delete"
    first, second = ended.words("run")
    assert first == second
    assert results(hosts.folder / "run") == results(hosts.folder / "whole run")
    steps = sorted(map(int, re.findall(r"host \d: step (\d+)", ended.out)))
    assert steps[:2] == [0, 0] and steps[2] == steps[3] > 0 and len(steps) == 4
