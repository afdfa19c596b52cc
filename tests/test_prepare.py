"""tools/prepare.py, tools/corpora.py: faces, mouths, the layouts of raw corpora, and the command as a user runs it."""

import csv
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from common import GOLDEN, SHARED, command, needs_faces, needs_shared, run, write_picture

from data import load_media, read_manifest
from tools import prepare
from tools.corpora import find_clips
from tools.errors import InputError
from tools.media import load_audio, load_video, video_frames


def grid_frames(name):
    return video_frames(SHARED / "grid" / "video" / f"{name}.mp4", "rgb24")


# --- faces and mouths --------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("name", ["pgak2n", "sgwqzp", "bgau1a"])
def test_mouth_regions_equal_published_ones(name):
    golden = np.load(GOLDEN / "mouth.npz")
    frames = video_frames(SHARED / "grid" / "video" / f"{name}.mp4")
    mouths = prepare.cut_mouths(frames, golden[f"{name}.landmarks"])
    assert mouths.shape == golden[f"{name}.roi"].shape
    assert np.abs(mouths.astype(int) - golden[f"{name}.roi"]).mean() < 2


def test_similarity_and_gaps():
    points = np.random.default_rng(0).normal(size=(5, 2))
    turn = 1.7 * np.array([[math.cos(0.4), -math.sin(0.4)], [math.sin(0.4), math.cos(0.4)]])
    matrix = prepare.similarity(points, points @ turn.T + [3, -2])
    np.testing.assert_allclose(matrix, np.column_stack([turn, [3, -2]]))
    landmarks = np.full((5, 68, 2), -1)
    landmarks[1], landmarks[3] = 10, 20
    landmarks[3, 0, 1] = -5  # a jaw outside the picture
    assert prepare.fill_gaps(landmarks)[:, 0].tolist() == [[10, 10], [10, 10], [15, 2.5], [20, -5], [20, -5]]


def test_missing_dlib_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "dlib", None)
    prepare._dlib.cache_clear()
    with pytest.raises(SystemExit, match="dlib: pip install -r requirements-extra.txt"):
        prepare.find_landmarks([])
    prepare._dlib.cache_clear()


@needs_faces
def test_larger_face_is_followed():
    """Two faces; the larger is covered for 3 frames, which must not lead to the other, and later for good."""
    large, small = (np.stack(list(grid_frames(name))[:24]) for name in ("pgak2n", "sgwqzp"))
    rows, columns = np.arange(0, 288, 1.25).astype(int), np.arange(0, 360, 1.25).astype(int)
    frames = np.zeros((24, 288, 360 + len(columns), 3), np.uint8)
    frames[:, : len(rows), 360:] = small[:, rows][:, :, columns]
    shown = [0, 1, 2, 6, 7]
    frames[shown, :, :360] = large[shown]
    x = prepare.find_landmarks(frames)[:, :, 0]
    assert all((x[t] > 0).all() and (x[t] < 360).all() for t in shown)
    assert all((x[t] == -1).all() for t in [3, 4, 5, *range(8, 20)])
    assert all((x[t] >= 360).all() for t in range(20, 24))


# --- layouts -----------------------------------------------------------------------------------------------------


def write_files(folder, files):
    """Files of {relative path: text}; without text, an empty one."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def found(corpus):
    return {(split, name): text for split, name, _, text in corpus.clips}


@pytest.mark.parametrize("content, expected", [
    (b"Text:  HELLO WORLD\nConf:  4\n\nWORD START END ASDSCORE\nHELLO 0.1 0.4 5.2\n", "hello world"),
    (b"\xef\xbb\xbfText:  HELLO WORLD\r\n", "hello world"),
    (b"\nhello big\r\nwide world\n", "hello big wide world"),
    ("hello\tbig\u00a0wide\u3000world".encode(), "hello big wide world"),
    ("hello".encode("utf-16-le"), "a.txt: not text in UTF-8"),
    ("café".encode("latin-1"), "a.txt: not text in UTF-8"),
    (b"", "a.txt: empty transcript"),
    (b"Text:\n\nWORD START END\n", "a.txt: empty transcript"),
    (None, "a.txt: no such transcript"),
])  # fmt: skip
def test_transcripts(tmp_path, content, expected):
    write_files(tmp_path, {"train/a.mp4": "", "train/b.mp4": "", "train/b.txt": "b"})
    if content is not None:
        write_files(tmp_path, {"train/a.txt": content})
    corpus = find_clips(tmp_path)
    assert found(corpus)["train", "b"] == "b"
    said = [reason.removeprefix(f"{tmp_path}/train/") for *_, reason in corpus.failures]
    assert found(corpus).get(("train", "a")) == expected or said[0].startswith(expected)


def test_folders_of_splits(tmp_path):
    names = ("train/a.mp4 train/b.MOV train/c.mkv train/c.mp4 train/c.wav train/d.flac train/e.flv val/x/a.webm "
             "extra/a.mp4 top.mp4 test/._a.mp4").split()  # fmt: skip
    write_files(tmp_path, dict.fromkeys(names, "") | {f"train/{name}.txt": name.upper() for name in "abc"})
    write_files(tmp_path, {"val/x/a.txt": "V"})
    corpus = find_clips(tmp_path)
    assert found(corpus) == {("train", "a"): "a", ("train", "b"): "b", ("train", "c"): "c", ("valid", "x/a"): "v"}
    assert [failure[:2] for failure in corpus.failures] == [("train", "c")] and "the same id" in corpus.failures[0][2]
    outside, other = corpus.skipped
    assert "2 files outside train/" in outside and "extra/a.mp4" in outside and "top.mp4" in outside
    assert "2 files of sound" in other and "d.flac" in other and "e.flv" in other


def test_manifests_are_lower_case_and_val_is_valid(tmp_path):
    write_files(tmp_path, {"val.csv": "id,path,frames,text\na,a.mp4,3,Hello  WORLD\n", "more.csv": ""})
    corpus = find_clips(tmp_path)
    assert found(corpus) == {("valid", "a"): "hello world"} and "more.csv" in corpus.skipped[0]


def test_lrs2_follows_its_lists(tmp_path):
    names = ["1/00001", "1/00002", "2/00001", "2/00002", "3/00001"]
    places = [*(f"main/{name}" for name in names), "pretrain/1/00001"]
    for place in places:
        write_files(tmp_path, {f"{place}.mp4": "", f"{place}.txt": "Text:  HI"})
    write_files(tmp_path, {"pretrain.txt": "1/00001\n"})
    lists = {"train.txt": "1/00001\r\n1/00002\r\n9/00001\r\n", "val.txt": "2/00001\r\n", "test.txt": "2/00002 MV\r\n"}
    write_files(tmp_path, lists)
    corpus = find_clips(tmp_path)
    splits = {"1/00001": "train", "1/00002": "train", "2/00001": "valid", "2/00002": "test"}
    assert list(found(corpus)) == [(split, name) for name, split in splits.items()]
    assert [failure[:2] for failure in corpus.failures] == [("train", "9/00001")]
    first, second = sorted(corpus.skipped)
    assert "1 files in pretrain/" in first and "1 files that no list names" in second


def test_lrs3_keeps_a_speaker_in_one_split(tmp_path):
    names = [f"{speaker}/0000{number}" for speaker in range(200) for number in (1, 2)]
    for name in names:
        write_files(tmp_path, {f"trainval/{name}.mp4": "", f"trainval/{name}.txt": "HI"})
    write_files(tmp_path, {"test/7/00001.mp4": "", "test/7/00001.txt": "HI", "pretrain/7/00001.mp4": ""})
    corpus = find_clips(tmp_path)
    splits = {split: {name for s, name in found(corpus) if s == split} for split in ("train", "valid", "test")}
    assert splits["test"] == {"7/00001"} and splits["train"] | splits["valid"] == set(names)
    assert 4 <= len(splits["valid"]) <= 40  # 4 % of the speakers
    speakers = {split: {name.partition("/")[0] for name in splits[split]} for split in ("train", "valid")}
    assert not speakers["train"] & speakers["valid"] and "in pretrain/" in corpus.skipped[0]

    write_files(tmp_path, {"list": "trainval/3/00001\n5/00002\n999/00001\n"})
    corpus = find_clips(tmp_path, valid_list=tmp_path / "list")
    assert {name for split, name in found(corpus) if split == "valid"} == {"3/00001", "5/00002"}
    assert [failure[:2] for failure in corpus.failures] == [("valid", "999/00001")]
    with pytest.raises(InputError, match="--others are only for --grid"):
        find_clips(tmp_path, others=["3"])
    with pytest.raises(InputError, match="--valid-list divides trainval/"):
        find_clips(tmp_path / "test", valid_list=tmp_path / "list")


def test_grid(tmp_path):
    align = "0 23750 sil\n23750 29500 BIN\n29500 34000 blue\n34000 34500 sp\n34500 53000 now\n"
    write_files(tmp_path, {f"s1/{name}": "" for name in ("bbaf2n.mpg", "lgwz9s.MPG", "holiday.mpg")})
    write_files(tmp_path, {"S2/video/mpg_6000/swizza.mpg": "", "s2/align/swizza.align": align, "s3/bbaf2n.mp4": ""})
    write_files(tmp_path, {"alignments/s1/bbaf2n.align": align, "alignments/s3/bbaf2n.align": "bin blue", "b.mpg": ""})
    corpus = find_clips(tmp_path, grid=True)
    assert {name: text for (_, name), text in found(corpus).items()} == {
        "s1/bbaf2n": "bin blue now", "s1/lgwz9s": "lay green with z nine soon", "s2/swizza": "bin blue now",
    }  # fmt: skip
    assert [(name, "holiday" in why or "START END WORD" in why) for _, name, why in corpus.failures] == [
        ("s1/holiday", True), ("s3/bbaf2n", True),
    ]  # fmt: skip
    assert len(corpus.skipped) == 1 and "b.mpg" in corpus.skipped[0]
    corpus = find_clips(tmp_path, grid=True, talkers=["s2"])
    assert [name for _, name in found(corpus)] == ["s2/swizza"] and "4 files of other talkers" in corpus.skipped[1]
    corpus = find_clips(tmp_path, grid=True, talkers=["s2"], others=["s1"])
    assert {name: split for split, name in found(corpus)} == {"s2/swizza": "train"} | dict.fromkeys(
        ("s1/bbaf2n", "s1/lgwz9s"), "others"
    )
    with pytest.raises(InputError, match="no clip of talker s9"):
        find_clips(tmp_path, grid=True, talkers=["s1", "s9"])


@needs_shared
def test_grid_as_shared(tmp_path):
    """Real names and alignments: both spell the same sentences, and a checksum gives about 85, 5 and 10 %."""
    (tmp_path / "s1").symlink_to(SHARED / "grid" / "video")
    spelled = found(find_clips(tmp_path, grid=True))
    (tmp_path / "alignments").mkdir()
    (tmp_path / "alignments" / "s1").symlink_to(SHARED / "grid" / "align")
    assert found(find_clips(tmp_path, grid=True)) == spelled
    splits = [split for split, _ in spelled]
    assert [splits.count(split) for split in ("train", "valid", "test")] == [761, 52, 87]
    assert len(found(find_clips(SHARED / "grid-talkers", grid=True))) == 150


def test_no_corpus_is_said(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        find_clips(tmp_path / "nowhere")
    write_files(tmp_path, {"extra/a.mp4": "", "extra/a.txt": "a"})
    with pytest.raises(InputError, match="no clip with a transcript .* skipped 1 files outside train/.*extra/a.mp4"):
        find_clips(tmp_path)


# --- the command -------------------------------------------------------------------------------------------------


def write_clip(path, picture, sound, text="hello"):
    """A clip of mouths with its sound and transcript beside it, both given in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, picture)
    prepare.write_audio(path.with_suffix(".wav"), 0.1 * np.sin(np.arange(round(16000 * sound))))
    path.with_suffix(".txt").write_text(text)


def prepare_here(monkeypatch, *arguments):
    """The command in this process, on clips that are mouths already. Returns its exit status."""
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", ThreadPoolExecutor)  # whose threads see what is replaced here
    monkeypatch.setattr(prepare, "find_mouths", load_video)
    monkeypatch.setattr(prepare, "_dlib", lambda: None)
    with pytest.raises(SystemExit) as end:
        command(prepare, *arguments)
    return end.value.code


def test_sound_beside_is_heard_and_must_last_as_long_as_the_picture(tmp_path, monkeypatch):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_clip(raw / "train" / "good.mp4", 2, 2.5)
    write_clip(raw / "train" / "short.mp4", 3, 0.6)
    write_clip(raw / "test" / "silent.mp4", 1, 1)
    prepare.write_audio(raw / "test" / "silent.wav", np.zeros(16000))
    assert prepare_here(monkeypatch, raw, out) == 1
    (clip,) = read_manifest(out / "train.csv")
    assert clip.frames == 50 and np.abs(load_media(clip, "audio")).max() > 0.09
    with open(out / "failures.csv", newline="") as file:
        (_, silent, short) = csv.reader(file)
    assert short[:2] == ["train", "short"] and "short.mp4: 0.6 s of sound, but 3.0 s of video" in short[2]
    assert silent[:2] == ["test", "silent"] and "silent.mp4: silent" in silent[2]
    assert (out / "test.csv").read_text().split() == ["id,path,frames,text"]


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    for name in "abcde":
        write_clip(raw / "train" / f"{name}.mp4", 0.4, 0.4)
    done, read_clip = [], prepare.read_clip

    def killed(path):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(path.stem)
        return read_clip(path)

    monkeypatch.setattr(prepare, "read_clip", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_here(monkeypatch, raw, out, "--workers", 1)
    monkeypatch.setattr(prepare, "read_clip", lambda path: done.append(path.stem) or read_clip(path))
    monkeypatch.setattr(prepare, "TILES", 2)
    sheets = []
    monkeypatch.setattr(prepare, "write_sheet", lambda path, tiles: sheets.append(len(tiles)))
    (out / "others.csv").touch()  # of an earlier call with --others: these talkers may now be in the train split
    assert prepare_here(monkeypatch, raw, out, "--workers", 1) == 0
    assert "".join(done) == "abcde" and sheets == [2]  # each clip once; tiles of every third
    assert not (out / "others.csv").exists()
    assert [clip.id for clip in read_manifest(out / "train.csv")] == list("abcde")
    assert "5 clips prepared, 0 failed" in capsys.readouterr().out


def test_our_own_faults_keep_their_traceback(tmp_path, monkeypatch):
    write_clip(tmp_path / "raw" / "train" / "a.mp4", 0.4, 0.4)
    monkeypatch.setattr(prepare, "write_video", lambda path, mouths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_here(monkeypatch, tmp_path / "raw", tmp_path / "out")


def test_out_dir_must_lie_outside(tmp_path, monkeypatch):
    for out in (tmp_path, tmp_path / "out"):
        with pytest.raises(InputError, match="OUT_DIR must lie outside RAW_DIR"):
            prepare_here(monkeypatch, tmp_path, out)


@needs_faces
def test_real_faces(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_clip(raw / "s1" / "bbaf2n.mp4", 1, 1)  # a brightening square
    (raw / "s1" / "pgak2n.mp4").symlink_to(SHARED / "grid" / "video" / "pgak2n.mp4")

    line = ("-m", "tools.prepare", "--grid", raw, out, "--workers", 1)
    printed = run(*line, code=1)
    assert "Traceback" not in printed and "1 clips prepared, 1 failed" in printed
    assert "bbaf2n.mp4: no face in any of 25 frames; is it a mouth region already?" in printed
    run(*line, "--allow-failures", 1)
    assert (out / "test.csv").read_text().endswith("s1/pgak2n,clips/test/s1/pgak2n.mp4,75,place green at k two now\n")
    clip = out / "clips" / "test" / "s1" / "pgak2n.mp4"
    mouths = load_video(clip).astype(int)
    assert np.abs(mouths - np.load(GOLDEN / "mouth.npz")["pgak2n.roi"]).mean() < 3
    sound = load_audio(clip.with_suffix(".wav"))
    assert len(sound) == 48000 and np.abs(sound).max() > 0.1 and (out / "sheet.png").stat().st_size > 1000
