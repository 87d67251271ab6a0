"""``python -m model``: the command line from an uninstalled tree."""

import sys

from model.cli.main import main

sys.exit(main())
