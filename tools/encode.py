"""Encode a corpus once, so that training does not run the encoders.

    python -m tools.encode grid-mouths grid-features --audio-encoder openai/whisper-base --video-encoder lips
    torchrun --standalone --nproc_per_node 4 -m tools.encode ...       # several GPUs share the work
    python train.py --data grid-features ...                           # eval.py takes the folder, too

A frozen encoder gives the same features of a clip in every epoch and run, unless the clip is augmented. So `--copies`
augmented copies of each train clip are stored. Training takes one of them for each clip and epoch; in its clean epochs,
and on the valid split, it takes the clip as it is. The test split (and `others`, a split of new talkers) is encoded clean
and at each SNR. tools/features.py says what OUT holds. Repeat an interrupted command to continue it, shard by shard.
"""

import argparse
import json
import math
import os
import zlib
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from data import FPS, HEADER, OTHERS, SPLITS, ClipDataset, default_workers, load_corpus, make_loader, pack, write_table
from encoders import MODALITIES, RATES, Encoders
from eval import load_noise, parse_snr
from tools import run as runs
from tools.checks import check_lengths
from tools.errors import InputError, run_command
from tools.features import FACTS, fingerprints, is_features, version_at

SHARD = 1000  # clips
NOISY = "5 2.5 0 -2.5 -5".split()
HERE = Path(__file__).resolve().parent.parent
# The files that decide the features.
SOURCES = "data encoders whisper_encoder avhubert synthetic tools/media tools/encode".split()


def load_splits(data):
    """{split: clips} of the splits that the corpus has, and `load`."""
    if is_features(data):
        raise InputError(f"{data}: features already; give the corpus that they were made from")
    splits = SPLITS if data == "synthetic" else [s for s in (*SPLITS, OTHERS) if (Path(data) / f"{s}.csv").is_file()]
    if not splits:
        raise InputError(f"{data}: neither train.csv, valid.csv nor test.csv")
    corpora = {split: load_corpus(data, split) for split in splits}
    return {split: clips for split, (clips, _) in corpora.items()}, corpora[splits[0]][1]


def begin(out, facts, corpora):
    """Lock the folder and write features.json and the manifests, or an InputError says why this may not continue there."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / FACTS).exists():
        begun = json.loads((out / FACTS).read_text())
        if other := [f"{k} {begun.get(k)}, now {facts.get(k)}" for k in begun | facts if begun.get(k) != facts.get(k)]:
            raise InputError(f"{out}: begun with other settings ({'; '.join(other)}); take another folder")
    elif any(file.name != "lock" for file in out.iterdir()):
        raise InputError(f"{out}: holds something else; take an empty folder")
    lock = runs.hold(out)  # a file, open as long as it is held
    runs.write_atomically(out / FACTS, lambda path: path.write_text(json.dumps(facts, indent=2) + "\n"))
    for split, clips in corpora.items():
        rows = [(clip.id, f"{split}/{i // SHARD:03}", clip.frames, clip.text) for i, clip in enumerate(clips)]
        runs.write_atomically(out / f"{split}.csv", lambda path, rows=rows: write_table(path, HEADER, rows))
    return lock


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
    """{"ID.MODALITY": (tokens, D) float16} of one shard in one version."""
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


def encode_all(encoders, corpora, load, noise, facts, args):
    """Write this process's share of the shards that are not there yet."""
    rank, world = runs.rank_and_world()
    workers = default_workers(encoders.device) if args.workers is None else args.workers
    shards = [
        (split, number, clips[number * SHARD : (number + 1) * SHARD], *version)
        for split, clips in corpora.items()
        for number in range(math.ceil(len(clips) / SHARD))
        for version in versions_of(split, facts)
    ][rank::world]
    bar = tqdm(total=sum(len(clips) for _, _, clips, *_ in shards), unit="clip", disable=rank > 0)
    for split, number, clips, version, epoch, snr in shards:
        file = args.out / split / f"{number:03}" / f"{version}.safetensors"
        if file.exists():
            bar.update(len(clips))
            continue
        seed = 0 if epoch is None else args.seed  # eval.py's noise depends on no seed
        dataset = ClipDataset(clips, load, encoders.modalities, noise, snr, seed)
        batches = pack([clip.frames for clip in clips], args.max_frames)
        keys = [[i if epoch is None else (i, epoch) for i in batch] for batch in batches]
        tensors = encode_shard(encoders, dataset, keys, workers, bar)
        file.parent.mkdir(parents=True, exist_ok=True)
        runs.write_atomically(file, lambda path, tensors=tensors: save_file(tensors, path))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", help='"synthetic" or a folder with train.csv, valid.csv and test.csv, or some of them')
    add("out", type=Path, help="folder to write")
    add("--task", choices=MODALITIES, default="avsr", help="avsr serves asr and vsr, too (default: avsr)")
    add("--audio-encoder", default="openai/whisper-medium.en", help="hub name, folder or run (default: %(default)s)")
    add("--video-encoder", help="AV-HuBERT file or run folder")
    add("--audio-window", choices=["30s", "clip"], help="what Whisper hears (default: 30s; of a run, as in training)")
    add("--audio-pool", type=int, default=4, help="audio frames averaged into a token (default: 4)")
    add("--video-pool", type=int, default=2, help="video frames averaged into a token (default: 2)")
    add("--copies", type=int, default=6, help="augmented copies of the train split (default: 6)")
    add("--noise", help="audio file of noise (default: babble made of the train split)")
    add(
        "--snr",
        nargs="+",
        default=NOISY,
        help=f"SNRs (dB) of the test split, besides clean (default: {' '.join(NOISY)})",
    )
    add("--seed", type=int, default=0, help="of the copies (default: 0)")
    add("--max-frames", type=int, default=1500, help="video frames per batch (default: 1500)")
    add("--workers", type=int, help="data-loading processes (default: 2; for a GPU, one per core, at most 16)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="any of torch's")
    return parser.parse_args()


def facts_of(args, encoders, corpora, noise):
    """features.json: all that the features depend on."""
    facts = {name: getattr(args, name) for name in "task audio_pool video_pool copies seed".split()}
    for name in ("data", "noise", "audio_encoder", "video_encoder"):
        value = getattr(args, name)
        facts[name] = os.path.abspath(value) if value and value != "synthetic" and os.path.exists(value) else value
    facts["snrs"] = [snr for snr in map(parse_snr, args.snr) if snr is not None]
    facts["audio_window"], facts["encoders"] = encoders.audio_window, fingerprints(encoders)
    facts["clips"] = {split: runs.fingerprint(clips) for split, clips in corpora.items()}
    facts["sound of the noise"] = zlib.crc32(noise) if noise is not None else None
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
    for name in ("copies", "audio_pool", "video_pool", "max_frames"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    rank, _, device = runs.join_processes(args.device)
    corpora, load = load_splits(args.data)
    parts = args.audio_encoder, args.video_encoder, args.audio_pool, args.video_pool, args.audio_window
    encoders = Encoders(args.task, *parts)
    check_lengths(encoders, [clip for clips in corpora.values() for clip in clips])
    needs_noise = "audio" in encoders.modalities and corpora.keys() != {"valid"}
    noise = load_noise(args.noise, args.data) if needs_noise else None
    facts = facts_of(args, encoders, corpora, noise)
    encoders.requires_grad_(False).eval().to(device)
    with begin(args.out, facts, corpora) if rank == 0 else nullcontext():
        if rank == 0:
            say_size(corpora, facts, encoders)
        runs.wait()
        encode_all(encoders, corpora, load, noise, facts, args)
        runs.wait()
    runs.leave_processes()


if __name__ == "__main__":
    run_command(main)
