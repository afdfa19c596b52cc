"""Clips in, padded batches out: manifests, augmentation, noise, and the order of a run.

    clips, load = load_corpus("synthetic", "train")           # or the folder of a manifest train.csv
    dataset = ClipDataset(clips, load, ("audio", "video"))
    batch = collate([dataset[0], dataset[1, 3]])              # clip 0 as it is, clip 1 as training draws it in epoch 3
    python data.py DIR                                        # reads every clip of a corpus and lists all faults

What happens to a clip is drawn from (seed, epoch, clip id), never from a global state: it does not depend on workers or
processes, a resumed run sees the same clips, and an evaluation in noise repeats exactly.

Legend: B clips, T video frames (25 a second), S audio samples (16 kHz).
"""

import argparse
import csv
import math
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import synthetic
from tools.errors import InputError, run_command
from tools.features import Features, is_features, version_at
from tools.media import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, find_sound, fit_audio, load_audio, load_video

CROP = 88  # pixels of the 96-pixel mouth region that the video encoder sees
MAX_REGION = 2 * 96  # a larger picture is no mouth region but a clip that was never prepared
TRAIN_SNRS = (-5, 0, 5, 10, 15, 20, None)  # dB; None is clean
HEADER = ["id", "path", "frames", "text"]
SPLITS = ("train", "valid", "test")
OTHERS = "others"  # a split that a corpus may have: talkers that no other split has


# --- manifests ---------------------------------------------------------------------------------------------------


class Clip(NamedTuple):
    id: str
    path: Path
    frames: int  # at 25 fps
    text: str


def load_corpus(data, split, allow_empty=False):
    """(clips, load) of one split: `data` is "synthetic" or a folder with SPLIT.csv; load(clip, modality) reads one. For
    a folder of tools/encode.py, `load` is a Features.
    allow_empty: clips without speech, whose transcript is empty, are no fault."""
    if data == "synthetic":
        if split not in SPLITS:
            raise InputError(f"the synthetic corpus has the splits {', '.join(SPLITS)}, not {split!r}")
        clips = [Clip(name, None, frames, text) for name, frames, text in synthetic.corpus(split)]
        return clips, load_synthetic
    clips = read_manifest(Path(data) / f"{split}.csv", allow_empty)
    return clips, Features(data) if is_features(data) else load_media


def load_synthetic(clip, modality):
    return synthetic.render(clip.id, modality)


def read_manifest(path, allow_empty=False):
    """List of `Clip` of a manifest: a CSV with the columns id,path,frames,text, `path` relative to its own folder.

    It also reads the label files of auto_avsr (no header; dataset,rel_path,frames,text) and of Llama-AVSR (the same with an
    unused number before the text). They lie in `labels/`, beside the folder `dataset`. If the text is auto_avsr's token
    ids, the transcript comes from its text folder. A fault raises an InputError that names the file and the line.
    """
    clips = list(manifest_rows(path, allow_empty))
    for clip in clips:
        if isinstance(clip, InputError):
            raise clip
    return clips


def write_table(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def manifest_rows(path, allow_empty=False):
    """Yield each row of a manifest as its Clip, or as the InputError that says what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such manifest")
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte-order mark
        reader = csv.reader(file)
        try:
            rows = [(reader.line_num, row) for row in reader if row]
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{path}: not a CSV file in UTF-8 ({error})") from None
    labels = bool(rows) and rows[0][1] != HEADER
    rows = rows if labels else rows[1:]
    if not rows:
        raise InputError(f"{path}: no clips in it; expected the header {','.join(HEADER)} and a line a clip")
    names = set()
    for line, row in rows:
        try:
            clip = parse_labels(path, row) if labels else parse_row(path, row)
            if not clip.text and not allow_empty:
                raise InputError(f"empty transcript for {clip.path}")
            if clip.id in names:
                raise InputError(f"the id {clip.id!r} stands for several clips")
            names.add(clip.id)
            yield clip
        except InputError as error:
            yield InputError(f"{path}:{line}: {error}")


def parse_row(path, row, file=None):
    """The Clip of a row id,path,frames,text of the manifest at `path`."""
    if len(row) != 4 or not (row[2].isascii() and row[2].isdecimal()) or not 1 <= int(row[2]) < 10**9:
        expected = f"{','.join(HEADER)} with a positive number of frames, and quotes around a text with commas"
        raise InputError(f"expected {expected}, got {','.join(row)[:200]!r}")
    name, relative, frames, text = row
    file, text = file or path.parent / relative, " ".join(text.split())
    if any(Path(part).is_absolute() or ".." in Path(part).parts for part in (name, relative)):
        raise InputError(f"{name!r}, {relative!r}: neither id nor path may lead out of the folder")
    return Clip(name, file, int(frames), text)


def parse_labels(path, row):
    """The Clip of a row of a label file of auto_avsr, or of Llama-AVSR, which has a number before the text."""
    llama_avsr = len(row) == 5 and row[3].strip().isdecimal()
    if llama_avsr:
        row = [*row[:3], row[4]]
    if len(row) == 4:
        dataset, relative, frames, text = row
        root = path.parent if (path.parent / dataset).is_dir() else path.parent.parent
        if not llama_avsr and text.strip() and all(token.isdigit() for token in text.split()):  # auto_avsr's token ids
            transcript = (root / dataset / relative.replace("_video_", "_text_")).with_suffix(".txt")
            text = " ".join(read_lines(transcript))
        row = [str(Path(relative).with_suffix("")), relative, frames, text]
        return parse_row(path, row, root / dataset / relative)
    return parse_row(path, row)


def read_lines(path):
    """The lines of a text file in UTF-8, with or without a byte-order mark, that are not empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not text in UTF-8 ({error})") from None
    if "\0" in text:
        raise InputError(f"{path}: not text in UTF-8 (zero bytes)")
    return [line for line in text.splitlines() if line.strip()]


def load_media(clip, modality):
    """The "audio" (S,) float32 or "video" (T, H, W) uint8 of a clip on disk, at the length its manifest states."""
    if modality == "audio":
        audio, length = load_audio(find_sound(clip.path)), clip.frames * SAMPLES_PER_FRAME
        if abs(len(audio) - length) > SAMPLE_RATE // 5:  # codecs pad
            seconds = [round(samples / SAMPLE_RATE, 2) for samples in (len(audio), length)]
            raise InputError(f"{clip.path}: {seconds[0]} s of audio, but its manifest says {seconds[1]} s")
        return fit_audio(audio, length)
    frames = load_video(clip.path)
    if abs(len(frames) - clip.frames) > 1:  # containers round: one frame more or less is no fault
        raise InputError(f"{clip.path}: {len(frames)} frames at 25 fps, but its manifest says {clip.frames}")
    height, width = frames.shape[1:3]
    if min(height, width) < CROP or max(height, width) > MAX_REGION:
        raise InputError(
            f"{clip.path}: {width}x{height} pixels, but mouth regions of {CROP} to {MAX_REGION} are expected; "
            "python -m tools.prepare cuts them out"
        )
    return frames[np.minimum(np.arange(clip.frames), len(frames) - 1)]


# --- augmentation and noise --------------------------------------------------------------------------------------


def crop_video(frames, rng=None):
    """Grey frames (T, H, W) -> (T, 88, 88) tensor: the centre; with `rng` a random place, flipped half of the time."""
    height, width = frames.shape[1:3]
    top, left = round((height - CROP) / 2), round((width - CROP) / 2)
    if rng is not None:
        top, left = rng.randint(0, height - CROP), rng.randint(0, width - CROP)
    video = torch.from_numpy(frames[:, top : top + CROP, left : left + CROP])
    return video.flip(-1) if rng is not None and rng.random() < 0.5 else video


def transform_audio(samples):
    """(S,) float32 normalised to mean 0 and variance 1 over the whole clip."""
    audio = torch.from_numpy(samples).float()
    return F.layer_norm(audio, audio.shape, eps=1e-8)


def mask_spans(x, rate, rng, longest=0.4):
    """x (T, ...) with spans of up to `longest` seconds set to 0, one per second of the clip, at random places, as in
    auto_avsr. Sound is masked before noise is added; masked video frames are black."""
    x = x.copy()
    for _ in range(math.ceil(len(x) / rate)):
        start = rng.randrange(len(x))
        x[start : start + rng.randint(0, int(longest * rate))] = 0
    return x


def add_noise(samples, noise, snr, rng):
    """Add a random stretch of `noise` (looped) at `snr` dB: the ratio of the mean powers over the whole clip."""
    if not noise.any():
        raise InputError("the noise is silent")
    power = 0
    while power == 0:  # a recording may be silent in parts
        start = rng.randrange(len(noise))
        stretch = np.take(noise, np.arange(start, start + len(samples)), mode="wrap")
        power = np.mean(stretch.astype(np.float64) ** 2)
    gain = math.sqrt(np.mean(samples.astype(np.float64) ** 2) / power / 10 ** (snr / 10))
    return (samples + gain * stretch).astype(np.float32)


def make_babble(clips, load, seconds=30, voices=20, seed=0):
    """Babble as float32 (S,): `voices` chains of utterances drawn from `clips` with random gains, summed."""
    rng, sound_of = random.Random(seed), cache(lambda clip: load(clip, "audio"))  # a small corpus repeats its clips
    babble = np.zeros(seconds * SAMPLE_RATE, np.float32)
    for _ in range(voices):
        at = 0
        while at < len(babble):
            voice = sound_of(rng.choice(clips))[: len(babble) - at]
            babble[at : at + len(voice)] += rng.uniform(0.5, 1.5) * voice
            at += len(voice)
    return babble


class ClipDataset(Dataset):
    """A clip is a dict with id, text and, for each of `modalities`, audio (S,) float32 or video (T, 88, 88) uint8.

    dataset[i] is clip i as it is evaluated: nothing is random but the stretch of `noise` added at `snr` dB (None:
    clean), which is drawn from the clip's id.
    dataset[i, epoch] is clip i as training draws it: random crops and flips and, from epoch `clean_epochs` on, masked
    spans and `noise` at an SNR of TRAIN_SNRS.

    If `load` is a Features, all this was done beforehand: a clip has audio_features and video_features (tokens, D).
    Training draws one of its copies; in clean epochs it takes the clip without crops or flips.
    """

    def __init__(self, clips, load, modalities, noise=None, snr=None, seed=0, clean_epochs=0):
        if snr is not None and noise is None and not isinstance(load, Features):
            raise InputError(f"an SNR of {snr} dB needs a noise")
        self.clips, self.load, self.modalities, self.noise, self.snr = clips, load, modalities, noise, snr
        self.seed, self.clean_epochs = seed, clean_epochs

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, key):
        index, epoch = key if isinstance(key, tuple) else (key, None)
        clip, train = self.clips[index], epoch is not None
        rng = random.Random(f"{self.seed} {epoch or 0} {clip.id}")
        augmented = train and epoch >= self.clean_epochs
        item = {"id": clip.id, "text": clip.text}
        if isinstance(self.load, Features):
            version = rng.choice(self.load.copies) if augmented else version_at(self.snr)
            return item | {f"{m}_features": self.load(clip, m, version) for m in self.modalities}
        if "audio" in self.modalities:
            samples = self.load(clip, "audio")
            samples = mask_spans(samples, SAMPLE_RATE, rng) if augmented else samples
            snr = rng.choice(TRAIN_SNRS) if augmented else self.snr
            if snr is not None and self.noise is not None:  # 0 dB is an SNR
                samples = add_noise(samples, self.noise, snr, rng)
            item["audio"] = transform_audio(samples)
        if "video" in self.modalities:
            frames = self.load(clip, "video")
            frames = mask_spans(frames, FPS, rng) if augmented else frames
            item["video"] = crop_video(frames, rng if train else None)
        return item


# --- batches and the order of a run ------------------------------------------------------------------------------


def collate(items):
    """Zero-pad clips to a batch: {ids, texts, audio (B, S), audio_lengths (B,), video (B, T, 88, 88) uint8, ...}, or
    with audio_features (B, tokens, D) and video_features in place of audio and video; lengths are then in tokens."""
    batch = {"ids": [item["id"] for item in items], "texts": [item["text"] for item in items]}
    for name in items[0].keys() - {"id", "text"}:
        clips = [item[name] for item in items]
        batch[name] = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        batch[f"{name.removesuffix('_features')}_lengths"] = torch.tensor([len(clip) for clip in clips])
    return batch


def pack(frames, max_frames, rng=None, world=1):
    """Batches [[clip, ...], ...] of clips of similar length, each with at most `max_frames` video frames per process,
    padding included. A longer clip is a batch by itself (with those of the other processes). A last batch with fewer
    clips than processes joins the one before it. Every clip appears once.

    With `rng`, each length is changed by up to 5 % before the clips are sorted, so that other clips share a batch in each
    epoch, and the batches are shuffled.
    """
    if world > len(frames):
        raise InputError(f"{len(frames)} clips cannot be shared by {world} processes")
    order = sorted(range(len(frames)), key=lambda i: frames[i] * (rng.uniform(0.95, 1.05) if rng else 1))
    batches, longest = [[]], 0
    for i in order:
        longest = max(longest, frames[i])
        full = longest * math.ceil((len(batches[-1]) + 1) / world) > max_frames
        if full and len(batches[-1]) >= world:
            batches.append([])
            longest = frames[i]
        batches[-1].append(i)
    if len(batches[-1]) < world:
        batches[-2:] = [batches[-2] + batches[-1]]
    if rng:
        rng.shuffle(batches)
    return batches


class Step(NamedTuple):
    """A step of the optimiser, as this process computes it."""

    epoch: int
    batches: list  # clip numbers: [[...], ...], --accumulate of them
    weights: list  # of each batch's mean transcript loss, so that the step's is the mean over all its tokens
    last: bool  # of its epoch


def plan_run(frames, tokens, epochs, max_frames, accumulate=1, seed=0, rank=0, world=1):
    """All Steps of a run, from the lengths of its clips and of their transcripts; process `rank` of `world`.

    The mean over a step's tokens is the sum over its batches of (tokens of the batch / tokens of the step) times the
    batch's mean. DistributedDataParallel averages over processes, hence the factor `world`.
    """
    plan = []
    for epoch in range(epochs):
        batches = pack(frames, max_frames, random.Random(f"{seed} {epoch}"), world)
        for start in range(0, len(batches), accumulate):
            step = batches[start : start + accumulate]
            total = sum(tokens[i] for batch in step for i in batch)
            own = [batch[rank::world] for batch in step]
            weights = [world * sum(tokens[i] for i in batch) / total for batch in own]
            plan.append(Step(epoch, own, weights, start + accumulate >= len(batches)))
    return plan


def make_loader(dataset, batches, workers, pin_memory=False):
    """A loader of `batches`, an iterable of lists of a ClipDataset's keys, read ahead by `workers` processes."""
    settings = {"num_workers": workers, "worker_init_fn": leave_group, "pin_memory": pin_memory}
    return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **settings)


def default_workers(device):
    """Data-loading processes: 2, or for a GPU one per core (2 to 16); processes of torchrun share the cores."""
    if not str(device).startswith("cuda"):
        return 2
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 2), 16)


def leave_group(worker):
    """Leave the process group, to which a terminal sends Ctrl-C: training ends after a whole step and needs its workers
    until then."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


# --- checking a corpus -------------------------------------------------------------------------------------------


def check_corpus(folder, modalities):
    """[what is wrong] with the manifests of a folder and all their clips, each of which is read."""

    def check(clip):
        try:
            if isinstance(clip, InputError):
                raise clip
            for modality in modalities:
                load_media(clip, modality)
        except InputError as error:
            return str(error)

    manifests = [path for split in (*SPLITS, OTHERS) if (path := Path(folder) / f"{split}.csv").exists()]
    if not manifests:
        raise InputError(f"{folder}: neither train.csv, valid.csv nor test.csv")
    faults = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding needs no interpreter lock
        for path in manifests:
            rows = list(manifest_rows(path))
            faults += filter(None, tqdm(pool.map(check, rows), path.name, len(rows), unit="clip"))
    return faults


def main():
    from encoders import MODALITIES  # only here: reading data needs no model

    parser = argparse.ArgumentParser(description="Read every clip of a folder's manifests and list all faults.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", choices=MODALITIES, default="avsr", help="what is read (default: avsr)")
    args = parser.parse_args()
    faults = check_corpus(args.folder, MODALITIES[args.task])
    print(*faults, f"{len(faults)} faults", sep="\n")
    sys.exit(len(faults) > 0)


if __name__ == "__main__":
    run_command(main)
