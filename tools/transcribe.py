"""Talking-face clips to text: any container, codec, size, frame rate and sample rate.

    python -m tools.transcribe RUN talk.mp4 more.mkv               # a line a clip: its name, a tab, its text
    python -m tools.transcribe RUN talk.mp4 --json                 # {"clip", "text", "segments"} or {"clip", "error"}

RUN is a folder written by train.py or LlamaSMoP.save. Its task decides what is read: the sound, the lips or both. The
largest face is found and followed, and its mouth cut, as prepare.py does (dlib: pip install -r requirements-extra.txt).
If talk.wav lies beside talk.mp4, it is the sound. Whisper hears 30 s: a longer clip is cut at pauses (without sound,
into equal pieces) and the texts are joined; --longest 5 suits a model that only knows short clips. What cannot be
transcribed (no face, a still picture, no sound, silence, ...) is said on stderr; the other clips go on, and the exit
status is 1.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import collate, crop_video, transform_audio
from model import LlamaSMoP
from tools.errors import InputError, run_command
from tools.media import FPS, SAMPLES_PER_FRAME
from tools.prepare import is_silent, read_clip
from tools.run import join_processes
from whisper_encoder import MAX_SECONDS

PAUSE = 5  # frames (0.2 s) whose power is compared: a pause between words, not the closure of a plosive


def find_cuts(frames, audio=None, longest=MAX_SECONDS * FPS):
    """Frame numbers [0, ..., frames] that cut a clip into pieces of at most `longest` frames.

    With audio (frames * 640,), at its quietest 0.2 s in the second half of what a piece may be; without, equal pieces.
    """
    if audio is None:
        pieces = math.ceil(frames / longest)
        return [round(i * frames / pieces) for i in range(pieces + 1)]
    power = np.convolve((audio.reshape(frames, -1) ** 2).mean(1), np.ones(PAUSE), "same")  # (frames,)
    cuts = [0]
    while frames - cuts[-1] > longest:
        first, last = cuts[-1] + longest // 2, min(cuts[-1] + longest, frames - FPS)  # no last piece of under a second
        cuts.append(first + int(power[first : last + 1].argmin()))
    return [*cuts, frames]


def transcribe(model, path, num_beams=1, longest=MAX_SECONDS):
    """[{"start": s, "end": s, "text"}] of the pieces of a file."""
    clip = read_clip(path, model.modalities)
    frames = len(clip["video"]) if "video" in clip else len(clip["audio"]) // SAMPLES_PER_FRAME
    cuts = find_cuts(frames, clip.get("audio"), longest * FPS)
    segments = []
    for start, end in zip(cuts, tqdm(cuts[1:], desc=Path(path).name, unit="piece", leave=False, disable=None)):
        item, silent = {"id": str(path), "text": ""}, False
        if "audio" in clip:
            audio = clip["audio"][start * SAMPLES_PER_FRAME : end * SAMPLES_PER_FRAME]
            item["audio"], silent = transform_audio(audio), is_silent(audio)
        if "video" in clip:
            item["video"] = crop_video(clip["video"][start:end])
        text = "" if silent else model.generate(collate([item]), num_beams)[0]  # normalised silence would be noise
        segments.append({"start": start / FPS, "end": end / FPS, "text": text})
    return segments


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, help="folder written by train.py or LlamaSMoP.save")
    add("clips", nargs="+", metavar="clip", help="media file")
    add("--json", action="store_true", help="print an object a line, with the times of the pieces")
    add("--longest", type=int, default=MAX_SECONDS, choices=range(2, MAX_SECONDS + 1), metavar="SECONDS",
        help=f"cut longer clips at pauses, 2 to {MAX_SECONDS} (default: {MAX_SECONDS})")  # fmt: skip
    add("--num-beams", type=int, default=1, help="1 is greedy (published: 15)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="any of torch's")
    args = parser.parse_args()

    model = LlamaSMoP.load(args.run).to(join_processes(args.device)[2])
    failed = False
    for path in args.clips:
        try:
            segments = transcribe(model, path, args.num_beams, args.longest)
            result = {"clip": path, "text": " ".join(s["text"] for s in segments if s["text"]), "segments": segments}
        except InputError as error:  # one bad clip must not end the run
            failed = True
            result = {"clip": path, "error": str(error)}
            print(f"error: {error}", file=sys.stderr)
        if args.json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
        elif "text" in result:
            print(f"{path}\t{result['text']}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    run_command(main)
