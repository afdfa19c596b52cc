"""Read the features that tools/encode.py stored, and check what they were made from.

Their folder holds features.json and the manifests. A shard is a folder, SPLIT/NUMBER, of up to 1000 clips; in a manifest,
the `path` of a clip is its shard. Each shard has one safetensors file per version, with the tensors ID.audio and ID.video,
(tokens, D) in float16. The versions are "clean", "copy0", "copy1", ... (augmented as in training) and "snr5", "snr-5", ...
(noise at that many dB).
"""

import json
import zlib
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tools.errors import InputError

FACTS = "features.json"
# What train.py takes over from features.json.
SETTINGS = "audio_encoder video_encoder audio_window audio_pool video_pool noise".split()


class Features:
    def __init__(self, folder):
        self.folder, self.facts = Path(folder), json.loads((Path(folder) / FACTS).read_text())
        self.copies = [f"copy{i}" for i in range(self.facts["copies"])]

    def __call__(self, clip, modality, version):
        """(tokens, D) float16 of a clip."""
        file = clip.path / f"{version}.safetensors"
        try:
            return open_shard(file).get_tensor(f"{clip.id}.{modality}")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: {error}") from None

    def check(self, model, versions):
        """Raise an InputError unless these features were made with the model's encoders and {version: clips} are there."""
        for modality, asked in fingerprints(model).items():
            if (found := self.facts["encoders"].get(modality)) is None:
                raise InputError(f"{self.folder}: no {modality} in these features; give another --task")
            if found != asked:
                made = f"{', '.join(found)}, not {', '.join(asked)}"
                raise InputError(f"{self.folder}: not made with the model's {modality} encoder: {made}")
        for version, clips in versions.items():
            for shard in sorted({clip.path for clip in clips}):
                if not (file := shard / f"{version}.safetensors").is_file():
                    raise InputError(f"{file}: missing; python -m tools.encode did not finish, or was not asked for it")


def fingerprints(encoders):
    """{modality: what its features depend on}: its pool, how much Whisper hears, a checksum of the weights.
    Call it before `to("cuda")`, which rounds them."""
    prints = {}
    for modality in encoders.modalities:
        checksum = 0
        for x in getattr(encoders, f"{modality}_encoder").state_dict().values():
            checksum = zlib.crc32(x.float().contiguous().numpy(), checksum)
        window = [encoders.audio_window] if modality == "audio" else []
        prints[modality] = [f"pool {encoders.pools[modality]}", *window, f"weights {checksum:08x}"]
    return prints


def is_features(data):
    return (Path(data) / FACTS).is_file()


def raw_of(data):
    """The corpus itself: `data`, or what the features in that folder were made from."""
    return Features(data).facts["data"] if is_features(data) else data


def version_at(snr):
    return "clean" if snr is None else f"snr{snr:g}"


@lru_cache(maxsize=None)
def open_shard(file):
    """A shard's file, mapped into memory."""
    return safe_open(file, "pt")
