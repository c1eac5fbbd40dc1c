"""common.py: errors, random numbers, files."""
import pytest
import torch

from common import UserError, bf16_is_faster, explain_read_errors, generator, replacing, seed_for

CPU = torch.device("cpu")


# ---- errors ----
def test_errors_of_a_file_name_it_and_keep_their_text(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(UserError) as stop, explain_read_errors(path, "make it anew"):
        raise ValueError("so wrong\nand more of it")
    assert str(stop.value) == (f"{path} cannot be read (ValueError: so wrong and more of it): make "
                               "it anew")
    with pytest.raises(UserError) as stop, explain_read_errors(path, "make it anew"):
        path.read_bytes()
    assert str(stop.value) == f"{path} does not exist: make it anew"


# ---- devices and random numbers ----
@pytest.mark.parametrize("cpu, is_fast", [
    (dict(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=False), False),
    (dict(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=True), True),
    (dict(cpu_name="AMD EPYC", avx512_bf16=True, amx_bf16=False), True),
    (dict(cpu_name="AMD EPYC", avx512_bf16=False, amx_bf16=False), False),
    (dict(cpu_name="Neoverse", bf16=True), False),
])
def test_bfloat16_is_used_where_it_is_fast(cpu, is_fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert bf16_is_faster(CPU) == is_fast


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
