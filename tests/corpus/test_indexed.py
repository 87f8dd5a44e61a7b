"""Transcripts on disk: exact round trip, nothing half-written, every damage named."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.config.errors import UserError
from ra3_megatron.corpus.indexed import TranscriptStore, TranscriptWriter, write_transcripts
from ra3_megatron.text.transcript import Role, Transcript


def transcript(lines: list[list[Role]], context: int = 1, name: str = "a.py::f", version: int = -1) -> Transcript:
    """A transcript with `context` CONTEXT tokens, then the given roles line by line."""
    roles = [Role.CONTEXT] * context + [role for line in lines for role in line]
    numbers = [-1] * context + [number for number, line in enumerate(lines) for _ in line]
    return Transcript(
        ids=np.arange(len(roles), dtype=np.int32) * 70_001,
        roles=np.array(roles, dtype=np.uint8),
        lines=np.array(numbers, dtype=np.int32),
        offered=np.array([len(line) % 2 == 0 for line in lines]),
        weight_version=version,
        document=name,
    )


ROLES = st.sampled_from([role for role in Role if role != Role.CONTEXT])
TRANSCRIPTS = st.builds(
    transcript,
    st.lists(st.lists(ROLES, min_size=1, max_size=5), min_size=1, max_size=5),
    st.integers(0, 3),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.just(7),
)
A = transcript([[Role.LAYOUT, Role.EXPERT], [Role.THOUGHT, Role.FORCED, Role.EXPERT]])
B = transcript([[Role.EXPERT]], name="b")


@given(st.lists(TRANSCRIPTS, min_size=1, max_size=6))
def test_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, transcripts: list[Transcript]) -> None:
    prefix = tmp_path_factory.mktemp("store") / "mid" / "train"
    assert write_transcripts(prefix, transcripts) == len(transcripts)
    store = TranscriptStore(prefix)
    assert list(store) == transcripts
    assert [read.document for read in store] == list(store.names()) == [written.document for written in transcripts]
    assert store.weight_version == store[0].weight_version == 7
    assert store.lengths.tolist() == [written.num_tokens for written in transcripts]
    assert store.num_tokens == sum(store.lengths)
    for read, written in zip(store, transcripts, strict=True):
        assert read.ids.dtype == np.int32 and read.roles.dtype == np.uint8
        assert read.lines.dtype == np.int32 and read.offered.dtype == np.bool_
        assert read.log_probs is None
        assert np.array_equal(read.decision_positions, written.decision_positions)


def test_what_has_its_name_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is lost takes along what only its memory held: files of the right size, full of zeros."""
    on_disk: set[int] = set()
    named: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        fsync(handle)
        on_disk.add(os.fstat(handle).st_ino)

    def noted_replace(source: Path, target: Path) -> None:
        assert os.stat(source).st_ino in on_disk, target
        named.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_transcripts(tmp_path / "chunk", [A, B])
    assert len(named) == 7 and named[-1] == "chunk.json"


def test_indexing(tmp_path: Path) -> None:
    write_transcripts(tmp_path / "s", [A, B])
    store = TranscriptStore(tmp_path / "s")
    assert store[-1] == B and store[0:2] == [A, B] and store[5:] == []
    for index in (2, -3):
        with pytest.raises(IndexError):
            store[index]
    first = store[0]
    del store
    assert first == A  # a copy: valid when the mapping is gone


def test_megatron_reads_the_ids(tmp_path: Path) -> None:
    from ra3_megatron.corpus.megatron_dataset import IndexedDataset

    write_transcripts(tmp_path / "s", [A, B])
    data = IndexedDataset(str(tmp_path / "s_ids"))
    assert len(data) == 2 and data.document_indices.tolist() == [0, 1, 2]
    assert data[0].tolist() == A.ids.tolist()


def test_same_transcripts_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_transcripts(tmp_path / name / "s", [A, B])
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == ["s.json", *(f"s_{part}.{end}" for part in ("ids", "marks", "names") for end in ("bin", "idx"))]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_a_write_that_fails_leaves_nothing_and_keeps_the_old_store(tmp_path: Path) -> None:
    def broken() -> Iterator[Transcript]:
        yield A
        raise RuntimeError("killed")

    prefix = tmp_path / "s"
    with pytest.raises(RuntimeError, match="killed"):
        write_transcripts(prefix, broken())
    assert list(tmp_path.iterdir()) == []
    write_transcripts(prefix, [B])
    with pytest.raises(RuntimeError, match="killed"):
        write_transcripts(prefix, broken())
    assert list(TranscriptStore(prefix)) == [B]
    write_transcripts(prefix, [A, B])
    assert list(TranscriptStore(prefix)) == [A, B]


def test_a_killed_write_is_no_store_and_its_rest_is_cleared(tmp_path: Path) -> None:
    prefix = tmp_path / "s"
    writer = TranscriptWriter(prefix)
    writer.__enter__()
    writer.add(A)  # killed here
    with pytest.raises(UserError, match="no data set here"):
        TranscriptStore(prefix)
    write_transcripts(prefix, [B])
    assert list(TranscriptStore(prefix)) == [B]
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_a_replacement_killed_between_two_files_is_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = tmp_path / "s"
    write_transcripts(prefix, [A])
    replace, moved = os.replace, []

    def killed(old: Path, new: Path) -> None:
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(new)
        replace(old, new)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_transcripts(prefix, [A.without_log_probs()])
    monkeypatch.undo()
    with pytest.raises(UserError, match="no data set here"):
        TranscriptStore(prefix)
    write_transcripts(prefix, [B])
    assert list(TranscriptStore(prefix)) == [B]


@pytest.mark.parametrize("part", ["ids", "marks", "names"])
@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_damage_is_named(tmp_path: Path, part: str, ending: str) -> None:
    prefix = tmp_path / "s"
    write_transcripts(prefix, [A, B])
    file = tmp_path / f"s_{part}.{ending}"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{file.name}: {len(content) - 1} bytes instead of {len(content)}"):
        TranscriptStore(prefix)
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name}: missing"):
        TranscriptStore(prefix)


@pytest.mark.parametrize("part", ["ids", "marks", "names"])
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_no_bit_of_an_index_changes_what_is_read(tmp_path: Path, part: str) -> None:
    """Each flipped bit is named, or is in what nothing reads (Megatron's index of documents)."""
    prefix = tmp_path / "s"
    write_transcripts(prefix, [A, B])
    index = tmp_path / f"s_{part}.idx"
    whole, refused = index.read_bytes(), 0
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        index.write_bytes(flipped)
        try:
            assert list(TranscriptStore(prefix)) == [A, B]
        except UserError as error:
            assert str(index) in str(error)
            refused += 1
    assert refused > 8 * len(whole) / 2


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_wrong_content_of_the_right_size_is_named(tmp_path: Path) -> None:
    prefix = tmp_path / "s"
    write_transcripts(prefix, [A, B])
    index = tmp_path / "s_ids.idx"
    whole = index.read_bytes()
    index.write_bytes(b"X" * len(whole))
    with pytest.raises(UserError, match=r"s_ids\.idx: not the index of a Megatron data set"):
        TranscriptStore(prefix)
    write_transcripts(tmp_path / "t", [B, A])
    (tmp_path / "t_ids.idx").rename(index)
    (tmp_path / "t_ids.bin").rename(tmp_path / "s_ids.bin")
    with pytest.raises(UserError, match=r"s_marks\.idx: lengths differ"):
        TranscriptStore(prefix)
    for content, message in (("{", "not the description"), ('{"format": 99}', "format 99")):
        (tmp_path / "s.json").write_text(content)
        with pytest.raises(UserError, match=message):
            TranscriptStore(prefix)


def test_transcripts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one transcript"):
        write_transcripts(tmp_path / "s", [])
    with pytest.raises(ValueError, match="weight version 3"):
        write_transcripts(tmp_path / "s", [A, transcript([[Role.EXPERT]], version=3)])
    gap = transcript([[Role.EXPERT], [Role.EXPERT]])
    gap.lines[-1] = 2
    late_context = transcript([[Role.EXPERT], [Role.EXPERT]])
    late_context.roles[-1] = Role.CONTEXT
    missing = Transcript(B.ids, B.roles, B.lines, np.array([True, False]))
    for wrong in (gap, late_context, missing):
        with pytest.raises(ValueError, match="in order"):
            write_transcripts(tmp_path / "s", [wrong])
    assert list(tmp_path.iterdir()) == []
