"""Decoding: the pictures and the sound of any media file, both on the picture's clock.

    frames = load_video("talk.mp4")              # (T, H, W) uint8 at 25 a second, upright, square pixels
    audio = load_audio(find_sound("talk.mp4"))   # (S,) float32, 16 kHz mono, 640 samples a frame

Everything stands at the time that its file states, whatever the file's own rates are. What cannot be read is an
InputError that names the file.
"""

from contextlib import contextmanager
from itertools import chain, groupby, product
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from tools.errors import InputError

SAMPLE_RATE = 16_000
FPS = 25
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS  # 640
MAX_PIXELS = 4096 * 2304  # a larger picture is refused: one 100-megapixel frame can fill the memory
MAX_GAP = 60  # seconds without a frame, or between the starts of sound and picture: more is a damaged timestamp
MAX_DRIFT = 0.04  # seconds between the samples so far and a timestamp: less is rounding, more is a hole


@contextmanager
def opened(path, kind):
    """(container, its first stream of that kind). Whatever fails while it is open becomes an InputError: libraries
    raise dozens of classes on damaged files, and none of them names the file."""
    fault = "not a readable media file"
    try:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file")
        with av.open(str(Path(path).absolute())) as container:  # "12:30.mp4" would be of the protocol "12"
            streams = getattr(container.streams, kind)
            if not streams:
                raise InputError(f"{path}: no {kind} track")
            if streams[0].codec_context is None:
                raise InputError(f"{path}: unknown {kind} codec")
            fault = f"damaged {kind}"
            yield container, streams[0]
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: {fault} ({type(error).__name__}: {error})") from error


def start_of(stream):
    return float((stream.start_time or 0) * stream.time_base)


# --- pictures ----------------------------------------------------------------------------------------------------


def video_frames(path, pixels="gray"):
    """Yield the frames of a video, 25 a second whatever its own rate: grey (H, W) uint8, or "rgb24" (H, W, 3).

    Each tick shows the frame that is nearest in time. Where two frames lie more than a tick apart, the first
    stands until half a tick before the second. A file without timestamps (a bare .h264) has its stated rate.
    """
    with opened(path, "video") as (container, stream):
        wide = stream.sample_aspect_ratio or 1  # how much wider than high a pixel is, on a DVD for example
        if not 0 < max(1, wide) * stream.width * stream.height <= MAX_PIXELS:
            raise InputError(
                f"{path}: {round(stream.width * wide)}x{stream.height} pixels, at most {MAX_PIXELS} are read"
            )
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # where the file's header lies
        rate = (stream.guessed_rate if stream.start_time is None else stream.average_rate) or FPS
        start = start_of(stream)
        tick, shown, size, before, end = 0, None, None, 0.0, 0.0  # `before`, `end`: when the last frame starts and ends
        reformatter = VideoReformatter()  # one for all frames: a new one for each would take ten times the decoding
        for frame in container.decode(stream):
            stamp = frame.dts if container.format.name == "avi" else frame.pts  # AVI states no time of display
            time = end if stamp is None else float(stamp * stream.time_base) - start
            if frame.is_corrupt or abs(time - end) > MAX_GAP:
                raise InputError(f"{path}: damaged video after frame {tick} (its picture or its timestamp)")
            size = size or (frame.width, frame.height)
            if (frame.width, frame.height) != size:
                raise InputError(f"{path}: the size of its frames changes after frame {tick}")
            while shown is not None and tick < change(before, time):
                yield shown
                tick += 1
            square = reformatter.reformat(frame, round(frame.width * wide), frame.height, pixels)
            shown = upright(square.to_ndarray(), frame, path)
            before, end = time, time + float(1 / rate)
        if shown is None:
            raise InputError(f"{path}: no frame could be decoded")
        while tick < change(before, end):
            yield shown
            tick += 1


def change(before, time):
    """When the frame at `time` replaces the one at `before`, in ticks of 1/25 s: halfway between the two, but at most half a
    tick before `time`."""
    return FPS * (time - min(time - before, 1 / FPS) / 2)


def upright(picture, frame, path):
    """The picture turned and mirrored as the file's display matrix says: phones store portraits lying, selfies
    mirrored."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # this PyAV does not know other data beside it, and gives only the turn
        return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))
    if matrix is None:
        return picture
    axes = np.frombuffer(bytes(matrix), np.int32).reshape(3, 3)[:2, :2] / 2**16  # where steps right and down lead
    if abs(axes[0, 1]) > abs(axes[0, 0]):  # right becomes up or down
        picture, axes = picture.swapaxes(0, 1), axes[::-1]
    right, down = np.diag(axes)
    if abs(axes - np.diag([right, down])).max() >= 0.02 * min(abs(right), abs(down)):
        raise InputError(f"{path}: shown neither upright nor by quarter turns (its display matrix); convert it first")
    return np.ascontiguousarray(picture[:: int(np.sign(down)), :: int(np.sign(right))])


def load_video(path):
    """The frames of a video at 25 fps as grey (T, H, W) uint8."""
    return np.stack(list(video_frames(path)))


# --- sound -------------------------------------------------------------------------------------------------------


def find_sound(path):
    """The file with the sound of a clip: x.wav beside x.mp4 if it is there (auto_avsr's layout), else x.mp4 itself."""
    path = Path(path)
    beside = (path.parent / (path.stem + "".join(suffix)) for suffix in product(".", "wW", "aA", "vV"))
    return next((wav for wav in beside if wav.is_file()), path)


def load_audio(path):
    """The first audio track as float32 (S,), 16 kHz mono. It starts when the video starts, if the file has one. Samples
    stand at their time; a hole is silence."""
    with opened(path, "audio") as (container, stream):
        start = start_of((*container.streams.video, stream)[0])
        late = start_of(stream) - start
        if abs(late) > MAX_GAP:
            raise InputError(f"{path}: sound and picture start {late:.0f} s apart")
        pieces = []  # (at which sample it starts, its samples)
        for (time, *_), frames in groupby(
            continuous_runs(container.decode(stream), start, late, path), lambda pair: pair[0]
        ):
            resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
            frames = chain((frame for _, frame in frames), [None])  # None flushes the resampler
            chunks = [out.to_ndarray()[0] for frame in frames for out in resampler.resample(frame)]
            pieces.append((round(time * SAMPLE_RATE), np.concatenate([np.zeros(0, np.float32), *chunks])))
        first = min([0, *(at for at, _ in pieces)])
        samples = np.zeros(max((at + len(piece) for at, piece in pieces), default=0) - first, np.float32)
        for at, piece in pieces:
            samples[at - first :][: len(piece)] = piece
    samples = samples[-first:]  # without what was heard before the picture
    if not len(samples):
        raise InputError(f"{path}: no sound could be decoded")
    if not (np.abs(samples) < 1e6).all():
        raise InputError(f"{path}: NaN, infinite or endlessly loud audio samples")
    return samples


def continuous_runs(frames, start, end, path):
    """Yield (run, frame): a run, named by its start in seconds and its format, has one format and no hole. It starts
    at `end`, in seconds after `start`, unless its timestamp differs by more than MAX_DRIFT."""
    run = None
    for frame in frames:
        drift = 0 if frame.time is None else frame.time - start - end
        if abs(drift) > MAX_GAP:
            raise InputError(f"{path}: damaged audio, its timestamps jump by {drift:.0f} s after {end:.0f} s")
        form = frame.format.name, frame.layout.name, frame.sample_rate
        if abs(drift) > MAX_DRIFT:
            run, end = None, end + drift
        if run is None or run[1:] != form:
            run = end, *form
        yield run, frame
        end += frame.samples / frame.sample_rate


def fit_audio(samples, length):
    """Cut or zero-pad (S,) to `length` samples. The one place where audio and video get one length."""
    return np.pad(samples[:length], (0, max(length - len(samples), 0)))
