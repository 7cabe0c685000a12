"""python -m nodeserve.worker --spec JSON"""

import sys

from nodeserve.worker.device import load
from nodeserve.worker.process import main

if __name__ == "__main__":
    sys.exit(main(load))
