"""GGUF files for llama.cpp, made from Hugging Face folders."""
