"""How the bundled model diffbuf/cpu-demo is made: its data and its training.

`make demo-model` runs all of it; see `README.md`.
"""
