import sys

from swirl_kernels.aot import main

sys.exit(main())
