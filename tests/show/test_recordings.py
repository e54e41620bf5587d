"""Where chapters find recorded results: beside the book, and only without it on the network."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from rlvr_lab.show import recordings


def test_the_book_s_own_file_is_used(tmp_path: Path) -> None:
    (tmp_path / "arena.json").write_text("{}")
    assert recordings.recorded("arena.json", tmp_path) == tmp_path / "arena.json"


def test_a_wrong_name_is_no_reason_to_ask_the_network(tmp_path: Path) -> None:
    (tmp_path / "arena.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has \['arena.json'\]"):
        recordings.recorded("arenna.json", tmp_path)


def test_without_the_book_the_release_s_file_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(address: str, timeout: float) -> io.BytesIO:
        asked.append(address)
        return io.BytesIO(b'{"format": 1}')

    monkeypatch.setattr(recordings, "urlopen", answer)
    found = recordings.recorded("arena.json", tmp_path / "no such folder")
    assert found.read_text() == '{"format": 1}'
    assert asked[0].endswith(f"/v{recordings.version('rlvr-lab')}/book/data/arena.json")
