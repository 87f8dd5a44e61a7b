"""A command that takes milliseconds in place of `ra3 train`; what a cell does stands in its name.

    real…  kills itself with a signal that has no name
    bad…   prints "boom" and fails          slow…  writes its process number, then ticks until it is ended
    once…  is slow the first time, and ends well the second        others  end well

As a program: runs the study whose arms are given, for tests that kill the runner: FOLDER JOBS ARM …
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

from made_study import finish, study_of

from ra3_megatron.study.plan import Cell, cells_of, resolve
from ra3_megatron.study.runner import Outcome, Runner
from ra3_megatron.study.spec import StudyConfig

SCRIPT = """
cell=$(dirname "$1"); name=$(basename "$cell"); prepared=$2
echo "$name" >> "$prepared/order"; echo "threads $OMP_NUM_THREADS"
tick() {
  trap 'sleep 0.3; touch "$cell/ended"; exit 1' TERM
  echo $$ > "$cell/pid"
  while :; do echo . >> "$cell/ticks"; sleep 0.02; done
}
case "$name" in
  bad*) echo boom; exit 3;;
  real*) kill -40 $$;;
  silent*) exit 0;;
  slow*) tick;;
  once*) mkdir -p "$cell/checkpoints"; if [ ! -e "$cell/pid" ]; then tick; fi;;
esac
cp "$prepared/summary.json" "$cell/summary.json"
"""


def command_of(folder: Path) -> Callable[[Path], list[str]]:
    """The command, and in `folder`/prepared what it leaves and the order of its calls."""
    prepared = folder / "prepared"
    if not prepared.exists():
        finish(Cell(name="x", group="x", arm="x", seed=1), prepared, "ra3", 0.1)
    script = prepared / "cell.sh"
    script.write_text(SCRIPT)
    return lambda file: ["sh", str(script), str(file), str(prepared)]


def order(folder: Path) -> list[str]:
    """Names of the cells in the order in which they were started."""
    return (folder / "prepared" / "order").read_text().split()


def run_cells(study: StudyConfig, folder: Path, jobs: int = 1, cores: int = 4) -> dict[str, Outcome]:
    """Run all cells of a study with the command."""
    cells = cells_of(study)
    return Runner(study.path, cells, resolve(study, cells), jobs, cores, command_of(folder)).run(cells)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it starts in the background
    place, jobs, *arms = sys.argv[1:]
    try:
        run_cells(study_of(Path(place), arms=dict.fromkeys(arms)), Path(place), int(jobs))
    except KeyboardInterrupt:
        sys.exit(130)
