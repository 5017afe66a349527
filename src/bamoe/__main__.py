"""`python -m bamoe`: the command line, as launchers such as torchrun call it."""

import sys

from bamoe.cli.main import main

sys.exit(main())
