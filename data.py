"""Clips in, padded batches out: manifests, decoding, transforms, noise, batching.

    corpus, load = load_corpus("synthetic", "train")          # or the folder of a manifest train.csv
    dataset = ClipDataset(corpus, load, task="avsr")
    batch = collate([dataset[0], dataset[1]])                 # what LlamaSMoP takes
    python data.py DIR                                        # reads every clip and lists all faults; --clean leaves
                                                              # the faulty ones out of the manifests

Every random choice is drawn from (seed, epoch, clip id), never from a global state: what happens to a clip does not
depend on workers or processes, a resumed run sees the same clips, and an evaluation in noise repeats exactly.

Legend: B clips, T video frames (25 a second), S audio samples (16 kHz).
"""

import argparse
import csv
import math
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

import synthetic

SAMPLE_RATE = 16_000
FPS = 25
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS  # 640
CROP = 88  # pixels of the 96-pixel mouth region that the video encoder sees
MAX_REGION = 2 * 96  # a larger picture is no mouth region but a clip that was never prepared
GREY_MEAN, GREY_STD = 0.421, 0.165  # of AV-HuBERT's training data
MAX_PIXELS = 4096 * 2304  # a larger picture is refused: one 100-megapixel frame can fill the memory
MAX_SECONDS = 30  # what Whisper sees
MAX_GAP = 60  # seconds without a frame, or between the starts of sound and picture: more is a damaged timestamp
TRAIN_SNRS = (-5, 0, 5, 10, 15, 20, None)  # dB; None is clean
TASKS = {"asr": ("audio",), "vsr": ("video",), "avsr": ("audio", "video")}  # what each task hears and sees


# --- manifests ---------------------------------------------------------------------------------------------------


HEADER = ["id", "path", "frames", "text"]


class Clip(NamedTuple):
    id: str
    path: Path
    frames: int  # at 25 fps
    text: str


def read_manifest(path):
    """List of `Clip` of a manifest: a CSV with the columns id,path,frames,text, `path` relative to its own folder.

    The label files of auto_avsr (no header; dataset,rel_path,frames,text) and of Llama-AVSR (a column more before the
    text, unused), in `labels/` beside the folder `dataset`, are read too; where they hold token ids, the transcript
    comes from auto_avsr's text folder.
    A fault is a ValueError that names the file and the line.
    """
    clips = [clip for _, clip in manifest_rows(path)]
    for clip in clips:
        if isinstance(clip, ValueError):
            raise clip
    return clips


def manifest_rows(path):
    """[(row, its Clip or its ValueError)] of a manifest, without its header."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such manifest")
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte-order mark
        reader = csv.reader(file)
        try:
            rows = [(reader.line_num, row) for row in reader if row]
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from None
    labels = bool(rows) and rows[0][1] != HEADER
    clips, names = [], set()
    for line, row in rows if labels else rows[1:]:
        try:
            clip = parse_row(path, row, labels)
            if clip.id in names:
                raise ValueError(f"the id {clip.id!r} stands for several clips")
            names.add(clip.id)
        except ValueError as error:
            clip = ValueError(f"{path}:{line}: {error}")
        clips.append((row, clip))
    if not clips:
        raise ValueError(f"{path}: no clips in it; expected the header {','.join(HEADER)} and a line a clip")
    return clips


def parse_row(path, row, labels):
    """The Clip of one row of the manifest at `path`; labels: it is a label file of auto_avsr or Llama-AVSR."""
    may_be_ids = len(row) == 4  # auto_avsr's own labels hold token ids
    if labels and len(row) == 5:  # Llama-AVSR's: dataset,rel_path,frames,unused,text
        row = [*row[:3], row[4]]
    if len(row) != 4 or not row[2].isdecimal() or not 1 <= len(row[2]) <= 9 or int(row[2]) < 1:
        raise ValueError(f"expected {','.join(HEADER)} with a positive number of frames, got {','.join(row)[:200]!r}")
    name, file, frames, text = row[0], path.parent / row[1], int(row[2]), row[3].strip()
    if labels:
        root = path.parent if (path.parent / row[0]).is_dir() else path.parent.parent
        name, file = str(Path(row[1]).with_suffix("")), root / row[0] / row[1]
        if may_be_ids and text and all(token.isdigit() for token in text.split()):
            transcript = (root / row[0] / row[1].replace("_video_", "_text_")).with_suffix(".txt")
            if not transcript.is_file():
                raise ValueError(f"token ids instead of a transcript, and no {transcript}")
            try:
                text = transcript.read_text(encoding="utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{transcript}: not UTF-8 text ({error})") from None
    if not text:
        raise ValueError(f"empty transcript for {file}")
    if any(Path(part).is_absolute() or ".." in Path(part).parts for part in (name, row[1])):
        raise ValueError(f"{name!r}, {row[1]!r}: neither id nor path may lead out of the folder")
    return Clip(name, file, frames, text)


def load_corpus(data, split):
    """(clips, load) of one split: `data` is "synthetic" or a folder with SPLIT.csv; load(clip, kind) reads one."""
    if data == "synthetic":
        return [Clip(name, None, frames, text) for name, frames, text in synthetic.corpus(split)], synthetic_media
    return read_manifest(Path(data) / f"{split}.csv"), load_media


# --- decoding ----------------------------------------------------------------------------------------------------


def _open(path, kind):
    """(container, its first stream of that kind), or an error that names the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        container = av.open(str(path))
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"{path}: not a readable media file ({error})") from None
    streams = getattr(container.streams, kind)
    if not streams:
        container.close()
        raise ValueError(f"{path}: no {kind} track")
    if streams[0].codec_context is None:
        container.close()
        raise ValueError(f"{path}: unknown {kind} codec")
    return container, streams[0]


def _start(stream):
    return float((stream.start_time or 0) * stream.time_base)


def video_frames(path, pixels="gray"):
    """Yield the frames of a video, 25 a second whatever its own rate: grey (H, W) uint8, or "rgb24" (H, W, 3).

    Upright, where the file says how it was held: a phone stores its portraits lying.
    """
    container, stream = _open(path, "video")
    with container:
        if stream.width * stream.height > MAX_PIXELS:
            raise ValueError(f"{path}: {stream.width}x{stream.height} pixels, at most {MAX_PIXELS} are read")
        tick, shown, end = 0, None, 0.0
        reformatter = VideoReformatter()  # one for all frames: a new one for each would take ten times the decoding
        try:
            for frame in container.decode(stream):
                if frame.is_corrupt or frame.time is None or abs(frame.time - _start(stream) - end) > MAX_GAP:
                    raise ValueError(f"{path}: damaged video after frame {tick} (its picture or its timestamp)")
                start = frame.time - _start(stream)
                while shown is not None and tick < round(start * FPS):  # the last frame stands until this one
                    yield shown
                    tick += 1
                shown = reformatter.reformat(frame, format=pixels).to_ndarray()
                shown = np.ascontiguousarray(np.rot90(shown, round(frame.rotation / 90)))
                end = start + float(1 / (stream.average_rate or FPS))
        except av.FFmpegError as error:
            raise ValueError(f"{path}: damaged video after frame {tick} ({error})") from None
        while shown is not None and tick < round(end * FPS):
            yield shown
            tick += 1


def load_video(path):
    """The frames of a video at 25 fps as grey (T, H, W) uint8."""
    frames = list(video_frames(path))
    if not frames:
        raise ValueError(f"{path}: no frame could be decoded")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"{path}: the size of its frames changes")
    return np.stack(frames)


def load_audio(path):
    """The first audio track as float32 (S,), 16 kHz mono, starting when the video starts."""
    container, stream = _open(path, "audio")
    with container:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
        try:
            chunks = [out.to_ndarray()[0] for frame in container.decode(stream) for out in resampler.resample(frame)]
            chunks += [out.to_ndarray()[0] for out in resampler.resample(None)]
        except av.FFmpegError as error:
            raise ValueError(f"{path}: damaged audio ({error})") from None
        if not chunks:
            raise ValueError(f"{path}: no audio could be decoded")
        samples = np.concatenate(chunks)
        video = container.streams.video
        late = round((_start(stream) - _start(video[0])) * SAMPLE_RATE) if video else 0
    if not (np.abs(samples) < 1e6).all():
        raise ValueError(f"{path}: NaN, infinite or endlessly loud audio samples")
    if abs(late) > MAX_GAP * SAMPLE_RATE:
        raise ValueError(f"{path}: sound and picture start {late / SAMPLE_RATE:.0f} s apart")
    return np.pad(samples, (late, 0)) if late > 0 else samples[-late:]


def synthetic_media(clip, kind):
    """As `load_media`, of the built-in corpus."""
    return synthetic.render(clip.id, kind)


def fit_audio(samples, length):
    """Cut or zero-pad (S,) to `length` samples. The one place where audio and video get one length."""
    return np.pad(samples[:length], (0, max(length - len(samples), 0)))


def load_media(clip, kind):
    """ "audio" (S,) float32 or "video" (T, H, W) uint8 of a clip on disk, at the length its manifest states.

    Where a `.wav` lies beside the file (auto_avsr's layout, prepare.py's, too), it has the sound.
    """
    if kind == "audio":
        wav = clip.path.with_suffix(".wav")
        audio, length = load_audio(wav if wav.is_file() else clip.path), clip.frames * SAMPLES_PER_FRAME
        if abs(len(audio) - length) > SAMPLE_RATE // 5:  # codecs pad
            seconds = [round(samples / SAMPLE_RATE, 2) for samples in (len(audio), length)]
            raise ValueError(f"{clip.path}: {seconds[0]} s of audio, but its manifest says {seconds[1]} s")
        return fit_audio(audio, length)
    frames = load_video(clip.path)
    if abs(len(frames) - clip.frames) > 1:  # containers round: one frame more or less is no fault
        raise ValueError(f"{clip.path}: {len(frames)} frames at 25 fps, but its manifest says {clip.frames}")
    height, width = frames.shape[1:3]
    if min(height, width) < CROP or max(height, width) > MAX_REGION:
        raise ValueError(
            f"{clip.path}: {width}x{height} pixels, but mouth regions of {CROP} to {MAX_REGION} are expected; "
            "prepare.py cuts them out"
        )
    return frames[np.minimum(np.arange(clip.frames), len(frames) - 1)]


# --- transforms --------------------------------------------------------------------------------------------------


def transform_video(frames, rng=None):
    """(T, H, W) grey, 0 to 255 -> (T, 1, 88, 88) float32, normalised for AV-HuBERT.

    The centre is cut out; with `rng` (a random.Random) a random place, flipped half of the time.
    """
    height, width = frames.shape[1:3]
    if min(height, width) < CROP:
        raise ValueError(f"frames of {width}x{height} pixels: mouth regions of at least {CROP}x{CROP} are expected")
    top, left = round((height - CROP) / 2), round((width - CROP) / 2)
    if rng is not None:
        top, left = rng.randint(0, height - CROP), rng.randint(0, width - CROP)
    video = torch.from_numpy(frames[:, top : top + CROP, left : left + CROP]).float() / 255
    video = (video - GREY_MEAN) / GREY_STD
    if rng is not None and rng.random() < 0.5:
        video = video.flip(-1)
    return video.unsqueeze(1)


def transform_audio(samples):
    """(S,) float32 normalised to mean 0 and variance 1 over the whole clip."""
    audio = torch.from_numpy(samples).float()
    return F.layer_norm(audio, audio.shape, eps=1e-8)


def mask_spans(x, rate, rng, longest=0.4):
    """x (T, ...) with spans of up to `longest` seconds set to 0, one per second of the clip, at random places, as in
    auto_avsr: of the sound before noise is added, of the video before it is normalised, where 0 is black."""
    x = x.copy()
    for _ in range(math.ceil(len(x) / rate)):
        start = rng.randrange(len(x))
        x[start : start + rng.randint(0, int(longest * rate))] = 0
    return x


def add_noise(samples, noise, snr, rng):
    """Add a random stretch of `noise` (looped) at `snr` dB: the ratio of the mean powers over the whole clip."""
    start = rng.randrange(len(noise))
    stretch = np.take(noise, np.arange(start, start + len(samples)), mode="wrap")
    power = np.mean(stretch.astype(np.float64) ** 2)
    if power == 0:
        raise ValueError("the noise is silent")
    gain = math.sqrt(np.mean(samples.astype(np.float64) ** 2) / power / 10 ** (snr / 10))
    return (samples + gain * stretch).astype(np.float32)


def make_babble(clips, load, seconds=30, voices=20, seed=0):
    """Babble as float32 (S,): `voices` chains of utterances drawn from `clips` with random gains, summed."""
    rng = random.Random(seed)
    babble = np.zeros(seconds * SAMPLE_RATE, np.float32)
    for _ in range(voices):
        at = 0
        while at < len(babble):
            voice = load(rng.choice(clips), "audio")[: len(babble) - at]
            babble[at : at + len(voice)] += rng.uniform(0.5, 1.5) * voice
            at += len(voice)
    return babble


# --- dataset and batches -----------------------------------------------------------------------------------------


class ClipDataset(Dataset):
    """Clips as dicts: id, text, and for what the task needs audio (S,) and video (1, T, 88, 88), both float32.

    train: random crops and flips and, from epoch `clean_epochs` on, masked spans and `noise` at an SNR of TRAIN_SNRS;
    set `epoch` for new draws. Otherwise nothing is random but the stretch of `noise` added at `snr` dB (None: clean),
    drawn from the clip's id.
    """

    def __init__(self, clips, load, task, train=False, noise=None, snr=None, seed=0, clean_epochs=0):
        if snr is not None and noise is None:
            raise ValueError(f"an SNR of {snr} dB needs a noise")
        self.clips, self.load, self.kinds, self.noise, self.snr = clips, load, TASKS[task], noise, snr
        self.train, self.seed, self.epoch, self.clean_epochs = train, seed, 0, clean_epochs

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        clip = self.clips[index]
        rng = random.Random(f"{self.seed} {self.epoch} {clip.id}")
        hard = self.train and self.epoch >= self.clean_epochs
        item = {"id": clip.id, "text": clip.text}
        if "audio" in self.kinds:
            samples = self.load(clip, "audio")
            samples = mask_spans(samples, SAMPLE_RATE, rng) if hard else samples
            snr = rng.choice(TRAIN_SNRS) if hard else self.snr
            if snr is not None and self.noise is not None:  # 0 dB is an SNR
                samples = add_noise(samples, self.noise, snr, rng)
            item["audio"] = transform_audio(samples)
        if "video" in self.kinds:
            frames = self.load(clip, "video")
            frames = mask_spans(frames, FPS, rng) if hard else frames
            item["video"] = transform_video(frames, rng if self.train else None).transpose(0, 1)
        return item


def collate(items):
    """Zero-pad clips to one batch: {ids, texts, audio (B, S), audio_lengths (B,), video (B, 1, T, 88, 88), ...}."""
    batch = {"ids": [item["id"] for item in items], "texts": [item["text"] for item in items]}
    for kind, time in (("audio", 0), ("video", 1)):
        if kind in items[0]:
            clips = [item[kind] for item in items]
            lengths = torch.tensor([clip.shape[time] for clip in clips])
            padding = [[0, 0] * (clip.ndim - 1 - time) + [0, int(lengths.max()) - clip.shape[time]] for clip in clips]
            batch[kind] = torch.stack([F.pad(clip, pad) for clip, pad in zip(clips, padding)])
            batch[f"{kind}_lengths"] = lengths
    return batch


class FrameBatches(Sampler):
    """Batches of clips of similar length with at most `max_frames` video frames a process, padding included (a longer
    clip makes a batch of its own, and a last one with too few clips for all processes joins the one before).

    Each epoch shuffles the clips within buckets of similar length, and then the batches; both depend on (seed, epoch)
    alone. Under DDP a global batch of `world` times the size is dealt out clip by clip, so that all processes take the
    same number of steps and no clip is lost or repeated. `skip` leaves out the first batches (to resume).
    """

    def __init__(self, frames, max_frames, shuffle=True, seed=0, rank=0, world=1):
        if world > len(frames):
            raise ValueError(f"{len(frames)} clips cannot be shared by {world} processes")
        self.frames, self.max_frames, self.shuffle, self.seed = frames, max_frames, shuffle, seed
        self.rank, self.world, self.epoch, self.skip = rank, world, 0, 0

    def batches(self):
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.frames)))
        if self.shuffle:
            rng.shuffle(order)
        bucket = max(self.max_frames // 20, 1)  # lengths within a bucket count as equal
        order.sort(key=lambda i: self.frames[i] // bucket if self.shuffle else self.frames[i])
        batches, longest = [[]], 0
        for i in order:
            longest = max(longest, self.frames[i])
            full = longest * math.ceil((len(batches[-1]) + 1) / self.world) > self.max_frames
            if full and len(batches[-1]) >= self.world:
                batches.append([])
                longest = self.frames[i]
            batches[-1].append(i)
        if len(batches[-1]) < self.world:  # every process needs a clip
            short = batches.pop()
            batches[-1] += short
        if self.shuffle:
            rng.shuffle(batches)
        return batches

    def __len__(self):
        return len(self.batches()) - self.skip

    def __iter__(self):
        for batch in self.batches()[self.skip :]:
            yield batch[self.rank :: self.world]


def make_loader(dataset, batches, workers):
    """The batches of a ClipDataset, in order, read ahead by `workers` processes."""
    # A generator of its own: the iterator draws a seed, which would change the global state (and with it, dropout).
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, worker_init_fn=leave_group,
        generator=torch.Generator(),
    )  # fmt: skip


def leave_group(worker):
    """Leave the process group, to which a terminal sends Ctrl-C: the training ends after a whole step and needs its
    workers until then."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


# --- checking ----------------------------------------------------------------------------------------------------


def check_corpus(folder, task="avsr", clean=False):
    """[what is wrong] with the manifests of a folder and all their clips, each of which is read.

    clean: SPLIT.csv becomes SPLIT.csv.old, and SPLIT.csv keeps the rows without a fault.
    """

    def check(clip):
        if isinstance(clip, ValueError):
            return str(clip)
        try:
            for kind in TASKS[task]:
                load_media(clip, kind)
        except (ValueError, OSError) as error:
            return str(error)

    manifests = [Path(folder) / f"{split}.csv" for split in ("train", "valid", "test")]
    manifests = [path for path in manifests if path.exists()]
    if not manifests:
        raise FileNotFoundError(f"{folder}: neither train.csv, valid.csv nor test.csv")
    for old in (Path(f"{path}.old") for path in manifests):
        if clean and old.exists():
            raise ValueError(f"{old}: the rows of an earlier --clean are kept there; move it away first")
    faults = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding needs no interpreter lock
        for path in manifests:
            rows = manifest_rows(path)
            found = list(tqdm(pool.map(check, [clip for _, clip in rows]), path.name, len(rows), unit="clip"))
            faults += filter(None, found)
            if clean and any(found):
                with open(path, newline="", encoding="utf-8-sig") as file:
                    header = [HEADER] * (next(row for row in csv.reader(file) if row) == HEADER)
                path.replace(f"{path}.old")
                with open(path, "w", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerows(header + [row for (row, _), fault in zip(rows, found) if not fault])
    return faults


def main():
    parser = argparse.ArgumentParser(
        description="Read all clips of train.csv, valid.csv and test.csv; list all faults."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", choices=TASKS, default="avsr", help="what is read: asr, vsr or avsr (default)")
    parser.add_argument(
        "--clean", action="store_true", help="take faulty clips out of SPLIT.csv; SPLIT.csv.old keeps them"
    )
    args = parser.parse_args()
    faults = check_corpus(args.folder, args.task, args.clean)
    print(*faults, f"{len(faults)} faults", sep="\n")
    sys.exit(len(faults) > 0)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
