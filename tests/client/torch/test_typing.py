"""What a type checker makes of the calls on models and states."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm_client

PROGRAM = """
from typing import Any, assert_type
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from batchnorm_client import AsyncRemoteLayer, Client, RemoteLayer
from batchnorm_client.torch import RemoteBatchNorm2d, convert_batchnorm, revert, snapshot

class Net(nn.Module):
    depth: int

Arrays = dict[str, npt.NDArray[Any]]
Tensors = dict[str, torch.Tensor]

def models(client: Client, net: Net, remote: RemoteBatchNorm2d) -> None:
    assert_type(convert_batchnorm(net, client, "net."), Net)
    assert_type(convert_batchnorm(nn.BatchNorm2d(3), client, prefix="norm", existing="adopt"), nn.BatchNorm2d)
    assert_type(revert(net), Net)
    assert_type(snapshot(net), Net)
    assert_type(revert(remote), _BatchNorm)
    assert_type(snapshot(remote), _BatchNorm)

def states(layer: RemoteLayer, flag: bool) -> None:
    assert_type(layer.state_dict(), Arrays)
    assert_type(layer.state_dict(as_torch=False), Arrays)
    assert_type(layer.state_dict(as_torch=True), Tensors)
    assert_type(layer.state_dict(as_torch=flag), Arrays | Tensors)

async def async_states(layer: AsyncRemoteLayer, flag: bool) -> None:
    assert_type(await layer.state_dict(), Arrays)
    assert_type(await layer.state_dict(as_torch=True), Tensors)
    assert_type(await layer.state_dict(as_torch=flag), Arrays | Tensors)

def keys(client: Client) -> None:
    client.fold_moments({"a": (1, [0.0], [0.0])}, key={"a": "k"})
"""


@pytest.mark.timeout(300)
def test_types_are_kept(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    checked = Path(batchnorm_client.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", tmp_path, program],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(checked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
