"""The fixed texts that a verification compares on: our own, several scripts, code, digits and odd spacing."""
# ruff: noqa: E501, RUF001

PROMPTS = (
    "The lighthouse keeper wrote down the weather every evening: wind from the west, 14 degrees, rain later.",
    "def mean(values):\n    total = 0.0\n    for v in values:\n        total += v\n    return total / len(values)\n",
    "Über den Dächern von Nürnberg hängt der Nebel; dans la forêt, l'été s'achève déjà.",
    "Сегодня утром поезд опоздал на семь минут, и никто этого не заметил.",
    "今天的天气很好，我们一起去公园散步吧。明日は雨が降るそうです。",
    "مرحبا بالعالم، هذا نص قصير للتجربة. שלום עולם. नमस्ते दुनिया।",
    'SELECT name, COUNT(*) FROM orders WHERE total >= 99.95 GROUP BY name;  -- {"id": 3, "tags": ["a", "b"]}',
    "1 + 1 = 2, 12345 * 678 = 8369910, π ≈ 3.14159;\t\tx² − 4x + 4 = 0  →  x = 2 🙂👍🏽\n\n\n  done.",
)
