"""Conversion of Llama-style checkpoints (Llama, Mistral, Qwen) to latent attention; docs/importing.md explains it.

convert      the whole model, layer by layer
source       reads the checkpoint
config       its config.json, and that of the model it becomes
attention    one layer: grouped-query attention to MLA
rope         decoupled RoPE
low_rank     low-rank factors with an RMSNorm between them
layer        the source's layer, which errors are measured against
calibration  texts, and perplexity on those that are held out
report       the errors of a conversion
"""
