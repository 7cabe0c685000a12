"""A client process. Not `process.py` itself: pickled names must be the same on both sides."""

from nodeserve.loadgen.process import main

main()
