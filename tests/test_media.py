"""Decoding: pictures and sound stand at their time, whatever a file's rates, holes and shapes; bad files are named."""

import random
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest

from tools import media
from tools.errors import InputError
from tools.media import find_sound, load_audio, load_video, video_frames


def write_clip(path, pictures=(), sounds=(), fps=25, clock=None, rate=16000, layout="mono", codecs=("libx264", "aac"),
               options=None, sar=1, format=None, **container_options):  # fmt: skip
    """A media file of pictures [(seconds, grey (H, W))] and sounds [(seconds, samples (S,))], which may leave holes.

    clock: the unit of the pictures' times, in seconds; that of a constant rate by default.
    """
    with av.open(str(path), "w", format=format, options={k: str(v) for k, v in container_options.items()}) as container:
        streams = []
        if len(pictures):
            stream = container.add_stream(codecs[0], rate=fps, options=options or {"crf": "1"})
            stream.height, stream.width = pictures[0][1].shape
            stream.pix_fmt = "yuvj420p" if codecs[0] == "mjpeg" else "yuv420p"
            clock = Fraction(clock or 1 / Fraction(fps))
            stream.codec_context.time_base, stream.codec_context.sample_aspect_ratio = clock, Fraction(sar)
            frames = [av.VideoFrame.from_ndarray(picture, format="gray") for _, picture in pictures]
            for frame, (seconds, _) in zip(frames, pictures):
                frame.pts, frame.time_base = round(seconds / clock), clock
            streams.append((stream, frames))
        if len(sounds):
            stream = container.add_stream(codecs[1], rate=rate, layout=layout)
            channels, frames = stream.codec_context.channels, []
            for seconds, samples in sounds:
                samples = np.tile(np.asarray(samples, np.float32), (channels, 1))
                frames.append(av.AudioFrame.from_ndarray(samples, "fltp", layout))
                frames[-1].sample_rate, frames[-1].time_base = rate, Fraction(1, rate)
                frames[-1].pts = round(seconds * rate)
            streams.append((stream, frames))
        packets = [packet for stream, frames in streams for frame in (*frames, None) for packet in stream.encode(frame)]
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


def write_media(path, size=96, audio=True, video=True):
    """A second whose picture brightens with time, with a tone that starts in the middle."""
    pictures = [(t / 25, np.full((size, size), 40 + 160 * t / 25, np.uint8)) for t in range(25)]
    t = np.arange(16000) / 16000
    sounds = [(0, 0.3 * np.sin(2 * np.pi * 440 * t) * (t > 0.5))]
    return write_clip(path, pictures * video, sounds * audio)


def counted(times, size=96):
    """Pictures at these times, numbered by the greys of their halves, and which of them stand in a video."""
    levels = 16 + 10 * np.stack(np.divmod(np.arange(len(times)), 20), 1)
    greys = np.repeat(levels.astype(np.uint8), size // 2, 1)[:, None].repeat(size, 1)  # (T, H, W)
    halves = lambda video: video.reshape(len(video), size, 2, -1).mean((1, 3))  # noqa: E731
    return list(zip(times, greys)), lambda video: np.abs(halves(video)[:, None] - levels).sum(-1).argmin(1)


def blocks(samples, rate, size):
    return [(at / rate, samples[at : at + size]) for at in range(0, len(samples), size)]


def onset(samples):
    return np.flatnonzero(np.abs(samples) > 0.1)[0] / 16000


# --- pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jitter", [0, 0.35])
@pytest.mark.parametrize("fps", [25, 50, 100, 200, 24, 30, 60, Fraction(30000, 1001)])
def test_each_frame_is_the_nearest_in_time(tmp_path, fps, jitter):
    """jitter: of the timestamps, in frames, as phones have it."""
    rng = np.random.default_rng(0)
    times = np.arange(int(2 * fps)) / float(fps)
    times[1:] += rng.uniform(-jitter, jitter, len(times) - 1) / float(fps)
    pictures, which = counted(times)
    path = write_clip(tmp_path / "a.mp4", pictures, fps=fps, clock=Fraction(1, 90000), options={"crf": "0", "bf": "2"})
    shown = which(load_video(path))
    assert abs(len(shown) - 50) <= 1
    if fps % 25 == 0:
        assert np.array_equal(shown, np.arange(len(shown)) * (fps // 25))  # steps of 40 ms
    away = np.abs(times[:, None] - np.arange(len(shown)) / 25)  # (frames, ticks)
    nearest = away[shown, np.arange(len(shown))] <= away.min(0) + 1e-4
    assert (nearest | (away.min(0) > 0.02 - 1e-4)).all()  # or none is within half a tick


def test_variable_frame_rate_is_read_by_time(tmp_path):
    """As phones record: a frame stands until the next one, whenever that comes."""
    starts = [0, 2, 4, 14, 16, 20, 42, 48]  # fiftieths of a second
    pictures, which = counted([start / 50 for start in starts])
    path = write_clip(tmp_path / "a.mp4", pictures, fps=50)
    # How long the last frame stands is not in the file: as long as an average one.
    shown = which(load_video(path))
    expected = [max(i for i, start in enumerate(starts) if start <= 2 * tick) for tick in range(len(shown))]
    assert 25 <= len(shown) <= 28 and shown.tolist() == expected


@pytest.mark.parametrize("count, fps, ticks", [(101, 50, 51), (1, 100, 1), (6, 10, 15)])
def test_the_last_frame_stands_to_its_end(tmp_path, count, fps, ticks):
    pictures, which = counted(np.arange(count) / fps)
    shown = which(load_video(write_clip(tmp_path / "a.mp4", pictures, fps=fps)))
    assert len(shown) == ticks and shown[-1] == count - 1


@pytest.mark.parametrize("name, codec", [("a.h264", "libx264"), ("a.265", "libx265"), ("a.m2v", "mpeg2video")])
def test_bare_streams_have_their_stated_rate(tmp_path, name, codec):
    pictures, which = counted(np.arange(50) / 50)
    options = {"x265-params": "log-level=none:crf=4"} if codec == "libx265" else {"crf": "1", "qmin": "1"}
    shown = which(load_video(write_clip(tmp_path / name, pictures, fps=50, codecs=(codec, None), options=options)))
    assert abs(len(shown) - 25) <= 1 and set(np.diff(shown[2:-1])) == {2}  # an .m2v starts a frame late


def test_every_picture_of_an_avi_is_shown(tmp_path):
    """AVI knows no times of display; those that FFmpeg makes up for H.264 are of other frames."""
    pictures, which = counted(np.arange(50) / 25)
    shown = which(load_video(write_clip(tmp_path / "a.avi", pictures)))
    assert set(shown) == set(range(50)) and (np.diff(shown) >= 0).all()


QUARTERS = {  # a display matrix, and what it makes of a picture
    (1, 0, 0, 1): lambda x: x, (0, 1, -1, 0): lambda x: np.rot90(x, -1), (-1, 0, 0, -1): lambda x: x[::-1, ::-1],
    (0, -1, 1, 0): np.rot90, (-1, 0, 0, 1): lambda x: x[:, ::-1], (1, 0, 0, -1): lambda x: x[::-1],
    (0, 1, 1, 0): np.transpose, (0, -1, -1, 0): lambda x: x[::-1, ::-1].T,
}  # fmt: skip


def write_turned(folder, a, b, c, d):
    """A file of one picture with its bright corner at the top left, whose display matrix begins with a b; c d."""
    picture = np.zeros((64, 128), np.uint8)
    picture[:24, :40] = 200
    content = bytearray(write_clip(folder / "lying.mp4", [(t / 25, picture) for t in range(3)]).read_bytes())
    matrix = content.index(b"tkhd") + 44  # of the track, in 16.16 (and 2.30) fixed point
    values = (round(x * 2**16) for x in (a, b, 0, c, d, 0, 0, 0))
    content[matrix : matrix + 36] = struct.pack(">9i", *values, 1 << 30)
    (folder / "held.mp4").write_bytes(content)
    return folder / "held.mp4"


@pytest.mark.parametrize("matrix", QUARTERS)
def test_pictures_are_turned_and_mirrored_upright(tmp_path, matrix):
    held, lying = load_video(write_turned(tmp_path, *matrix)), load_video(tmp_path / "lying.mp4")
    assert lying.shape == (3, 64, 128) and lying[0, 10, 10] > 150 > 50 > lying[0, 50, 100]
    assert np.array_equal(held[0], QUARTERS[matrix](lying[0]))
    assert held.flags.c_contiguous and next(video_frames(tmp_path / "held.mp4", "rgb24")).shape == (*held[0].shape, 3)


@pytest.mark.parametrize("matrix", [(0.8, 0.6, -0.6, 0.8), (1, 0.5, 0, 1), (1, 1, 1, 1)])
def test_pictures_that_cannot_be_turned_upright_are_refused(tmp_path, matrix):
    with pytest.raises(InputError, match="held.mp4: shown neither upright"):
        load_video(write_turned(tmp_path, *matrix))


def test_still_with_data_that_pyav_does_not_know(tmp_path):
    """EXIF says that this JPEG lies on its side; PyAV 18 fails to list its side data."""
    picture = np.repeat(np.arange(0, 256, 4, np.uint8)[:, None], 128, 1)
    jpeg = write_clip(tmp_path / "a.jpg", [(0, picture)], codecs=("mjpeg", None), format="mjpeg").read_bytes()
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x112, 3, 1, 6, 0, 0)
    (tmp_path / "b.jpg").write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:])
    lying, held = load_video(tmp_path / "a.jpg")[0], load_video(tmp_path / "b.jpg")[0]
    with av.open(str(tmp_path / "b.jpg")) as container:
        turned = next(container.decode(video=0)).rotation  # 0 in FFmpeg before 8.1
    assert np.array_equal(held, np.rot90(lying, -1) if turned else lying)


@pytest.mark.parametrize("sar, width", [(Fraction(4, 3), 128), (Fraction(8, 9), 85), (1, 96)])
def test_pixels_become_square(tmp_path, sar, width):
    picture = np.zeros((64, 96), np.uint8)
    picture[:, :48] = 200
    video = load_video(write_clip(tmp_path / "a.mkv", [(0, picture)], sar=sar))[0]
    assert video.shape == (64, width)
    assert (video[:, : width // 2 - 4] > 150).all() and (video[:, width // 2 + 4 :] < 50).all()


def test_damaged_pictures_are_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (20, 96, 96), np.uint8)
    path = write_clip(tmp_path / "a.mkv", [(t / 25, x) for t, x in enumerate(noise)], codecs=("mpeg2video", None))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :: 500] = bytes(len(content[len(content) // 2 :: 500]))  # FFmpeg paints over it
    path.write_bytes(content)
    with pytest.raises(InputError, match="a.mkv: damaged video after frame"):
        load_video(path)
    with pytest.raises(InputError, match="b.mkv: damaged video after frame 0 .its picture or its timestamp"):
        load_video(write_clip(tmp_path / "b.mkv", [(0, noise[0]), (70, noise[1])]))


def test_a_change_of_size_is_refused(tmp_path):
    sizes = ((96, 96), (128, 64))
    parts = [
        write_clip(tmp_path / "a.mjpeg", [(t / 25, np.full(size, 90, np.uint8)) for t in range(3)],
                   codecs=("mjpeg", None)).read_bytes()
        for size in sizes
    ]  # fmt: skip
    (tmp_path / "a.mjpeg").write_bytes(b"".join(parts))
    frames = video_frames(tmp_path / "a.mjpeg")
    assert next(frames).shape == (96, 96)
    with pytest.raises(InputError, match="a.mjpeg: the size of its frames changes"):
        list(frames)


def test_huge_pictures_are_refused(tmp_path, monkeypatch):
    """A hundred megapixels in a hundred kilobytes; a huge picture behind a small one; a small one widened."""
    row = zlib.compress(bytes(10001) * 10000)
    chunks = [(b"IHDR", struct.pack(">2I5B", 10000, 10000, 8, 0, 0, 0, 0)), (b"IDAT", row), (b"IEND", b"")]
    png = b"".join(struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks)
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    with pytest.raises(InputError, match="huge.png: 10000x10000 pixels, at most 9437184 are read"):
        load_video(tmp_path / "huge.png")
    small, large = (
        write_clip(tmp_path / f"{size}.mjpeg", [(0, np.zeros((size, size), np.uint8))], codecs=("mjpeg", None))
        for size in (96, 256)
    )
    (tmp_path / "grows.mjpeg").write_bytes(2 * small.read_bytes() + large.read_bytes())
    monkeypatch.setattr(media, "MAX_PIXELS", 200 * 200)
    with pytest.raises(InputError, match="grows.mjpeg: damaged video"):  # not decoded, not only refused for its size
        load_video(tmp_path / "grows.mjpeg")
    wide = write_clip(tmp_path / "wide.mkv", [(0, np.zeros((96, 96), np.uint8))], sar=Fraction(50))
    with pytest.raises(InputError, match="wide.mkv: 4800x96 pixels"):
        load_video(wide)


# --- sound -------------------------------------------------------------------------------------------------------

BLACK = [(t / 25, np.zeros((96, 96), np.uint8)) for t in range(100)]


@pytest.mark.parametrize("name, codecs, rate, size", [
    ("a.mp4", ("libx264", "aac"), 44100, 1024), ("a.mkv", ("libx264", "aac"), 44100, 1024),
    ("a.ts", ("libx264", "aac"), 44100, 1024), ("a.webm", ("libvpx", "libopus"), 48000, 960),
    ("a.flv", ("libx264", "aac"), 44100, 1024), ("only.mkv", (None, "pcm_s16le"), 48000, 960),
])  # fmt: skip
def test_holes_in_the_sound_are_silence(tmp_path, name, codecs, rate, size):
    t = np.arange(4 * rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 1000 * t) * ((t < 1.5) | (t > 3))
    heard = [(at, block) for at, block in blocks(tone, rate, size) if not 1 <= at < 2]
    options = {"crf": "20", "b": "100k"}
    pictures = BLACK * bool(codecs[0])
    audio = load_audio(write_clip(tmp_path / name, pictures, heard, 25, None, rate, "stereo", codecs, options))
    assert len(audio) == pytest.approx(64000, abs=1000)
    assert onset(audio) < 0.03 and 2 + onset(audio[32000:]) == pytest.approx(3, abs=0.03)
    assert np.abs(audio[2000:15000]).max() > 0.4 and not audio[17000:31000].any() and np.abs(audio[49000:]).max() > 0.4


@pytest.mark.parametrize("start", [0.48, 0, -0.48])
def test_sound_starts_with_the_picture(tmp_path, start):
    """The sound may start later or earlier; what was heard before the picture is cut."""
    t = np.arange(88200) / 44100
    sounds = blocks(0.5 * np.sin(2 * np.pi * 1000 * t) * (t > 1), 44100, 1024)
    late = [(at + max(-start, 0), picture) for at, picture in BLACK[:50]]
    sounds = [(at + max(start, 0), block) for at, block in sounds]
    for name in ("a.mp4", "a.mkv", "a.ts"):
        audio = load_audio(write_clip(tmp_path / name, late, sounds, rate=44100))
        assert onset(audio) == pytest.approx(1 + start, abs=0.01), name


def test_sound_far_from_the_picture_is_refused(tmp_path):
    tone = np.full(1024, 0.3)
    with pytest.raises(InputError, match="apart.mkv: sound and picture start 70 s apart"):
        load_audio(write_clip(tmp_path / "apart.mkv", BLACK[:5], [(70, tone)]))
    with pytest.raises(InputError, match="hole.mkv: damaged audio, its timestamps jump by 70 s after 0 s"):
        load_audio(write_clip(tmp_path / "hole.mkv", sounds=[(0, tone), (70, tone)], codecs=(None, "pcm_s16le")))
    assert len(load_audio(write_clip(tmp_path / "a.mkv", sounds=[(0, tone), (50, tone)], codecs=(None, "pcm_s16le"))))
    with pytest.raises(InputError, match="before.mp4: no sound could be decoded"):  # it ends before the picture starts
        load_audio(write_clip(tmp_path / "before.mp4", [(9, BLACK[0][1])], [(0, tone)]))


def test_jitter_neither_cuts_nor_adds_samples(tmp_path):
    rng = np.random.default_rng(0)
    noise = blocks(rng.uniform(-0.5, 0.5, 48000), 16000, 480)
    jittered = [(at + (at > 0) * rng.uniform(-0.015, 0.015), block) for at, block in noise]
    straight = write_clip(tmp_path / "a.mkv", sounds=noise, codecs=(None, "pcm_s16le"))
    path = write_clip(tmp_path / "b.mkv", sounds=jittered, codecs=(None, "pcm_s16le"))
    assert np.array_equal(load_audio(path), load_audio(straight)) and len(load_audio(path)) == 48000


@pytest.mark.parametrize("speed", [0.97, 1.03])
def test_a_sound_card_whose_clock_runs_wrong_stays_with_the_picture(tmp_path, speed):
    t = np.arange(160000) / 16000
    sounds = [(at * speed, block) for at, block in blocks(0.5 * np.sin(2 * np.pi * 1000 * t) * (t > 8), 16000, 480)]
    audio = load_audio(write_clip(tmp_path / "a.mkv", sounds=sounds, codecs=(None, "pcm_s16le")))
    assert onset(audio) == pytest.approx(8 * speed, abs=0.05) and len(audio) == pytest.approx(160000 * speed, abs=800)


@pytest.mark.parametrize("formats", [[(44100, "stereo"), (48000, "mono")], [(24000, "mono"), (16000, "stereo")] * 3])
def test_changes_of_rate_and_channels_are_decoded(tmp_path, formats):
    """Joined .mp3 and broadcasts: every part is heard, at its own rate."""
    content = b""
    for rate, layout in formats:
        tone = 0.4 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
        content += write_clip(tmp_path / "part.mp3", sounds=[(0, tone)], rate=rate, layout=layout,
                              codecs=(None, "libmp3lame"), write_xing=0, id3v2_version=0).read_bytes()  # fmt: skip
    (tmp_path / "all.mp3").write_bytes(content)
    audio = load_audio(tmp_path / "all.mp3")
    assert len(audio) / 16000 == pytest.approx(len(formats), abs=0.12 * len(formats))  # an encoder pads
    for part in np.array_split(audio, len(formats)):
        middle = part[len(part) // 2 - 2000 :][:4000]
        assert np.abs(np.fft.rfft(middle)).argmax() * 4 == 440 and np.abs(middle).max() > 0.2


@pytest.mark.parametrize("codec", ["pcm_s16le", "adpcm_ms"])  # of the second, most frames have no time
@pytest.mark.parametrize("rate", [16000, 48000])
def test_sound_is_heard_to_its_end(tmp_path, codec, rate):
    path = write_clip(tmp_path / "a.wav", sounds=[(0, np.full(2 * rate, 0.5))], rate=rate, codecs=(None, codec))
    audio = load_audio(path)
    assert 32000 <= len(audio) < 32700 and np.abs(audio[100:31990] - 0.5).max() < 0.01


def test_the_sound_of_a_clip(tmp_path):
    clip = tmp_path / "talk.one.mp4"
    (tmp_path / "talk.wav").touch(), (tmp_path / "talk.one.wav").mkdir()
    assert find_sound(clip) == clip
    for name in ("talk.one.WAV", "talk.one.Wav"):
        (tmp_path / name).touch()
        assert find_sound(str(clip)) == tmp_path / name and find_sound(tmp_path / name) == tmp_path / name
        (tmp_path / name).unlink()
    late = write_clip(tmp_path / "talk.two.ts", [(at + 3, picture) for at, picture in BLACK], [(0, np.zeros(64000))])
    write_clip(tmp_path / "talk.two.wav", sounds=[(0, np.full(160, 0.5))], codecs=(None, "pcm_s16le"))
    assert onset(load_audio(find_sound(late))) < 0.01  # it starts with the picture, whatever the video's timestamps say


# --- bad files ---------------------------------------------------------------------------------------------------


def test_bad_files_are_refused(tmp_path):
    good = write_media(tmp_path / "good.mp4")
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:3000])
    (tmp_path / "coded.mp4").write_bytes(good.read_bytes().replace(b"avc1", b"zzzz"))
    for load, name, message in (
        (load_video, "none.mp4", "no such file"),
        (load_audio, "\0.mp4", "no such file"),
        (load_video, "x" * 300, "not a readable media file"),
        (load_audio, write_media(tmp_path / "mute.mp4", audio=False).name, "no audio track"),
        (load_video, write_media(tmp_path / "blind.mp4", video=False).name, "no video track"),
        (load_video, "cut.mp4", "not a readable media file"),
        (load_video, "coded.mp4", "unknown video codec"),
    ):
        with pytest.raises(InputError) as error:
            load(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: {message}")


def test_whatever_the_library_raises_names_the_file(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    path = write_media(tmp_path / "a.mp4")
    monkeypatch.setattr(media, "VideoReformatter", fail), monkeypatch.setattr(av, "AudioResampler", fail)
    for load, kind in ((load_video, "video"), (load_audio, "audio")):
        with pytest.raises(InputError, match=f"a.mp4: damaged {kind} .MemoryError"):
            load(path)


def test_a_name_that_looks_like_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(write_media(tmp_path / "12:30.mp4").parent)
    assert len(load_video("12:30.mp4")) == 25


@pytest.mark.parametrize("level", [np.nan, np.inf, 1e38])
def test_sound_that_is_no_number_is_refused(tmp_path, level):
    path = write_clip(tmp_path / "a.wav", sounds=[(0, np.full(16000, level))], codecs=(None, "pcm_f32le"))
    with pytest.raises(InputError, match="a.wav: NaN, infinite or endlessly loud"):
        load_audio(path)


@pytest.mark.parametrize("damage", ["truncated", "bits", "zeros", "noise"])
def test_damaged_clips_are_read_or_refused_by_name(tmp_path, damage):
    """What is read has finite numbers."""
    rng, good, path = random.Random(0), write_media(tmp_path / "good.mp4").read_bytes(), tmp_path / "a.mp4"
    for _ in range(12):
        content, start = bytearray(good), rng.randrange(len(good))
        if damage == "truncated":
            del content[start:]
        elif damage == "zeros":
            content[start : start + 2000] = bytes(len(content[start : start + 2000]))
        elif damage == "noise":
            content = rng.randbytes(rng.randrange(5000))
        else:
            for _ in range(rng.choice((1, 10, 200))):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        for load, dimensions in ((load_audio, 1), (load_video, 3)):
            try:
                read = load(path)
                assert damage != "noise" and len(read) and np.isfinite(read).all() and read.ndim == dimensions
            except InputError as error:
                assert str(path) in str(error)
