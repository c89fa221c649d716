import numpy as np
import pytest

from benchmarks import same_bits


@pytest.mark.slow
def test_two_records_of_one_version_are_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(same_bits, "STEPS", 2)
    for name in ("DRAWN", "CHANGED", "REPAINTED"):
        monkeypatch.setattr(same_bits, name, 1)
    paths = [tmp_path / "before.npz", tmp_path / "after.npz"]
    for path in paths:
        monkeypatch.setattr("sys.argv", ["same_bits.py", "record", str(path)])
        assert same_bits.main() == 0
    assert same_bits.compare(*paths) == 0
    kinds = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert {"picture", "losses, encoded", "training, lora", "final, folder"} <= set(kinds)


def test_differences_are_reported(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", **{"losses, lora": np.array([1.0, 2.0])})
    np.savez(tmp_path / "b.npz", **{"losses, lora": np.array([1.0, 2.5])})
    assert same_bits.compare(tmp_path / "a.npz", tmp_path / "b.npz") == 1
    line = "losses, lora: 0 of 1 the same to the bit, largest difference 0.5"
    assert line in capsys.readouterr().out
