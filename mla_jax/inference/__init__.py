"""Inference through the latent cache: generation, sampling, log-likelihoods, and the plan of its memory."""
