"""`python -m mlxpool_server` is `mlxpool serve`."""

import logging
import os
import sys

from mlxpool_server.cli import main

if __name__ == "__main__":
    exit_code = main()
    # mlx.core's thread-local destructors ask for an interpreter that is already finalising and
    # abort the process; nothing of ours is left to finalise.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
