"""The example that trains beside torch, in short."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "examples" / "digits_training.py"


def test_digits_training(tmp_path):
    picture = tmp_path / "curves.png"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BATCHNORM_")}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--steps", "5", "--plot", picture],
        env=kept | {"PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bit-equal") == 4
    assert "The service and torch agree." in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
