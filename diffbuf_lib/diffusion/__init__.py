"""The Diffusion Buffer's mathematics: spectra, SDEs, the buffer, the losses, the sampler."""
