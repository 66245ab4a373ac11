"""Conversion of Llama-style checkpoints (Llama, Mistral, Qwen) to latent attention; docs/importing.md explains it.

convert      the whole model, layer by layer
source       reads the checkpoint
config       its config.json, and that of the model it becomes
attention    one layer: grouped-query attention to MLA
rope         decoupled RoPE
low_rank     low-rank factors with an RMSNorm between them
refit        least squares that keep errors from adding up
layer        the source's layer, and what a converted one computes
teacher      the source as a model to learn from
calibration  texts, and perplexity on those that are held out
report       the errors of a conversion
"""
