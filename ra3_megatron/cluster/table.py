"""Results of a preflight as people read them: a row for each node, then a line for each problem."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ra3_megatron.cluster.results import Result
from ra3_megatron.report.numbers import ABSENT

_STYLES = {"bad": "bold red", "warn": "yellow", "ok": ""}


def show(results: list[Result], processes: dict[str, int], console: Console) -> None:
    """Print the table and the problems. processes: of each node, for the nodes that came."""
    if processes:
        console.print(table(results, processes))
    for line in lines(results):
        console.print(Text(line), soft_wrap=True)


def lines(results: list[Result]) -> list[str]:
    """`node NAME: CHECK: …` for each bad result, and the same behind `warning: ` for what should be looked at.

    The first form is what the job script looks for.
    """
    bad = [f"node {each.node}: {each.check}: {each.text}" for each in results if each.state == "bad"]
    return bad + [f"warning: node {each.node}: {each.check}: {each.text}" for each in results if each.state == "warn"]


def table(results: list[Result], processes: dict[str, int]) -> Table:
    """One row a node, one column a check, in the order in which they were made."""
    made = Table(title="preflight", title_justify="left", title_style="bold", box=None, pad_edge=False)
    made.add_column("node", no_wrap=True)
    made.add_column("processes", justify="right")
    checks = list(dict.fromkeys(each.check for each in results))
    for name in checks:
        unit = ", GiB" if name in ("run folder", "temp folder") or name.startswith("/") else ""
        made.add_column(f"{name}{', s' if name == 'clock' else unit}", justify="right", no_wrap=True)
    for node in dict.fromkeys([*processes, *(each.node for each in results)]):
        cells = [_cell([each for each in results if (each.node, each.check) == (node, name)]) for name in checks]
        made.add_row(node, str(processes.get(node, 0)), *cells)
    return made


def _cell(results: list[Result]) -> Text:
    """The first figure, coloured by the worst state."""
    worst = next((state for state in ("bad", "warn") if any(each.state == state for each in results)), "ok")
    figure = next((each.figure for each in results if each.figure), "bad" if worst == "bad" else ABSENT)
    return Text(figure, _STYLES[worst])
