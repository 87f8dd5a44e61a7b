"""The tasks of a corpus with `corpus.source=tasks`: generated one by one, and found again by the name of a document."""

from collections.abc import Iterator

from ra3_megatron.config.data import CorpusConfig
from ra3_megatron.corpus.splits import Split, split_of
from ra3_megatron.tasks.families import build_family
from ra3_megatron.tasks.task import Task


class Tasks:
    """The tasks of a corpus. `tasks.task_named(document)` has the truth about a document."""

    def __init__(self, config: CorpusConfig) -> None:
        self.config = config
        self.family = build_family(config.tasks)

    def __len__(self) -> int:
        return self.config.tasks.count

    def __iter__(self) -> Iterator[Task]:
        first = self.config.tasks.first
        return (self.numbered(number) for number in range(first, first + len(self)))

    def split(self, number: int) -> Split:
        """The split of task `number`."""
        return split_of(f"{self.config.tasks.family}#{number}", self.config.valid_fraction)

    def numbered(self, number: int) -> Task:
        """Task `number`, for its split."""
        return self.family.task(number, training=self.split(number) == "train")

    def task_named(self, document: str) -> Task:
        """The task that a document was made from. ValueError when it was made from something else."""
        family, _, number = document.partition("#")
        if family != self.config.tasks.family or not number.isdigit():
            raise ValueError(f"document {document} is no task of the family {self.config.tasks.family}")
        return self.numbered(int(number))
