"""docs/tasks.md shows what the families generate."""

import re
from pathlib import Path
from typing import get_args

from ra3_megatron.config.tasks import Family, TasksConfig
from ra3_megatron.tasks.families import build_family

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"


def test_the_examples_are_what_is_generated() -> None:
    examples = re.findall(r"<!-- (\w+)#(\d+) -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert [family for family, _, _ in examples] == list(get_args(Family))
    for family, number, text in examples:
        built = build_family(TasksConfig(family=family, thought_share=1.0, junk_share=0.0))
        assert built.task(int(number), training=True).warm_text == text
