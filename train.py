"""Train a Diffusion Buffer: `python train.py --help`; the same as `diffbuf train`."""

from diffbuf_lib.cli import train_main

if __name__ == "__main__":
    train_main()
