"""The built-in corpus: a talking mouth in numpy, so that the whole program runs anywhere in minutes.

A sentence takes four words from a matrix, a word is a few phones, and a phone is a target for the vocal tract (what is
heard) and one for the lips (what is seen). What is heard glides from target to target (coarticulation); clips differ in
pitch, vocal tract length, durations, face and light. As in speech, the two senses complete each other:

* p, b and m look the same, so do f and v, t, d, n and s, k and g: the lips show where a consonant is made;
* in noise p, t and k sound the same, so do b, d and g, m and n, f and s: what is left to hear is how it is made.

A clip's id determines everything; a clip is made when it is read.
"""

import itertools
import random
import zlib

import numpy as np

SAMPLE_RATE, FPS, SIZE = 16_000, 25, 96
SIZES = {"train": 2000, "valid": 50, "test": 100}

#         lips: height, width, rounding, teeth | first and second formant (Hz), voice, hiss, centre of the hiss (Hz)
PHONES = {
    "p": ((0.00, 0.55, 0.0, 0.0), (400, 1000, 0.0, 0.30, 900)),
    "b": ((0.00, 0.55, 0.0, 0.0), (300, 900, 0.35, 0.10, 700)),
    "m": ((0.00, 0.55, 0.0, 0.0), (250, 1100, 0.60, 0.0, 900)),
    "f": ((0.10, 0.65, 0.0, 1.0), (400, 1200, 0.0, 0.35, 5000)),
    "v": ((0.10, 0.65, 0.0, 1.0), (300, 1200, 0.35, 0.20, 4500)),
    "t": ((0.25, 0.60, 0.0, 0.6), (400, 1800, 0.0, 0.35, 3500)),
    "d": ((0.25, 0.60, 0.0, 0.6), (300, 1800, 0.35, 0.12, 3200)),
    "n": ((0.25, 0.60, 0.0, 0.6), (250, 1700, 0.60, 0.0, 1500)),
    "s": ((0.25, 0.60, 0.0, 0.6), (400, 1700, 0.0, 0.45, 6000)),
    "k": ((0.45, 0.50, 0.2, 0.0), (400, 2200, 0.0, 0.30, 2000)),
    "g": ((0.45, 0.50, 0.2, 0.0), (300, 2100, 0.35, 0.12, 1900)),
    "a": ((1.00, 0.70, 0.0, 0.2), (750, 1250, 1.0, 0.0, 1000)),
    "e": ((0.65, 0.80, 0.0, 0.3), (550, 1800, 1.0, 0.0, 1000)),
    "i": ((0.35, 1.00, 0.0, 0.5), (300, 2300, 1.0, 0.0, 1000)),
    "o": ((0.70, 0.30, 0.8, 0.0), (500, 900, 1.0, 0.0, 1000)),
    "u": ((0.30, 0.15, 1.0, 0.0), (320, 700, 1.0, 0.0, 1000)),
    "_": ((0.05, 0.55, 0.0, 0.0), (500, 1500, 0.0, 0.0, 1000)),  # silence
}
# A matrix of words, as in tests of hearing and in GRID: a sentence takes one word of each row, in this order. The words
# of a row differ only in the first consonant.
MATRIX = [
    {"bee": "bi", "pea": "pi", "me": "mi", "tea": "ti", "dee": "di", "knee": "ni", "see": "si", "key": "ki"},
    {"bat": "bat", "pat": "pat", "mat": "mat", "fat": "fat", "vat": "vat", "gnat": "nat", "sat": "sat", "cat": "kat"},
    {"boat": "bot", "moat": "mot", "vote": "vot", "tote": "tot", "dote": "dot", "note": "not", "coat": "kot", "goat": "got"},
    {"boo": "bu", "moo": "mu", "two": "tu", "do": "du", "new": "nu", "sue": "su", "coo": "ku", "goo": "gu"},
]  # fmt: skip
VOWELS = "aeiou"


def corpus(split):
    """[(id, frames, text)] of the split "train", "valid" or "test"; no test or valid sentence is in train."""
    clips = []
    for i in range(SIZES[split]):
        name = f"{split}-{i:04d}"
        words, phones = _script(name)
        clips.append((name, sum(length for _, length in phones), " ".join(words)))
    return clips


def render(name, modality):
    """The clip's "audio" (S,) float32 at 16 kHz, or its "video" (T, 96, 96) uint8 at 25 frames a second."""
    _, phones = _script(name)
    rng = np.random.default_rng(zlib.crc32(f"{name} {modality}".encode()))
    return (_speak if modality == "audio" else _draw)(phones, rng)


def word_times(name):
    """[(start, end, word)] of a clip, in seconds."""
    words, phones = _script(name)
    times, at = [], 0
    for silent, group in itertools.groupby(phones, lambda phone: phone[0] == "_"):
        frames = sum(frames for _, frames in group)
        times += [] if silent else [(at / FPS, (at + frames) / FPS)]
        at += frames
    return [(*span, word) for span, word in zip(times, words)]


def _script(name):
    """(words, [(phone, frames)]) of a clip."""
    split = name.partition("-")[0]
    rng = random.Random(name)
    while True:  # a checksum of its words tells the split of a sentence: one in eight is for test, one for valid
        words = [rng.choice(list(row)) for row in MATRIX]
        if {0: "test", 1: "valid"}.get(zlib.crc32(" ".join(words).encode()) % 8, "train") == split:
            break
    phones = [("_", rng.randint(1, 2))]
    for word, row in zip(words, MATRIX):
        phones += [(phone, rng.randint(3, 4) if phone in VOWELS else 2) for phone in row[word]] + [("_", 1)]
    return words, phones


def _targets(phones, part, rate):
    """The targets of the lips (part 0) or of the voice (part 1) over time, (rate * seconds, numbers of a target). The voice
    glides from phone to phone over 70 ms; lips change from frame to frame."""
    steps = np.concatenate([np.tile(PHONES[p][part], (n * rate // FPS, 1)) for p, n in phones]).astype(np.float32)
    window = np.hanning(2 * (rate * 6 // 100 // 2) + 3)[1:-1]
    padded = np.pad(steps, ((len(window) // 2,) * 2, (0, 0)), mode="edge")
    return np.stack([np.convolve(c, window / window.sum(), "valid") for c in padded.T], axis=1)


def _speak(phones, rng):
    """A source (glottal pulses and noise) through a filter with two formants that changes every 10 ms."""
    hop, size = 160, 480
    targets = _targets(phones, 1, SAMPLE_RATE // hop)  # (frames, 5)
    length = len(targets) * hop
    pitch = rng.uniform(90, 220) * (1 + 0.08 * np.sin(np.linspace(0, rng.uniform(3, 9), length) + rng.uniform(0, 6)))
    pulses = np.diff(np.floor(np.cumsum(pitch) / SAMPLE_RATE), prepend=0).astype(np.float32) * 12
    noise = rng.standard_normal(length, np.float32)
    tract = rng.uniform(0.92, 1.08)  # its length moves both formants
    f1, f2, voice, hiss, centre = (targets * [tract, tract, 1, 1, rng.uniform(0.95, 1.05)]).T[..., None]  # (frames, 1)
    freq = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    formants = sum(gain * np.exp(-0.5 * ((freq - f) / width) ** 2) for f, gain, width in ((f1, 1, 90), (f2, 0.5, 130)))
    filters = voice * (formants + 0.02), hiss * np.exp(-0.5 * ((freq - centre) / (200 + 0.15 * centre)) ** 2)
    index = np.arange(len(targets))[:, None] * hop + np.arange(size)
    spectrum = sum(
        np.fft.rfft(np.pad(source, (hop, hop))[index] * np.hanning(size)) * gains
        for source, gains in zip((pulses, noise), filters)
    )
    parts = np.fft.irfft(spectrum).reshape(len(targets), size // hop, hop)  # overlap-add: each chunk spans three hops
    out = sum(np.pad(part, ((i, 2 - i), (0, 0))) for i, part in enumerate(parts.swapaxes(0, 1))).ravel()
    out = out[hop : hop + length] + 0.002 * rng.standard_normal(length)
    return (0.1 * out / np.sqrt(np.mean(out**2))).astype(np.float32)


def _draw(phones, rng):
    """Skin, a ring of lips around a dark opening, teeth at its upper edge."""
    height, width, rounding, teeth = _targets(phones, 0, FPS).astype(np.float32).T[..., None, None]
    scale, tilt = rng.uniform(0.9, 1.1), rng.uniform(-0.3, 0.3)
    skin, lips = rng.uniform(120, 180), rng.uniform(70, 100)
    centre = SIZE / 2 + rng.uniform(-3, 3, (2, 1)) + np.cumsum(rng.normal(0, 0.25, (2, len(height))), axis=1)
    pixels = np.arange(SIZE, dtype=np.float32)
    y, x = ((pixels - c[:, None]) / np.float32(scale) for c in centre.astype(np.float32))  # (T, 96) each
    y, x = y[:, :, None], x[:, None, :]
    b = 1.5 + 16 * height  # half axes of the opening, in pixels
    a = 12 + 16 * width - 4 * rounding
    thick = 5 + 3 * rounding
    opening = _inside(x, y, a, b)
    upper = _soft(-4 - 0.3 * b - y)
    dark = 25 + 175 * teeth * upper
    frames = skin + tilt * x + (lips - skin) * _inside(x, y, a + thick, b + thick)
    frames += (dark - frames) * opening
    frames += rng.normal(0, 4, (SIZE, SIZE)).astype(np.float32)
    return frames.clip(0, 255).astype(np.uint8)


def _inside(x, y, a, b):
    """1 inside an ellipse with the half axes a and b, 0 outside, with an edge of about two pixels."""
    return _soft((1 - np.sqrt((x / a) ** 2 + (y / b) ** 2)) * np.minimum(a, b))


def _soft(distance):
    return (0.5 + distance / 2).clip(0, 1)
