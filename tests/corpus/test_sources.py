"""Sources: what is found, what it is called, and every refusal."""

import ast
import json
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ra3_megatron.config.data import CorpusConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.corpus import sources
from ra3_megatron.corpus.files import find_files
from ra3_megatron.corpus.sources import Source, iter_texts

MODULE = '''\
import os

def plain(a, b):
    return a + b   # tail

@decorated(1)
async def waiting():
\tawait nothing()

class Outer:
    attribute = 1

    @property
    def value(self):
        """One.

        Two.
        """
        return 1

    @value.setter
    def value(self, new):
        pass

    class Inner:
        def deep(self):
            return 2

    def odd(self):
        return """
flush left
"""

if os.name:
    def conditional():
        pass
'''


def collect(**settings: Any) -> list[Source]:
    return list(iter_texts(CorpusConfig(**settings)))


def refusal(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        collect(**settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- Python code ------------------------------------------------------------------------------------------------------


def test_functions_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "code.py").write_text(MODULE)
    (tmp_path / "a.py").write_text("def first():\n    pass\n")
    skipped: Counter[str] = Counter()
    found = list(iter_texts(CorpusConfig(source="folder", path=str(tmp_path)), skipped))
    assert [source.path for source in found] == [
        "a.py::first",
        "b/code.py::plain",
        "b/code.py::waiting",
        "b/code.py::Outer.value",
        "b/code.py::Outer.value~2",
        "b/code.py::Outer.Inner.deep",
    ]
    assert skipped == {"function_not_dedentable": 1}
    assert found[1].text == "def plain(a, b):\n    return a + b   # tail\n"
    assert found[2].text == "@decorated(1)\nasync def waiting():\n\tawait nothing()\n"
    assert found[3].text == '@property\ndef value(self):\n    """One.\n\n    Two.\n    """\n    return 1\n'
    assert {source.split_key for source in found} == {"a.py", "b/code.py"}


def test_functions_are_dedented_source_lines_of_the_standard_library() -> None:
    config = CorpusConfig(source="folder", path=str(Path(ast.__file__)))
    lines = {line.strip() for line in Path(ast.__file__).read_text().splitlines()}
    found = list(iter_texts(config))
    assert len(found) > 50
    for source in found:
        assert not source.text.startswith((" ", "\t"))
        assert len(ast.parse(source.text).body) == 1
        assert {line.strip() for line in source.text.splitlines()} <= lines


def test_whole_files_and_files_that_are_not_python(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_bytes(b"x = 1\r\ny = 2\r\n")
    (tmp_path / "bad.py").write_text("print 'two'\n")
    skipped: Counter[str] = Counter()
    found = list(iter_texts(CorpusConfig(source="folder", path=str(tmp_path), unit="file"), skipped))
    assert [(source.path, source.text) for source in found] == [("good.py", "x = 1\ny = 2\n")]
    assert skipped == {"file_not_python": 1}


def test_declared_encodings_are_honoured(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\ndef f():\n    return 'é'\n".encode("latin-1"))
    assert collect(source="folder", path=str(tmp_path))[0].text == "def f():\n    return 'é'\n"


def test_hidden_folders_are_passed_over(tmp_path: Path) -> None:
    for folder in (".venv", "package"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "code.py").write_text("def f():\n    pass\n")
    assert [source.path for source in collect(source="folder", path=str(tmp_path))] == ["package/code.py::f"]


def test_undecodable_python_is_refused_with_its_offset(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_bytes(b"x = '\xff'\n")
    message = refusal(source="folder", path=str(tmp_path))
    assert "code.py" in message and "offset 5" in message and "0xff" in message
    (tmp_path / "code.py").write_bytes(b"# coding: klingon\n")
    assert "klingon" in refusal(source="folder", path=str(tmp_path))


def test_missing_paths_are_refused(tmp_path: Path) -> None:
    for source in ("folder", "jsonl", "parquet", "text"):
        assert "no such file or folder" in refusal(source=source, path=str(tmp_path / "nothing"))
        assert "the folder holds no" in refusal(source=source, path=str(tmp_path))
        assert "matches no file" in refusal(source=source, path=str(tmp_path / "*.none"))


def test_unreadable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "code.py"
    file.write_text("x = 1\n")

    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    message = refusal(source="folder", path=str(tmp_path))
    assert "code.py" in message and "Permission denied" in message


def test_installed_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib"
    for name in ("json/decoder.py", "test/test_json.py", "ctypes/test/test_a.py", "site-packages/p.py", "idlelib/x.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text("class D:\n    def decode(self):\n        pass\n")
    (library / "broken.py").write_bytes(b"x = '\xff'\n")
    (library / "_sysconfigdata_x.py").write_text("def f():\n    pass\n")
    package = tmp_path / "path" / "made_package_for_ra3"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text("def top():\n    pass\n")
    (package / "tests" / "t.py").write_text("def t():\n    pass\n")
    (tmp_path / "path" / "made_module_for_ra3.py").write_text("def alone():\n    pass\n")
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    skipped: Counter[str] = Counter()
    config = CorpusConfig(packages=["made_package_for_ra3", "made_module_for_ra3"])
    assert [source.path for source in iter_texts(config, skipped)] == [
        "json/decoder.py::D.decode",
        "made_package_for_ra3/__init__.py::top",
        "made_module_for_ra3.py::alone",
    ]
    assert skipped == {"file_not_decodable": 1}
    assert "no_such_package_x" in refusal(packages=["no_such_package_x"])
    assert "has no Python source files" in refusal(packages=["itertools"])


# -- rows -------------------------------------------------------------------------------------------------------------


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a\\r\\nb"}\n\n{"text": "\\u00e9", "n": [1]}\n')
    found = collect(source="jsonl", path=str(file))
    assert [(source.path, source.text, source.file) for source in found] == [
        ("rows.jsonl#0", "a\r\nb", "rows.jsonl"),
        ("rows.jsonl#2", "é", "rows.jsonl"),
    ]
    assert found[0].split_key != found[1].split_key


def test_globs_give_names_below_their_fixed_part(tmp_path: Path) -> None:
    for name in ("x/b.jsonl", "a.jsonl", "x/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "t"}\n')
    assert [name for name, _ in find_files(str(tmp_path / "**" / "*.jsonl"), "*.jsonl")] == ["a.jsonl", "x/b.jsonl"]
    assert [name for name, _ in find_files(str(tmp_path), "*.jsonl")] == ["a.jsonl", "x/b.jsonl"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{bad", "not a JSON value"),
        (b"[1]", "not a JSON object"),
        (b'{"body": "x", "n": 1}', "the fields are: body, n"),
        (b'{"text": null}', "holds a NoneType, not a text"),
        (b'{"text": "\xff"}', "offset 25 is not UTF-8"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "x", "n": ' + b"1" * 5000 + b"}", "a JSON value that cannot be read"),
        (b'{"text": "x", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "a JSON value that cannot be read"),
    ],
)
def test_wrong_jsonl_lines_are_refused_by_line(tmp_path: Path, line: bytes, expected: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text":  "a"}\n' + line + b"\n")
    message = refusal(source="jsonl", path=str(file))
    assert "rows.jsonl:2" in message and expected in message


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "rows.parquet"
    parquet.write_table(arrow.table({"content": [f"text {n}" for n in range(3000)], "n": list(range(3000))}), file)
    found = collect(source="parquet", path=str(file), text_field="content")
    assert len(found) == 3000
    assert (found[2500].path, found[2500].text) == ("rows.parquet#2500", "text 2500")
    assert "the fields are: content, n" in refusal(source="parquet", path=str(file))
    assert "holds a int" in refusal(source="parquet", path=str(file), text_field="n")
    file.write_bytes(file.read_bytes()[:-10])
    assert "rows.parquet: not a readable parquet file" in refusal(source="parquet", path=str(file))


def test_text_files(tmp_path: Path) -> None:
    file = tmp_path / "story.txt"
    file.write_bytes("one\r\ntwö\n---\n\nthree\n---\n\n".encode())
    whole = collect(source="text", path=str(file))
    assert [(source.path, source.text) for source in whole] == [("story.txt", "one\r\ntwö\n---\n\nthree\n---\n\n")]
    parts = collect(source="text", path=str(file), document_separator="---")
    assert [(source.path, source.text) for source in parts] == [
        ("story.txt#0", "one\r\ntwö\n"),
        ("story.txt#1", "\nthree\n"),
    ]
    file.write_bytes(b"one\n---\nab\xfe\n")
    for separator in (None, "---"):
        message = refusal(source="text", path=str(file), document_separator=separator)
        assert "story.txt" in message and "offset 10" in message


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = "\ufeff".encode()
    file = tmp_path / "story.txt"
    file.write_bytes(mark + b"# one\n---\n" + mark + b"two\n")
    assert [source.text for source in collect(source="text", path=str(file))] == ["# one\n---\n\ufefftwo\n"]
    parts = collect(source="text", path=str(file), document_separator="---")
    assert [source.text for source in parts] == ["# one\n", "\ufefftwo\n"]
    file.write_bytes(mark + b"ab\xfe\n")
    assert "offset 5" in refusal(source="text", path=str(file))
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(mark + b'{"text": "a"}\n{"text": "\\ufeffb"}\n')
    assert [source.text for source in collect(source="jsonl", path=str(rows))] == ["a", "\ufeffb"]


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_through_the_datasets_library(tmp_path: Path, streaming: bool, monkeypatch: Any) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"code": f"x = {n}"}) + "\n" for n in range(5)))
    settings: dict[str, Any] = {"source": "hub", "path": str(folder), "streaming": streaming}
    found = collect(**settings, text_field="code")
    assert [source.text for source in found] == [f"x = {n}" for n in range(5)]
    assert found[3].path.endswith("#3")
    assert "the fields are: code" in refusal(**settings)
    assert "corpus.hub_split=nowhere" in refusal(**settings, text_field="code", hub_split="nowhere")
    assert "cannot be loaded" in refusal(source="hub", path=str(tmp_path / "nothing"), streaming=streaming)


def test_digest_is_of_the_text_alone() -> None:
    text = textwrap.dedent(MODULE)
    assert Source("a", text, "a").digest == Source("b", text, "c").digest != Source("a", text + " ", "a").digest
