"""Generation through the latent cache: prompts, memory, sampling, the decode loop."""
