"""common.py: errors, random numbers, files."""
import pytest
import torch
from conftest import read_csv

from common import (UserError, explain_read_errors, generator, load_tensors, prepare_folder,
                    replacing, run_script, save_tensors, seed_for, write_csv)

CPU = torch.device("cpu")


# ---- errors ----
@pytest.mark.parametrize("result, code", [(None, 0), (130, 130)])
def test_a_script_ends_with_the_exit_code_that_its_main_returns(result, code):
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: result)
    assert (stop.value.code or 0) == code


def test_errors_of_a_file_name_it_and_keep_their_text(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(UserError) as stop, explain_read_errors(path, "make it anew"):
        raise ValueError("so wrong\nand more of it")
    assert str(stop.value) == (f"{path} cannot be read (ValueError: so wrong and more of it): make "
                               "it anew")
    with pytest.raises(UserError) as stop, explain_read_errors(path, "make it anew"):
        path.read_bytes()
    assert str(stop.value) == f"{path} does not exist: make it anew"


# ---- random numbers ----
def test_these_keys_have_different_seeds():
    keys = [("order", 0, 1), ("step", 0, 1), ("order", 1, 1), ("order", 0, 2), ("order", 0)]
    assert len({seed_for(*key) for key in keys}) == 5
    first, again = (torch.randn(4, generator=generator(CPU, "step", 0, 1)) for _ in range(2))
    assert first.equal(again)


# ---- files ----
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_made_or_said_to_be_no_place_to_write(tmp_path):
    prepare_folder(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir() and not list((tmp_path / "a/b").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/b"):
        prepare_folder(tmp_path / "file/b")


def test_tensors_can_be_read_back_unless_a_bit_has_changed(tmp_path):
    path = tmp_path / "a/tensors.pth"
    save_tensors(path, {"values": torch.arange(1000), "epoch": 3})
    content = load_tensors(path)
    assert content["values"].equal(torch.arange(1000)) and content["epoch"] == 3
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="check sum is wrong"):
        load_tensors(path)


def test_csv_can_be_read_back(tmp_path):
    write_csv(tmp_path / "a/log.csv", [{"epoch": 1, "note": "a, b"}, {"epoch": 2, "note": ""}])
    assert read_csv(tmp_path / "a/log.csv") == [{"epoch": "1", "note": "a, b"},
                                                {"epoch": "2", "note": ""}]
