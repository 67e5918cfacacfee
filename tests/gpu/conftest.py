"""What only a GPU can show. Skipped, with the reason, where there are too few."""

import subprocess

import pytest


def count_gpus() -> int:
    """Asked of the driver: torch in this process would keep a GPU's memory."""
    try:
        found = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 0
    return len(found.stdout.splitlines()) if found.returncode == 0 else 0


@pytest.fixture
def gpus(request):
    """``@pytest.mark.needs(n)``: as many GPUs as the test needs."""
    needed = request.node.get_closest_marker("needs").args[0]
    found = count_gpus()
    if found < needed:
        pytest.skip(f"needs {needed} GPUs, this machine has {found}")
    return found
