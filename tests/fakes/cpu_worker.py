"""python -m tests.fakes.cpu_worker --spec JSON: the real CPU worker, with faults to order."""

import sys

from nodeserve.worker.device import load
from nodeserve.worker.process import main
from tests.fakes.faults import faulty

if __name__ == "__main__":
    sys.exit(main(faulty(load)))
