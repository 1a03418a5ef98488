from pathlib import Path

from bench.harness.schedule import CellKey
from bench.harness.store import Store
from tests.bench.conftest import make_record

KEY = CellKey(0, "vanilla", 4)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.jsonl")
    record = make_record(KEY, served=0.9)
    store.append(record)
    assert store.records() == [record]


def test_a_line_cut_short_is_passed_over_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.jsonl")
    store.append(make_record(KEY))
    whole = store.path.read_bytes()
    store.path.write_bytes(whole + whole[: len(whole) // 2])
    other = make_record(CellKey(0, "none", 1))
    store.append(other)
    assert store.records() == [make_record(KEY), other]


def test_void_cells_are_measured_again_and_the_row_that_counts_wins(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.jsonl")
    store.append(make_record(KEY, void=("server ended",)))
    assert store.complete() == set()
    good = make_record(KEY)
    store.append(good)
    store.append(make_record(KEY, void=("later trouble",)))
    assert store.complete() == {KEY} and store.latest()[KEY] == good
    assert len(store.records()) == 3


def test_no_file_is_an_empty_store(tmp_path: Path) -> None:
    assert Store(tmp_path / "none.jsonl").records() == []
