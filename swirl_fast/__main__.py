import sys

from swirl_fast.cli import main

sys.exit(main())
