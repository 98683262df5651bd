"""The HTML reference is built without a warning, and has every public name."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_public_api import PUBLIC

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_reference_has_every_public_name(tmp_path):
    command = [sys.executable, "-W", "error", str(ROOT / "docs" / "build.py"), str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path)
    for module, names in PUBLIC.items():
        page = tmp_path.joinpath(*module.split(".")).with_suffix(".html").read_text("utf-8")
        lost = [
            name
            for name in names.split()
            if f'id="{name}"' not in page and f">{name}</a>" not in page
        ]
        assert not lost, module
