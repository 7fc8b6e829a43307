"""Files: atomic, safe to open, and compared with what is wanted."""
import os

import pytest
import torch

from common import curves, files
from common.errors import UserError


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    torch.save(Bomb(), tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="bomb.pt"):
        files.load(tmp_path / "bomb.pt")
    assert not (tmp_path / "executed").exists()


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "a file").write_bytes(b"")
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path / "a file" / "x.json", tmp_path / "folder.json"):
        with pytest.raises(UserError, match="cannot write"):
            files.save(path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"a file", "folder.json"}


@pytest.mark.parametrize("earlier, wanted, ignored, expected", [
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}, (), None), ({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 0, "c": 0}, (), "b"),
    ({"a": 1, "b": 2}, {"a": 1, "b": 0}, ("b",), None), ({"a": 1, "old": 2}, {"a": 1}, (), "old"),
    ({"a": 1}, {"a": 1, "new": 2}, (), "new"), ({"a": 1}, {"a": 1, "new": None}, (), None)])
def test_difference_names_the_first_setting_that_changed(earlier, wanted, ignored, expected):
    assert files.difference(earlier, wanted, ignored) == expected


def test_autosave_is_due_once_in_its_seconds(monkeypatch):
    now = [100.]
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    autosave, due = files.Autosave(30), []
    for now[0] in (110., 129., 131., 132., 160., 162.):
        due.append(autosave.due())
    assert due == [False, False, True, False, False, True]


def test_tensors_are_saved_from_the_cpu(tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: moved.append(len(tensor)) or tensor)
    files.save(tmp_path / "a.pt", {"a": torch.ones(1), "b": {"c": [torch.ones(2), (torch.ones(3), None)]}, "d": "text"})
    assert moved == [1, 2, 3]
    assert files.load(tmp_path / "a.pt")["b"]["c"][1][0].tolist() == [1, 1, 1]


def test_one_flipped_bit_in_a_tensor_is_noticed(tmp_path):
    torch.save({"weights": torch.full((999,), 3.)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.find(bytes(torch.full((2,), 3.).numpy().tobytes())) + 100] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        files.load(tmp_path / "a.pt")


def test_tables_that_are_pipes_or_folders_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "folder.csv").mkdir()
    for name in ("pipe.csv", "folder.csv"):
        for read in (lambda path: files.read_csv(path, ()), curves.read):
            with pytest.raises(UserError, match=name):
                read(tmp_path / name)


def test_a_folder_that_cannot_be_made_is_named():
    with pytest.raises(UserError, match="cannot write in /proc"):
        with files.owned("/proc/none"):
            pass
