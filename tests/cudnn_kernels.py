"""cuDNN's kernels in a lowered program."""

import collections
import re


def cudnn_kernels(text: str) -> collections.Counter[str]:
    """Counts cuDNN's attention kernels in a program that was lowered for a GPU, by name and mask."""
    found = re.findall(r"@__cudnn\$fmha(\w+)\(.*?mask_type[^A-Z]*([A-Z_]+)", text)
    assert len(found) == text.count("@__cudnn$fmha")
    return collections.Counter(f"{name} {mask}" for name, mask in found)
