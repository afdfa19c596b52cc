"""Raw talking-face clips to mouth regions, sound and manifests.

    pip install -r requirements-extra.txt                 # dlib and its landmark model, also for transcribe.py
    python -m tools.prepare RAW_DIR OUT_DIR               # manifests, folders of splits, LRS2 or LRS3
    python -m tools.prepare --grid RAW_DIR OUT_DIR        # GRID as its makers publish it

Follows AV-HuBERT's preparation (its `align_mouth.py`): dlib's 68 landmarks on every frame, smoothed over 12
frames, a similarity transform of five stable points onto a mean face, and a 96x96 cut around the mouth.

OUT_DIR receives a manifest for each split, a grey 25 fps `.mp4` and a 16 kHz mono `.wav` for each clip, `sheet.png`
(the middle frame of up to 400 clips: look at it) and `failures.csv`. Clips that are already there are kept, so a
killed run continues where it stopped. tools/README.md shows what RAW_DIR may look like.
"""

import argparse
import importlib.util
import math
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
from matplotlib.image import imsave
from tqdm import tqdm

from data import HEADER, OTHERS, write_table
from tools.corpora import find_clips
from tools.errors import InputError, run_command
from tools.media import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, find_sound, fit_audio, load_audio, load_video, video_frames

SIZE = 96  # side of the mouth region in pixels; the model sees 88 of it
FACE = 256  # side of the aligned face that the region is cut from
WINDOW = 12  # frames over which landmarks are averaged
STABLE = [33, 36, 39, 42, 45]  # nose base and eye corners: they hardly move in speech
TEMPLATE = np.array([[128.87, 137.30], [92.52, 94.37], [112.77, 94.94], [145.53, 94.53], [166.68, 93.57]])
MOUTH = slice(48, 68)
MIN_FACES = 0.5  # a clip with a face in fewer than half of its frames is a failure
FOLLOWED = 100  # pixels to which a followed face is scaled: the detector needs 80, and more only take longer
SILENCE = 1e-3  # sound whose samples all stay below (-60 dBFS) is silent
TILES = 400  # clips on sheet.png


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


def find_near(frame, last):
    """Boxes of the faces around `last`, the box of the previous face, found on a small picture of that place."""
    dlib, detect, _ = _dlib()
    margin, scale = last.width() // 2, FOLLOWED / last.width()
    x, y = max(last.left() - margin, 0), max(last.top() - margin, 0)
    window = np.ascontiguousarray(frame[y : last.bottom() + margin, x : last.right() + margin])
    boxes = detect(dlib.resize_image(window, scale), 0)
    return [dlib.translate_rect(dlib.scale_rect(box, 1 / scale), dlib.point(x, y)) for box in boxes]


def find_landmarks(frames):
    """68 landmarks of one face on every frame: (T, 68, 2) int16 as (x, y), -1 where no face was found.

    The largest face is taken first and then followed: each frame is searched around the previous face (which is far
    quicker), and as a whole where that finds nothing. A face elsewhere takes its place only after WINDOW frames
    without it. `frames` is an iterable of (H, W, 3) uint8 arrays: in grey the detector misses faces that it finds in
    colour.
    """
    _, detect, predict = _dlib()
    found, last, lost = [], None, 0  # lost: frames since the last face
    for frame in map(np.ascontiguousarray, frames):  # dlib reads freed memory otherwise
        faces = find_near(frame, last) if last else []
        if not faces:
            upsample = int(min(frame.shape[:2]) < 480)  # the detector misses faces of under 80 pixels
            faces = list(detect(frame, upsample))
            if last and lost < WINDOW:
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
    seen, ticks = np.flatnonzero(has_face(landmarks)), np.arange(len(landmarks))
    flat = landmarks.astype(np.float64).reshape(len(landmarks), -1)
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


# --- reading and writing ---------------------------------------------------------------------------------------------


def find_mouths(path):
    """Mouth regions (T, 96, 96) uint8 of a video file."""
    landmarks = find_landmarks(video_frames(path, "rgb24"))
    if len(landmarks) < 2:
        raise InputError(f"{path}: a still picture, or one frame of video; a moving mouth is needed")
    share = has_face(landmarks).mean()
    if share < MIN_FACES:
        small = max(next(video_frames(path)).shape) <= 2 * SIZE
        raise InputError(
            f"{path}: {f'a face in only {share:.0%}' if share else 'no face in any'} of {len(landmarks)} frames"
            f"{'; is it a mouth region already? The whole face is expected' if small else ''}"
        )
    return cut_mouths(video_frames(path), landmarks)


def is_silent(samples):
    return (np.abs(samples) < SILENCE).all()


def read_clip(path, modalities=("audio", "video")):
    """{"audio": (frames * 640,) float32, "video": (frames, 96, 96) uint8} of a talking face, or one of them."""
    clip = {}
    if "audio" in modalities:
        samples = load_audio(find_sound(path))
        if is_silent(samples):
            raise InputError(f"{path}: silent, no sound above {20 * math.log10(SILENCE):.0f} dBFS")
        frames = math.ceil(len(samples) / SAMPLES_PER_FRAME)
    if "video" in modalities:
        clip["video"] = find_mouths(path)
        frames = len(clip["video"])
    if "audio" in modalities:
        sound, picture = len(samples) / SAMPLE_RATE, frames / FPS
        if abs(sound - picture) > 1:  # codecs pad, but not so much
            raise InputError(f"{path}: {sound:.1f} s of sound, but {picture:.1f} s of video")
        clip["audio"] = fit_audio(samples, frames * SAMPLES_PER_FRAME)
    return clip


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
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", "NONE"))  # mono, 16 bits
        file.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())


def write_sheet(path, tiles, columns=20):
    """Write (N, H, W) uint8 tiles as one PNG."""
    tiles = np.stack([*tiles, *[np.zeros_like(tiles[0])] * (-len(tiles) % columns)])
    height, width = tiles.shape[1:]
    sheet = tiles.reshape(-1, columns, height, width).transpose(0, 2, 1, 3).reshape(-1, columns * width)
    imsave(path, sheet, cmap="gray", vmin=0, vmax=255)


# --- the command -------------------------------------------------------------------------------------------------


def prepare_clip(source, video, with_tile):
    """Prepare one clip: (number of frames, its middle mouth or None), or the InputError that says why not."""
    audio = video.with_suffix(".wav")
    try:
        if not (video.is_file() and audio.is_file()):
            clip = read_clip(source)
            video.parent.mkdir(parents=True, exist_ok=True)
            for path, write, content in ((audio, write_audio, clip["audio"]), (video, write_video, clip["video"])):
                partial = path.with_suffix(path.suffix + ".partial")
                write(partial, content)
                os.replace(partial, path)  # a killed run leaves no half-written clip behind
        mouths = load_video(video)
        return len(mouths), mouths[len(mouths) // 2] if with_tile else None
    except InputError as error:  # one bad clip must not end the run: it is listed, counted and fails the command
        return error


def prepare_clips(clips, out, workers):
    """Prepare all of [(split, id, path, text)]: (rows of the manifests by split, failures, tiles of the sheet)."""
    rows, failures, tiles = {split: [] for split, *_ in clips}, [], []
    step = math.ceil(len(clips) / TILES)
    pool = ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        videos = [Path("clips", split, f"{name}.mp4") for split, name, *_ in clips]
        jobs = [
            pool.submit(prepare_clip, path, out / video, i % step == 0)
            for i, ((_, _, path, _), video) in enumerate(zip(clips, videos))
        ]
        for (split, name, _, text), video, job in zip(clips, videos, tqdm(jobs, unit="clip")):
            result = job.result()
            if isinstance(result, InputError):
                failures.append((split, name, str(result)))
                continue
            frames, tile = result
            rows[split].append((name, video, frames, text))
            if tile is not None:
                tiles.append(tile)
    finally:
        pool.shutdown(cancel_futures=True)
    return rows, failures, tiles


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("raw_dir", type=Path, help="folder of the raw corpus")
    add("out_dir", type=Path, help="folder to write")
    add("--grid", action="store_true", help="RAW_DIR is GRID: s1/*.mpg, alignments/s1/*.align")
    add("--talkers", nargs="+", default=(), metavar="s1", help="only these talkers of GRID")
    add("--others", nargs="+", default=(), metavar="s2", help="talkers of GRID for others.csv, to test on unknown ones")
    add("--valid-list", type=Path, metavar="FILE", help="the clips of trainval/ that are for validation, one a line")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    add("--allow-failures", type=int, default=0, metavar="N", help="exit with 0 if at most N clips fail")
    return parser.parse_args()


def main():
    args = parse_args()
    raw, out = args.raw_dir, args.out_dir
    if raw.resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError(f"{out}: OUT_DIR must lie outside RAW_DIR, whose files it would replace or join")
    corpus = find_clips(raw, args.grid, args.talkers, args.others, args.valid_list)
    print(f"{len(corpus.clips)} clips found, {len(corpus.failures)} more that failures.csv will name")
    for sentence in corpus.skipped:
        print(sentence, file=sys.stderr)
    _dlib()  # complain about a missing package before any work
    out.mkdir(parents=True, exist_ok=True)

    rows, failures, tiles = prepare_clips(corpus.clips, out, args.workers)
    failures = corpus.failures + failures
    if OTHERS not in rows:  # those of an earlier call may now be in the train split
        (out / f"{OTHERS}.csv").unlink(missing_ok=True)
    for split in rows:
        write_table(out / f"{split}.csv", HEADER, rows[split])
        print(f"{split}.csv: {len(rows[split])} clips")
    write_table(out / "failures.csv", ("split", "id", "reason"), failures)
    for split, name, reason in failures:
        print(f"failed: {split}/{name}: {reason}", file=sys.stderr)
    if tiles:
        write_sheet(out / "sheet.png", tiles)
    prepared = sum(map(len, rows.values()))
    print(f"{prepared} clips prepared, {len(failures)} failed; look at {out / 'sheet.png'}")
    sys.exit(int(len(failures) > args.allow_failures))


if __name__ == "__main__":
    run_command(main)
