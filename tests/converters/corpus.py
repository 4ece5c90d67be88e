"""The converter's corpus and what small tokenizers are trained on."""

from __future__ import annotations

from edgetune_converters.tokenizers.verify_ids import TEXTS as PROVEN

TEXTS = (*PROVEN, "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n")

TRAINING = (
    "Once upon a time, there was a little girl named Lily. She loved to play with her toys and her friends.",
    "Turn the bedroom lights to 30% at 7pm, and the kitchen lights off. It's late; we'll sleep soon.",
    "把卧室的灯调到三成亮。把客厅的空调开到二十六度。请打开窗帘。晚上七点关灯。",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n",
    "The quick brown fox jumps over the lazy dog. 1234567890 times, or 12 times, or 3.14 times!",
    "Ein schöner Tag, n'est-ce pas? Да, конечно. 日本語のテスト。",
) * 3
