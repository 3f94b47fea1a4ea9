"""Run the server: `python -m mlxpool_server` is `mlxpool serve`."""

import sys

from mlxpool_server.cli import main

sys.exit(main())
