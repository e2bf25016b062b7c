"""Distil an image classifier: the command line of hf_kd, for `accelerate launch` and `torchrun`."""

import sys

from hf_kd.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
