"""Models to and from other programs.

hf      folders in Hugging Face format, read and written without torch or transformers
gguf    GGUF files for llama.cpp, made from such folders
llama   conversion of Llama, Mistral and Qwen checkpoints to latent attention
vllm    a plugin that serves exported models with our kernels

run_or_hf  the model of a run or of a Hugging Face folder
harness    such a model in lm-evaluation-harness
"""
