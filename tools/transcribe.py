"""Talking-face clips to text: any container, codec, size, frame rate and sample rate.

    python -m tools.transcribe RUN talk.mp4 more.mkv               # a line a clip: its name, a tab, its text
    python -m tools.transcribe RUN talk.mp4 --json                 # {"clip", "text", "segments"} or {"clip", "error"}
    python -m tools.transcribe RUN silent.mp4 --task vsr           # an avsr run, from the lips alone

RUN is a folder written by train.py or LlamaSMoP.save. The largest face is found and followed, and its mouth cut, as
prepare.py does (dlib: pip install -r requirements-extra.txt); asr needs no face. Where talk.wav lies beside talk.mp4,
as prepare.py writes it, it is the sound. A clip of more than 30 s, all that Whisper sees, is cut at pauses (without
sound, into equal pieces) and the texts are joined; --longest 5 suits a model that knows short clips alone. What cannot
be transcribed (no face, a still picture, no sound, silence, ...) is said on stderr; the other clips go on, and the exit
status is then 1.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (
    FPS,
    MAX_SECONDS,
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    TASKS,
    collate,
    fit_audio,
    load_audio,
    transform_audio,
    transform_video,
)
from eval import join_processes
from model import LlamaSMoP
from tools.prepare import find_mouths

PAUSE = 5  # frames (0.2 s) whose power is compared: a pause between words, not the closure of a plosive
SILENCE = 1e-3  # a piece whose samples all stay below (-60 dBFS) is silent


def read_clip(path, kinds):
    """{"audio": (frames * 640,) float32, "video": (frames, 96, 96) uint8} of a file, as far as `kinds` names them."""
    clip = {}
    if "audio" in kinds:
        hint = "; --task vsr reads the lips alone" if "video" in kinds else ""
        try:
            clip["audio"] = load_audio(path)
        except ValueError as error:
            raise ValueError(f"{error}{hint if 'audio track' in str(error) else ''}") from None
        if is_silent(clip["audio"]):
            raise ValueError(f"{path}: silent, no sound above {20 * math.log10(SILENCE):.0f} dBFS{hint}")
        frames = math.ceil(len(clip["audio"]) / SAMPLES_PER_FRAME)
    if "video" in kinds:
        clip["video"] = find_mouths(path)
        frames = len(clip["video"])
    if len(kinds) == 2 and abs(len(clip["audio"]) / SAMPLE_RATE - frames / FPS) > 1:  # codecs pad, but not so much
        seconds = f"{len(clip['audio']) / SAMPLE_RATE:.1f} s of sound, but {frames / FPS:.1f} s of video"
        raise ValueError(f"{path}: {seconds}; --task asr or vsr takes one of them")
    if "audio" in kinds:
        clip["audio"] = fit_audio(clip["audio"], frames * SAMPLES_PER_FRAME)
    return clip


def is_silent(audio):
    return np.abs(audio).max() < SILENCE


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


@torch.no_grad()
def transcribe(model, path, num_beams=1, longest=MAX_SECONDS):
    """[{"start": s, "end": s, "text"}] of the pieces of a file; a ValueError or FileNotFoundError names the file."""
    clip = read_clip(path, model.kinds)
    frames = len(clip["video"]) if "video" in clip else len(clip["audio"]) // SAMPLES_PER_FRAME
    cuts = find_cuts(frames, clip.get("audio"), longest * FPS)
    segments = []
    for start, end in zip(cuts, tqdm(cuts[1:], desc=Path(path).name, unit="piece", leave=False, disable=None)):
        item, text = {"id": str(path), "text": ""}, ""
        if "audio" in clip:
            audio = clip["audio"][start * SAMPLES_PER_FRAME : end * SAMPLES_PER_FRAME]
            item["audio"] = transform_audio(audio)
        if "video" in clip:
            item["video"] = transform_video(clip["video"][start:end]).transpose(0, 1)
        if "audio" not in clip or not is_silent(audio):  # of silence, normalising would make noise
            (text,) = model.generate(collate([item]), num_beams)
        segments.append({"start": start / FPS, "end": end / FPS, "text": text})
    return segments


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder written by train.py or LlamaSMoP.save")
    parser.add_argument("clips", nargs="+", metavar="clip", help="media file")
    parser.add_argument("--json", action="store_true", help="print an object a line, with the times of the pieces")
    parser.add_argument("--task", choices=TASKS, help="asr or vsr with a run of avsr (default: that of the run)")
    parser.add_argument(
        "--longest", type=int, default=MAX_SECONDS, metavar="SECONDS",
        help=f"cut longer clips at pauses, 2 to {MAX_SECONDS} (default: {MAX_SECONDS})",
    )  # fmt: skip
    parser.add_argument("--num-beams", type=int, default=1, help="1 is greedy (published: 15)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    args = parser.parse_args()
    for flag, value, least, most in (
        ("--longest", args.longest, 2, MAX_SECONDS),
        ("--num-beams", args.num_beams, 1, 100),
    ):
        if not least <= value <= most:
            parser.error(f"{flag} must be between {least} and {most}, got {value}")

    _, _, device = join_processes(args.device)
    model = LlamaSMoP.load(args.run, **{"task": args.task} if args.task else {}).place(device)
    trained = json.loads((args.run / "config.json").read_text())["task"]
    if model.config["task"] != trained:
        print(
            f"note: {args.run} was trained on {trained}, never on {args.task} alone: expect more errors",
            file=sys.stderr,
        )
    failed = False
    for path in args.clips:
        try:
            segments = transcribe(model, path, args.num_beams, args.longest)
            result = {"clip": path, "text": " ".join(s["text"] for s in segments if s["text"]), "segments": segments}
        except Exception as error:  # one bad clip must not end the run
            failed = True
            result = {"clip": path, "error": str(error) if path in str(error) else f"{path}: {error!r}"}
            print(f"error: {result['error']}", file=sys.stderr)
        if args.json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
        elif "text" in result:
            print(f"{path}\t{result['text']}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:  # a fault of the input: its sentence, without our call stack
        sys.exit(f"error: {error}")
