"""The features of a corpus that tools/encode.py has encoded once: where they lie, what they are of, how they are read.

Their folder holds features.json; the manifests, in which the `path` of a clip is its shard, SPLIT/NUMBER; and in each shard
a safetensors file a version, with the tensors ID.audio and ID.video, (tokens, D) in float16. The versions are "clean",
"copy0", "copy1", ... (augmented as in training) and "snr5", "snr-5", ... (noise at so many dB).
"""

import json
from functools import lru_cache
from pathlib import Path

from safetensors import safe_open

from tools.errors import InputError

FACTS = "features.json"
# What features.json tells train.py, in the words of its arguments.
SETTINGS = "audio_encoder video_encoder audio_window audio_pool video_pool noise".split()


class Features:
    def __init__(self, folder):
        self.folder, self.facts = Path(folder), json.loads((Path(folder) / FACTS).read_text())
        self.copies = [f"copy{i}" for i in range(self.facts["copies"])]

    def __call__(self, clip, modality, version):
        """(tokens, D) float16 of a clip."""
        return open_shard(clip.path / f"{version}.safetensors").get_tensor(f"{clip.id}.{modality}")

    def check(self, model, snrs):
        """An InputError unless these features are of the model's encoders, and at these SNRs."""
        for modality, weights in model.fingerprints().items():
            if self.facts["weights"].get(modality) != weights:
                raise InputError(
                    f"{self.folder}: not of the model's {modality} encoder; encode again into another folder"
                )
        if lacking := [f"{snr:g}" for snr in snrs if snr is not None and snr not in self.facts["snrs"]]:
            raise InputError(f"{self.folder}: not encoded at {', '.join(lacking)} dB")


def is_features(data):
    return (Path(data) / FACTS).is_file()


def raw_of(data):
    """The corpus itself: `data`, or what the features in that folder were made of."""
    return Features(data).facts["data"] if is_features(data) else data


def version_at(snr):
    return "clean" if snr is None else f"snr{snr:g}"


@lru_cache(maxsize=None)
def open_shard(path):
    """A shard's file, mapped into memory."""
    if not path.is_file():
        raise InputError(f"{path}: no such features; python -m tools.encode goes on where it was stopped")
    return safe_open(path, "pt")
