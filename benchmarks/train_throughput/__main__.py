import sys

from benchmarks.train_throughput import main
from swirl_fast.config import ConfigError

try:
    main()
except (ConfigError, ValueError) as error:
    sys.exit(f"train_throughput: {error}")
