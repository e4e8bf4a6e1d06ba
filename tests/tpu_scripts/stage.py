"""A stage for launchers: tools that do as a scene says, and a log of the calls."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


__all__ = ["SCRIPTS", "Played", "Stage", "stage"]

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"

# A tool finds its part by the words it is called with, writes that and the words into
# the log, and does the next line of the part's scene: shell, of which the last line is
# done again and again. A part without a scene succeeds. How often a launcher looks at
# the machine while something is at work there depends on how fast this computer is: a
# look from a process group beside the launcher's has a scene of its own, `watch`.
_TOOL = """#!/usr/bin/env bash
here={here}
tool={tool}
say() {{ printf '%s\\n' "$*"; }}
fail() {{ printf '%s\\n' "${{@:2}}" >&2; exit "$1"; }}
part() {{
  case "$tool $*" in
{parts}
    *) echo unknown ;;
  esac
}}
part="$(part "$@")"
read -r _ _ _ _ group session _ <"/proc/$$/stat"
if [ "$part" = describe ] && [ "$group" != "$session" ]; then part=watch; fi
{{ printf '%s' "$part"; printf '\\x1f%s' "$tool" "$@"; printf '\\x1e'; }} >>"$here/log"
scene="$here/scenes/$part"
line=""
if [ -s "$scene" ]; then
  line="$(head -n 1 "$scene")"
  if [ "$(wc -l <"$scene")" -gt 1 ]; then sed -i 1d "$scene"; fi
fi
eval "$line"
"""


class Played(NamedTuple):
    """What a launcher did: its status, its two outputs, and its calls in order."""

    status: int
    out: str
    err: str
    parts: list[str]
    calls: list[list[str]]

    def words(self, part: str) -> list[list[str]]:
        """Return the calls of a part, word by word."""
        return [
            words
            for found, words in zip(self.parts, self.calls, strict=True)
            if found == part
        ]


class Stage(NamedTuple):
    """A folder with tools, scenes and a log; scripts run in it."""

    folder: Path

    def tool(self, name: str, parts: Mapping[str, str]) -> None:
        """Make a tool whose parts are found by patterns of its words."""
        cases = [f"    {found}) echo {part} ;;" for part, found in parts.items()]
        self.program(
            name, _TOOL.format(here=self.folder, tool=name, parts="\n".join(cases))
        )

    def program(self, name: str, text: str) -> None:
        """Put a program on the PATH that leaves no trace in the log."""
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def scene(self, **lines: Sequence[str]) -> None:
        """Set what the parts do, a line a call."""
        for part, said in lines.items():
            text = "".join(f"{line}\n" for line in said)
            (self.folder / "scenes" / part).write_text(text)

    def environment(self, **more: str) -> dict[str, str]:
        """Return an environment whose tools are these."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        quick = {"TPU_VM_POLL_SECONDS": "0.1", "GKE_JOBSET_POLL_SECONDS": "0.01"}
        return kept | quick | {"PATH": path, "HOME": str(self.folder)} | more

    def start(self, *words: str, **more: str) -> "subprocess.Popen[str]":
        """Start a script in a process group of its own."""
        return subprocess.Popen(
            words,
            cwd=self.folder,
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self, process: "subprocess.Popen[str]") -> Played:
        """Wait for a script, no longer than a minute."""
        try:
            out, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        found = self.log()
        return Played(
            process.returncode,
            out,
            err,
            [words[0] for words in found],
            [words[1:] for words in found],
        )

    def play(self, *words: str, **more: str) -> Played:
        """Run a script to its end."""
        return self.end(self.start(*words, **more))

    def log(self) -> list[list[str]]:
        """Return each call so far but those that watch: its part, then its words."""
        path = self.folder / "log"
        text = path.read_text() if path.exists() else ""
        calls = [call.split("\x1f") for call in text.split("\x1e")[:-1]]
        return [call for call in calls if call[0] != "watch"]

    def await_part(self, part: str) -> None:
        """Come back once a part is being played."""
        while part not in [words[0] for words in self.log()]:
            time.sleep(0.02)

    def await_text(self, name: str) -> str:
        """Return the text of a file once it is a whole line."""
        path = self.folder / name
        while not (path.exists() and path.read_text().endswith("\n")):
            time.sleep(0.02)
        return path.read_text()


def stage(folder: Path) -> Stage:
    """Return a new stage in a folder."""
    for name in ("bin", "scenes"):
        (folder / name).mkdir()
    return Stage(folder)
