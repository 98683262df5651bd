"""`python -m jaxmaml` is the command `jaxmaml`."""

import sys

from jaxmaml.cli import main

sys.exit(main())
