"""``python -m hf_precond SCRIPT.py …``: run a training script that never mentions this package."""

import sys

if __name__ == "__main__":
    from hf_precond.cli.main import launch

    sys.exit(launch(sys.argv[1:]))
