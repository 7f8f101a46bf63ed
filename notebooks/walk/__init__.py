"""What only the notebooks use; their kernels find it, since they start in notebooks/."""
