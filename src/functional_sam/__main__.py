"""python -m functional_sam."""

import sys

from functional_sam.cli import main

sys.exit(main())
