"""Print the table of docs/configuration.md: `python -m mlxpool_server.settings`."""

import sys

from mlxpool_server.settings import render_settings_table

sys.stdout.write(render_settings_table())
