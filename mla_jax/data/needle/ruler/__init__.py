"""The synthetic tasks of RULER (arXiv 2404.06654; github.com/NVIDIA/RULER at c3f5e3b), its prompts word for word.

Each maker draws a prompt whose haystack has a given number of items: sentences, words, lines. Words are arguments, so
that training can use the same formats with words that evaluations never ask about.
"""
