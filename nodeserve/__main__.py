"""`python -m nodeserve` is the command `nodeserve`."""

from nodeserve.cli import main

if __name__ == "__main__":
    main(prog_name="nodeserve")
