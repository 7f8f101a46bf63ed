"""The demo: a small DN-LM set made offline, a short training on it, and a report."""
