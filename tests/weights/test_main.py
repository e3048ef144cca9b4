"""`python -m mochi_app.weights`: light to start, and for folders as well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mochi_app.files import PROJECT_DIR
from tests.downloads import (
    run,
)
from tests.hub import REPO, Hub


# The download
def test_the_module_is_light() -> None:
    program = (
        "import sys; import mochi_app.weights.__main__ as w; "
        "assert not {'huggingface_hub', 'pydantic', 'torch'} & set(sys.modules); "
        f"assert w.main(['--model', '{REPO}', '--dtype', 'float32']) == 0; "
        "assert 'huggingface_hub' in sys.modules; "
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=PROJECT_DIR, check=True, timeout=30)


def test_a_path_that_is_no_folder_is_not_asked_of_the_hub(tmp_path: Path, hub: Hub) -> None:
    assert "model_index.json" in run(str(tmp_path / "nowhere")).failure.error
    assert not hub.asked
