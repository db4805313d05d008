"""The published size, with random weights: what loading it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from models import synthesise

from tempact.models.wan.transformer import WanConfig


@pytest.mark.slow
def test_full_size_takes_hardly_more_memory_than_the_model(tmp_path: Path) -> None:
    """1.42 billion parameters: 2.64 GiB in bf16, from 5.29 GiB on disk; also with an adapter merged."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs Linux, which tells how much memory is a process's own")
    state = synthesise.random_state(WanConfig())
    synthesise.self_forcing(tmp_path / "self_forcing_dmd.pt", state)
    synthesise.longlive_lora(tmp_path / "lora.pt", WanConfig(), 256)
    del state
    code = """if True:
        import sys, torch
        from pathlib import Path
        from tempact.models.wan.checkpoints.load import load_transformer
        def own_gib():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20
        before, folder, peak, copy = own_gib(), Path(sys.argv[1]), 0.0, torch.Tensor.copy_
        def watched(self, source):
            global peak
            peak = max(peak, own_gib())
            return copy(self, source)
        torch.Tensor.copy_ = watched
        model = load_transformer(folder / "self_forcing_dmd.pt", device=torch.device("cpu"), precision="bf16",
                                 adapters=[folder / name for name in sys.argv[2:]])
        print(sum(p.numel() for p in model.parameters()), max(peak, own_gib()) - before)
    """
    for adapters in ([], ["lora.pt"]):
        command = [sys.executable, "-c", code, str(tmp_path), *adapters]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        parameters, peak_gib = done.stdout.split()
        assert int(parameters) == 1_418_996_800
        assert 2.6 < float(peak_gib) < 2.64 + 0.3
