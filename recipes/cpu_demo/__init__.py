"""How the bundled model diffbuf/cpu-demo is made: its data and its training.

`python -m recipes.cpu_demo` in the repository's folder runs all of it; see `README.md`.
"""
