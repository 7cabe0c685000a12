# ruff: noqa: E501  (wide characters count double)
"""Strings on which tokenizers tend to disagree, made the same way every time."""

import random

SPECIAL_LOOKALIKES = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\nHi<|im_end|>\n",
    "<|im_start|>assistant", " <|im_end|> ", "a<|im_end|>b", "<|im_end|><|im_end|>",
    "<|im_end", "|im_end|>", "< |im_end|>", "<|im_end|", "<<|im_end|>>", "<|IM_END|>",
    "<|im_\u200bend|>", "<repo_name>", "<file_sep>x", "<gh_stars>", "<jupyter_code> 1",
    "<empty_output>", "<s>", "</s>", "<unk>", "[INST] x [/INST]", "<0x0A>", "<|eot_id|>",
]  # fmt: skip
SPACES = [
    "", " ", "  ", "   ", "    ", "\t", "\t\t", " \t", "\t ", "\n", "\n\n", "\n\n\n", "\r", "\r\n",
    "\r\n\r\n", " \n", "\n ", " \n ", "\n  \n", "\v", "\f", "\u00a0", "\u00a0\u00a0", "\u2003",
    "\u3000", "\u2028", "\u2029", "\u200b", "\ufeff", "\u0085", " a", "a ", " a ", "  a", "a  ",
    "a  b", "a   b", "a\tb", "a\n\nb", "a \n b", "a\u00a0b", "a\u3000b", "  leading", "trailing  ",
    "\ta\n\tb\n", "a\r\nb\r\n", " \n \n \n", "x" + " " * 17 + "y", "\n" * 9, "\t" * 9 + "z",
]  # fmt: skip
NUMBERS = [
    "0", "1", "12", "123", "1234", "12345", "3.14159", "-1", "+1", "1e-5", "0x1F", "1,000,000",
    "2026-11-21", "12:34:56", "192.168.0.1", "v1.2.3", "a1b2c3", "1a", "a1", " 1", " 12 34",
    "½ ¾ ² ³ ①", "٣٤٥", "१२३", "１２３", "ⅷ Ⅻ", "𝟘𝟙𝟚", "1st 2nd 3rd", "100%", "$5.00", "€20", "№7",
    "10^6", "1_000", "00000", "1" * 40,
]  # fmt: skip
WORDS = [
    "Hello", " Hello", "Hello, world!", "hello world", "HELLO WORLD", "don't", "DON'T", "don’t",
    "I'm you're he's we'll they'd I've", "I'M YOU'RE HE'S", "'s", "'S", "'re", "''", "'tis",
    "rock'n'roll", "e-mail", "state-of-the-art", "naïve café", "Ünïcödé", "Straße", "ſtop 'ſ",
    "Ærøskøbing", "İstanbul ıI", "ﬁ ﬂ ﬀ", "Ǆ ǅ ǆ", "Łódź", "fjörð", "antidisestablishmentarianism",
    "a" * 300, "ab" * 150, "supercalifragilistic" * 12, "x" * 1000, "¡¿ñ?!", "...", "…", "--", "—",
    "!!!???", "@user #tag", "https://example.com/a?b=c&d=%20#e", "me@example.com", "C:\\dir\\f.txt",
    "/usr/bin/env", "a/b/c", "snake_case camelCase PascalCase kebab-case SCREAMING_CASE",
]  # fmt: skip
SCRIPTS = [
    "Привет, мир!", "Ελληνικά κείμενα", "Հայերեն", "ქართული", "שלום עולם", "שָׁלוֹם", "مرحبا بالعالم",
    "السَّلَامُ عَلَيْكُمْ", "سلام دنیا", "اردو", "हिन्दी में", "नमस्ते दुनिया", "বাংলা", "தமிழ்", "తెలుగు",
    "ಕನ್ನಡ", "മലയാളം", "සිංහල", "ไทยภาษา", "ພາສາລາວ", "မြန်မာ", "ភាសាខ្មែរ", "བོད་ཡིག", "አማርኛ", "ᏣᎳᎩ",
    "你好，世界！", "漢字かな交じり文", "カタカナ", "ｶﾀｶﾅ", "한국어 문장", "각각", "𠜎𠜱𠝹", "㍿㋿", "「引用」、。",
    "Ｆｕｌｌｗｉｄｔｈ", "mixed混合текстنص", "abcабвαβγ", "English and 中文 and العربية together",
    "\u202eabc\u202c", "\u200fשלום\u200e abc", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "𐍈𐌰", "ꦗꦮ", "߂߃", "ⴰⵎⴰⵣⵉⵖ", "Việt Nam", "Tiếng Việt",
    "Zażółć gęślą jaźń", "čšž ĐđŽ", "ʻōlelo Hawaiʻi", "ɪntəˈnæʃənəl", "ﷺ", "﷽",
]  # fmt: skip
MARKS_AND_EMOJI = [
    "e\u0301", "é", "a\u0308\u0323", "Z\u0351\u036b\u0343a\u0323l\u0334g\u0328o", "\u0301", " \u0301",
    "🙂", "🙂🙂🙂", " 🙂 ", "a🙂b", "👍🏽", "👨‍👩‍👧‍👦", "👩🏾‍🚀", "🏳️‍🌈", "🇩🇪🇫🇷", "🇩", "❤️", "❤", "☺︎", "1️⃣", "#️⃣",
    "🦙.cpp", "🧑‍💻 writes 代码", "\u200d", "\ufe0f", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "♟️♔", "→←↑↓", "∑∫√∞≠≤", "α+β=γ", "½°C",
    "™®©", "†‡§¶", "“quotes” ‘single’ «guillemets» „unten“", "\U0010ffff", "\ue000", "\ufffd", "\ufffe",
]  # fmt: skip
CONTROL = [
    "\x00", "a\x00b", "\x01\x02\x03", "\x07", "\x08", "\x1b[31mred\x1b[0m", "\x7f", "\x80", "\x9f",
    "\xad", "soft\xadhyphen", "tab\x0bvertical", "\x1c\x1d\x1e\x1f", "a\x85b",
]  # fmt: skip
CODE = [
    "def f(x):\n    return x + 1\n", "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}\n",
    "if a==b and c!=d:pass", "#include <vector>\n", "x = {'a': [1, 2, 3], \"b\": None}",
    "SELECT * FROM t WHERE id=1;--", "<div class=\"a\">&nbsp;</div>", "{% if x %}{{ y }}{% endif %}",
    "```python\nprint('hi')\n```", "fn main() { println!(\"{:?}\", v); }", "λx.x", "a->b::c<d>&&e||f",
    "#!/bin/sh\nset -e\n", "\\frac{a}{b} $x^2$", "// comment\n/* block */", "a\\nb\\tc", "`x`", "~/.bashrc",
    "{\"k\": \"v\\u00e9\"}", "|a|b|\n|-|-|\n", "- item\n  - nested\n", "# Title\n\n## Sub\n", "****", "____",
    "=====", "((((", "))))", "[[]]", "{}{}", ";;", "::", "<>", "!=", "===", "=>", "<=", "0.5f", "a=b",
]  # fmt: skip


def awkward_strings() -> list[str]:
    fixed = [
        *SPACES, *NUMBERS, *WORDS, *SCRIPTS, *MARKS_AND_EMOJI, *CONTROL, *CODE, *SPECIAL_LOOKALIKES
    ]  # fmt: skip
    random_ones = _mixtures(fixed, 60, seed=1) + _characters(60, seed=2)
    return list(dict.fromkeys(fixed + random_ones))


def _mixtures(parts: list[str], count: int, seed: int) -> list[str]:
    short = [part for part in parts if len(part) < 40]
    rng = random.Random(seed)
    return ["".join(rng.choices(short, k=rng.randint(2, 6))) for _ in range(count)]


def _characters(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    planes = [(0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x250), (0x250, 0x2000), (0x2000, 0x3000)]
    planes += [(0x3000, 0xD800), (0x1F300, 0x1F700), (0x00, 0x20)]
    return [
        "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randint(3, 25)))
        for _ in range(count)
    ]
