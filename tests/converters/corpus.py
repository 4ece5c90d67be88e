"""Text that tells tokenizers apart: scripts, spaces, numbers, code, control characters, emoji, odd Unicode."""

from __future__ import annotations

TEXTS = (
    "",
    " ",
    "  ",
    "   leading and trailing   ",
    "Hello, world! It's a test; we'll see what they've done. I'D SAY SO.",
    "tabs\tand\nnewlines\n\n\r\nand \r carriage returns\n \n  \n",
    "numbers 1 12 123 1234 12345678 3.14159 1,000,000 0x1F 1e-9 ½ ² ٣",
    "把卧室的灯调到三成亮，晚上七点。",
    "日本語のテスト、カタカナとひらがな。한국어도 있습니다.",
    "العربية من اليمين إلى اليسار",
    "हिन्दी में परीक्षण, ไทย, Ελληνικά, Русский, עברית",
    "emoji 🙂 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ☃",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)], \"b\": None}  # why?\n",
    '<div class="x">&nbsp;</div> https://example.org/?q=1&r=%20#frag C:\\path\\to\\file',
    "control \x00\x01\x07\x1b[31m\x7f\x85 characters",
    "zero width \u200b\u200d\ufeff and no-break\u00a0space, en\u2002space, ideographic\u3000space",
    "combining e\u0301 versus \u00e9, ﬁ ligature, Ⅻ, ①",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 beyond the first plane 𠜎𠜱",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "'s 'S 't 're 'RE n't 'll''d",
    "___ --- ... !!! ??? @#$%^&*()_+ ~`|",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)

TRAINING = (
    "Once upon a time, there was a little girl named Lily. She loved to play with her toys and her friends.",
    "Turn the bedroom lights to 30% at 7pm, and the kitchen lights off. It's late; we'll sleep soon.",
    "把卧室的灯调到三成亮。把客厅的空调开到二十六度。请打开窗帘。晚上七点关灯。",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n",
    "The quick brown fox jumps over the lazy dog. 1234567890 times, or 12 times, or 3.14 times!",
    "Ein schöner Tag, n'est-ce pas? Да, конечно. 日本語のテスト。",
) * 3
