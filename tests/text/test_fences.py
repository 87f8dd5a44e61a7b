"""Which part of an answer is its program, whatever stands around it."""

import pytest

from ra3_megatron.text.fences import parts, program_in
from ra3_megatron.text.segment import split_rows

CODE = "print(1)\n"
PYTHON = f"```python\n{CODE}```\n"


@pytest.mark.parametrize(
    "text",
    [
        CODE,
        PYTHON,
        PYTHON.rstrip("\n"),
        f"First\n```python\nx = 1\n```\nno, this:\n```py\n{CODE}```\nDone.",
        f"Example:\n```text\n1 2\n```\nThe program:\n{PYTHON}",
        f"```bash\npip install x\n```\n{PYTHON}Done.\n",
        f"{PYTHON}It prints\n```\n1\n```\n",
        f"{PYTHON}It prints\n```text\n1\n",
        f"```\n1 2\n```\nto\n```\n{CODE}```\n",
        f"```text\n1 2\n```\nto\n```c\n{CODE}```\n",
        f"```Python 3\n{CODE}``` \n",
        f"```python3 title=x\n{CODE}```\n",
        f"```pycon\n>>> 1\n```\n```py\n{CODE}```\n```python-repl\n>>> 1\n```\n",
        f"  ```python\r\n{CODE}  ```\r\n",
        f"Not ```this``` and\n```not``` this:\n{PYTHON}",
        f"{PYTHON}```python",
        f"```python\nx = 1\n```\nand\n```python\n{CODE}",
    ],
)
def test_the_program_of_an_answer(text: str) -> None:
    assert program_in(text) == CODE


def test_a_fence_behind_code_closes_and_one_behind_a_comment_does_not() -> None:
    assert program_in("```python\nprint(1)```\n```\nmore\n") == "print(1)"
    assert program_in("```python\nx = 1  \n# a thought ```\nprint(x)\n```\n") == "x = 1  \n# a thought ```\nprint(x)\n"
    assert program_in('```python\nprint("```")\n```\n') == 'print("```")\n'


def test_parts_are_all_rows_but_those_of_fences() -> None:
    rows = split_rows(f"Say\n\n{PYTHON}```text\nprint(2)```\nDone.\n```")
    kept = [("".join(rows[part.first : part.end]), part.block, part.python) for part in parts(rows)]
    assert kept == [
        ("Say\n\n", False, False),
        (CODE, True, True),
        ("", False, False),
        ("print(2)```\n", True, False),
        ("Done.\n```", False, False),
    ]
