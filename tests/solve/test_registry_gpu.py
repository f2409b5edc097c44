"""What `eqr info` tells of a GPU that is there."""

from __future__ import annotations

import pytest
import torch

from tests.support.commands import eqr_json


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device that torch sees")
def test_gpu_info_says_what_runs_on_it():
    report = eqr_json("info")
    gpu = report["gpus"][0]
    assert gpu["name"] == torch.cuda.get_device_name(0) and gpu["multiprocessors"] > 0 and gpu["memory"] > 1 << 30
    on = {name: backend["on"]["cuda:0"] for name, backend in report["backends"].items()}
    assert on["reference"]["available"] and "CUDA graphs" in on["reference"]["note"]
    assert not on["cpu"]["available"] and "model.cpu()" in on["cpu"]["note"]
    assert report["auto"]["cuda:0"]["bf16"].startswith("auto chose ")
    assert report["cuda"]["driver_takes"] and report["cuda"]["torch_runtime"]
