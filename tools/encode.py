"""Encode a corpus once, so that trainings on it need no encoder.

    python -m tools.encode grid-mouths grid-features --audio-encoder openai/whisper-base --video-encoder lips
    torchrun --standalone --nproc_per_node 4 -m tools.encode ...       # several GPUs share the work
    python train.py --data grid-features ...                           # eval.py takes the folder, too

The encoders are frozen, so their features of a clip are the same in every epoch and run but for the augmentation, of
which `--copies` draws are kept. Training takes one of them for each clip and epoch; in its clean epochs, and on the valid
split, it takes the clip as it is; the test split is encoded at each SNR. tools/features.py says what OUT holds. The same
command goes on where it was stopped, shard by shard. The paper's VSR trains LoRA in AV-HuBERT; that cannot be encoded.
"""

import argparse
import csv
import json
import os
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from data import FPS, HEADER, OTHERS, SPLITS, ClipDataset, load_corpus, make_loader, pack
from encoders import MODALITIES, RATES, Encoders, default_window
from eval import load_noise, parse_snr
from tools import run as runs
from tools.errors import InputError, run_command
from tools.features import FACTS, version_at

SHARD = 1000  # clips
HERE = Path(__file__).resolve().parent.parent
SOURCES = (
    "data encoders whisper_encoder avhubert synthetic tools/media tools/encode".split()
)  # what decides the features


def load_splits(data):
    """{split: clips} of the splits that the corpus has, and `load`."""
    splits = SPLITS if data == "synthetic" else [s for s in (*SPLITS, OTHERS) if (Path(data) / f"{s}.csv").is_file()]
    if not splits:
        raise InputError(f"{data}: neither train.csv, valid.csv nor test.csv")
    corpora = {split: load_corpus(data, split) for split in splits}
    return {split: clips for split, (clips, _) in corpora.items()}, corpora[splits[0]][1]


def begin(out, facts, corpora):
    """Write features.json and the manifests, or an InputError says why this folder cannot be gone on with."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / FACTS).exists():
        begun = json.loads((out / FACTS).read_text())
        if other := [f"{k} {begun.get(k)}, now {facts.get(k)}" for k in begun | facts if begun.get(k) != facts.get(k)]:
            raise InputError(f"{out}: encoded with something else ({'; '.join(other)}); take another folder")
        return
    for split, clips in corpora.items():
        with open(out / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            rows = [(clip.id, f"{split}/{i // SHARD:03}", clip.frames, clip.text) for i, clip in enumerate(clips)]
            csv.writer(file, lineterminator="\n").writerows([HEADER, *rows])
    runs.write_atomically(out / FACTS, lambda path: path.write_text(json.dumps(facts, indent=2) + "\n"))


def versions_of(split, facts):
    """[(version, epoch of its draw or None, SNR)] of a split."""
    versions = [("clean", None, None)]
    if split == "train":
        versions += [(f"copy{i}", i, None) for i in range(facts["copies"])]
    if split in ("test", OTHERS) and "audio" in MODALITIES[facts["task"]]:
        versions += [(version_at(snr), None, snr) for snr in facts["snrs"]]
    return versions


@torch.inference_mode()
def encode_shard(encoders, dataset, batches, workers, bar):
    """{name: features} of one shard in one version."""
    tensors = {}
    for batch in make_loader(dataset, batches, workers, encoders.device.type == "cuda"):
        features, counts = encoders.encode(batch)
        for modality, x in features.items():
            for name, row, count in zip(batch["ids"], x.half().cpu(), counts[modality].tolist()):
                if not row[:count].isfinite().all():
                    raise InputError(f"{name}: a feature of its {modality} is not finite in float16")
                tensors[f"{name}.{modality}"] = row[:count].clone()
        bar.update(len(batch["ids"]))
    return tensors


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", help='"synthetic" or a folder with train.csv, valid.csv and test.csv, or some of them')
    add("out", type=Path, help="folder to write")
    add("--task", choices=MODALITIES, default="avsr", help="avsr serves asr and vsr, too (default: avsr)")
    add(
        "--audio-encoder",
        default="openai/whisper-medium.en",
        help="hub name, folder or run folder (default: %(default)s)",
    )
    add("--video-encoder", help="AV-HuBERT file or run folder")
    add("--audio-window", choices=["30s", "clip"], help="what Whisper sees (default: 30s; of a run folder, as it was)")
    add("--audio-pool", type=int, default=4, help="audio frames averaged into a token (default: 4)")
    add("--video-pool", type=int, default=2, help="video frames averaged into a token (default: 2)")
    add("--copies", type=int, default=6, help="augmented copies of the train split (default: 6)")
    add("--noise", help="audio file of noise (default: babble made of the train split)")
    add(
        "--snr",
        nargs="+",
        default="5 2.5 0 -2.5 -5".split(),
        help="dB of the test split, beside clean (default: 5 to -5)",
    )
    add("--seed", type=int, default=0, help="of the copies (default: 0)")
    add("--max-frames", type=int, default=1500, help="video frames per batch (default: 1500)")
    add("--workers", type=int, default=2, help="data-loading processes (default: 2)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="any of torch's")
    return parser.parse_args()


def describe(args, encoders, corpora):
    """features.json: all that the features depend on."""
    facts = {name: getattr(args, name) for name in "task audio_window audio_pool video_pool copies seed".split()}
    for name in ("data", "noise", "audio_encoder", "video_encoder"):
        value = getattr(args, name)
        facts[name] = os.path.abspath(value) if value and value != "synthetic" and os.path.exists(value) else value
    facts["snrs"] = [snr for snr in map(parse_snr, args.snr) if snr is not None]
    facts["weights"] = encoders.fingerprints()
    facts["clips"] = {split: runs.fingerprint(clips) for split, clips in corpora.items()}
    facts["code"] = zlib.crc32(b"".join((HERE / f"{name}.py").read_bytes() for name in SOURCES))
    return facts


def say_size(corpora, facts, encoders):
    """Print how many bytes the features will take."""
    size = 0
    for split, clips in corpora.items():
        for modality, width in encoders.widths.items():
            rate = RATES[modality] / FPS / encoders.pools[modality]  # tokens a video frame
            size += sum(int(clip.frames * rate) for clip in clips) * 2 * width * len(versions_of(split, facts))
    versions = {split: len(versions_of(split, facts)) for split in corpora}
    counts = ", ".join(f"{len(clips)} {split} clips x {versions[split]}" for split, clips in corpora.items())
    print(f"{counts}: {size / 1e9:.2f} GB", flush=True)


def main():
    args = parse_args()
    if args.copies < 1:
        raise InputError(f"--copies must be at least 1, got {args.copies}")
    rank, world, device = runs.join_processes(args.device)
    corpora, load = load_splits(args.data)
    args.audio_window = args.audio_window or default_window(args.audio_encoder)
    encoders = Encoders(
        args.task, args.audio_encoder, args.video_encoder, args.audio_pool, args.video_pool, args.audio_window
    )
    facts = describe(args, encoders, corpora)
    encoders.requires_grad_(False).eval().to(device)
    if rank == 0:
        begin(args.out, facts, corpora)
        say_size(corpora, facts, encoders)
    runs.wait()
    needs_noise = "audio" in encoders.modalities and corpora.keys() & {"train", "test"}
    noise = load_noise(args.noise, args.data) if needs_noise else None
    shards = [
        (split, start, *version)
        for split, clips in corpora.items()
        for start in range(0, len(clips), SHARD)
        for version in versions_of(split, facts)
    ][rank::world]
    bar = tqdm(
        total=sum(len(corpora[split][start : start + SHARD]) for split, start, *_ in shards),
        unit="clip",
        disable=rank > 0,
    )
    for split, start, version, epoch, snr in shards:
        clips = corpora[split][start : start + SHARD]
        file = args.out / split / f"{start // SHARD:03}" / f"{version}.safetensors"
        if file.exists():
            bar.update(len(clips))
            continue
        dataset = ClipDataset(clips, load, encoders.modalities, noise, snr, args.seed)
        batches = pack([clip.frames for clip in clips], args.max_frames)
        keys = [[i if epoch is None else (i, epoch) for i in batch] for batch in batches]
        tensors = encode_shard(encoders, dataset, keys, args.workers, bar)
        file.parent.mkdir(parents=True, exist_ok=True)
        runs.write_atomically(file, lambda path: save_file(tensors, path))
    runs.leave_processes()


if __name__ == "__main__":
    run_command(main)
