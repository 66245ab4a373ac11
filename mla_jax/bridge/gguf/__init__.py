"""GGUF files for llama.cpp, made from Hugging Face folders: `export` writes model and weights, `tokenizer` its keys."""
