"""`python -m finetune`, which `accelerate launch -m finetune` needs."""

import os
import sys

if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109 - before any other import
    # `-m` puts the working folder first, and a json.py in it would be run in place of Python's own. The package's own
    # folder goes last, for a checkout that is not installed.
    sys.path[:1] = []
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120

from finetune.cli.main import main

if __name__ == "__main__":
    main()
