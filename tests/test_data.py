"""data.py and synthetic.py: manifests, augmentation, noise, and the order of a run."""

import random

import numpy as np
import pytest
import torch
from common import close, command
from test_media import write_media

import data
import synthetic
from data import ClipDataset, load_corpus, pack, plan_run, read_manifest
from tools.errors import InputError


def noise(seconds=0.6):
    return np.random.default_rng(0).standard_normal(round(16000 * seconds)).astype(np.float32)


# --- manifests ---------------------------------------------------------------------------------------------------


def test_manifests(tmp_path):
    text = '\ufeffid,path,frames,text\na,a.mp4,25,"one,\u00a0 two\t"\nb,s/b.mp4,30,three\n'
    (tmp_path / "test.csv").write_text(text, encoding="utf-8")
    clips = read_manifest(tmp_path / "test.csv")
    assert clips == [("a", tmp_path / "a.mp4", 25, "one, two"), ("b", tmp_path / "s/b.mp4", 30, "three")]


def test_label_files_of_auto_avsr_and_llama_avsr(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "lrs3" / "lrs3_text_seg24s" / "x").mkdir(parents=True)
    (tmp_path / "lrs3" / "lrs3_text_seg24s" / "x" / "1.txt").write_bytes(b"\xef\xbb\xbfHELLO THERE\r\n")
    (tmp_path / "labels" / "l.csv").write_text(
        "lrs3,lrs3_video_seg24s/x/1.mp4,50,12 7 88\nlrs3,lrs3_video_seg24s/x/2.mp4,30,plain text\n"
        'lrs3,lrs3_video_seg24s/x/3.mp4,30,4,"more, text"\nlrs3,lrs3_video_seg24s/x/4.mp4,30,4,2008\n'
    )
    clips = read_manifest(tmp_path / "labels" / "l.csv")
    assert clips[0].path == tmp_path / "lrs3" / "lrs3_video_seg24s/x/1.mp4"
    assert [c.text for c in clips] == ["HELLO THERE", "plain text", "more, text", "2008"]
    assert clips[0].id == "lrs3_video_seg24s/x/1"


@pytest.mark.parametrize("line, message", [
    ("a,a.mp4,25,well, hello", "m.csv:2: expected .* quotes around a text with commas"),
    ("a,a.mp4,many,text", "m.csv:2: expected .* number of frames"),
    ("a,a.mp4,0,text", "positive number"),
    ("a,../../a.mp4,25,text", "lead out of the folder"),
    ("../a,a.mp4,25,text", "lead out of the folder"),
    ("", "no clips"),
    ("a,a,\xb2,t", "m.csv: not a CSV file in UTF-8"),  # written in Latin-1
    ('a,a,"1', "m.csv:2: expected"),
    ("d,v/a.mp4,25,well, hello world", "m.csv:1: expected .* quotes"),  # label files have no header
    ("d,v/a.mp4,25,9,well, hello world", "m.csv:1: expected .* quotes"),
    ("d,v/a.mp4,25,7 8", "m.csv:1: .*a.txt: not text in UTF-8 .*No such file"),
])  # fmt: skip
def test_bad_manifests_are_refused(tmp_path, line, message):
    header = "" if line.startswith("d,") else "id,path,frames,text\n"
    (tmp_path / "m.csv").write_text(f"{header}{line}\n", encoding="latin-1")
    with pytest.raises(InputError, match=message):
        read_manifest(tmp_path / "m.csv")


def test_clips_that_are_not_as_their_manifest_says(tmp_path):
    def load(path, modality, frames=25):
        return data.load_media(data.Clip("x", path, frames, "text"), modality)

    good = write_media(tmp_path / "good.mp4")
    assert load(good, "video").shape == (25, 96, 96) and load(good, "audio").shape == (16000,)
    with pytest.raises(InputError, match="good.mp4: 25 frames at 25 fps, but its manifest says 40"):
        load(good, "video", frames=40)
    with pytest.raises(InputError, match="good.mp4: 1.* s of audio, but its manifest says 1.6 s"):
        load(good, "audio", frames=40)
    for name, size in (("tiny.mp4", 64), ("raw.mp4", 288)):  # clips that were never prepared are refused
        with pytest.raises(InputError, match=f"{name}: {size}x{size} pixels, but mouth regions of .* tools.prepare"):
            load(write_media(tmp_path / name, size=size), "video")


def test_a_corpus_is_checked_as_a_whole(tmp_path, capsys):
    for name in ("a", "b", "c"):
        write_media(tmp_path / f"{name}.mp4", size=64 if name == "b" else 96)
    rows = ["a,a.mp4,25,one", "b,b.mp4,25,three", "c,c.mp4,40,four", "a,a.mp4,25,again", "d,d.mp4,25, ", "e,e,1,x,y"]
    (tmp_path / "test.csv").write_text("\n".join(["", "id,path,frames,text", *rows]) + "\n")
    with pytest.raises(SystemExit, match="1|True"):
        command(data, tmp_path)
    faults = capsys.readouterr().out.splitlines()
    assert len(faults) == 6 and faults[-1] == "5 faults"
    messages = ("b.mp4: 64x64 pixels", "c.mp4: 1.", "'a' stands for several", ":7: empty", ":8: expected")
    assert all(words in fault for fault, words in zip(faults, messages))


# --- augmentation and noise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("snr", [-5.0, 0.0, 5.0])
def test_noise_has_the_stated_level_and_repeats(snr):
    clips, load = load_corpus("synthetic", "test")
    clean = load(clips[0], "audio")
    noisy = ClipDataset(clips, load, ("audio",), noise=noise(), snr=snr)[0]["audio"]
    assert torch.equal(noisy, ClipDataset(clips, load, ("audio",), noise=noise(), snr=snr)[0]["audio"])
    assert not torch.equal(noisy, ClipDataset(clips, load, ("audio",), noise=noise(), snr=snr + 1)[0]["audio"])
    added = data.add_noise(clean, noise(), snr, random.Random(f"0 0 {clips[0].id}")) - clean
    assert 10 * np.log10(np.mean(clean**2) / np.mean(added**2)) == pytest.approx(snr, abs=1e-3)
    close(noisy, data.transform_audio(clean + added), atol=1e-4)
    silent_in_parts = np.concatenate([np.zeros(10**6, np.float32), noise()[:16000]])
    added = data.add_noise(clean, silent_in_parts, snr, random.Random(0)) - clean
    assert 10 * np.log10(np.mean(clean**2) / np.mean(added**2)) == pytest.approx(snr, abs=1e-3)
    with pytest.raises(InputError, match="silent"):
        data.add_noise(clean, np.zeros(100, np.float32), snr, random.Random(0))


def test_babble_is_many_voices_of_unequal_loudness():
    ones = lambda clip, modality: np.ones(16000, np.float32)  # noqa: E731
    babble, again = (data.make_babble([data.Clip(name, None, 25, "")], ones) for name in "ab")
    assert len(babble) == 480_000 and 10 < babble.min() <= babble.max() < 30 and len(np.unique(babble.round(3))) > 1
    assert np.array_equal(babble, again)


def test_augmentation_depends_on_the_epoch_and_the_clip():
    clips, load = load_corpus("synthetic", "train")
    make = lambda noise: ClipDataset(clips, load, ("audio", "video"), noise, clean_epochs=1)  # noqa: E731
    dataset = make(noise())
    plain, first, again, other = dataset[3], dataset[3, 1], make(noise())[3, 1], dataset[3, 2]
    for modality in ("audio", "video"):
        assert torch.equal(first[modality], again[modality]) and not torch.equal(first[modality], other[modality])
    other = ClipDataset(clips, load, ("audio", "video"), noise(), seed=1, clean_epochs=1)[3, 1]
    assert not any(torch.equal(first[modality], other[modality]) for modality in ("audio", "video"))
    assert torch.equal(dataset[3, 0]["audio"], plain["audio"])  # a clean epoch, but cropped and flipped
    assert not torch.equal(dataset[3, 0]["video"], plain["video"])
    assert not torch.equal(make(None)[3, 1]["audio"], plain["audio"])  # masks only
    assert any((dataset[3, epoch]["video"] == 0).flatten(1).all(1).any() for epoch in range(1, 6))


def test_crops_flips_and_masks():
    square = np.random.default_rng(0).integers(0, 256, (2, 88, 88), np.uint8)
    mirrored = data.crop_video(square).flip(-1)
    assert 0 < sum(data.crop_video(square, random.Random(i)).equal(mirrored) for i in range(20)) < 20
    frames = np.arange(96 * 96).reshape(1, 96, 96)
    assert data.crop_video(frames)[0, 0, 0] == 4 * 96 + 4
    corners = {int(data.crop_video(frames, random.Random(i)).min()) for i in range(200)}
    assert len(corners) > 60 and min(corners) >= 0 and max(corners) <= 8 * 96 + 8
    masked = data.mask_spans(np.ones(48000), 16000, random.Random(0))
    assert 0 < (masked == 0).sum() <= 3 * 6400 and set(masked) == {0, 1}  # three spans of up to 0.4 s


def test_synthetic_corpus_is_what_it_says():
    splits = {split: load_corpus("synthetic", split)[0] for split in data.SPLITS}
    texts = [{clip.text for clip in clips} for clips in splits.values()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    clip, load = splits["test"][0], load_corpus("synthetic", "test")[1]
    audio, video = load(clip, "audio"), load(clip, "video")
    assert audio.shape == (640 * clip.frames,) and audio.dtype == np.float32
    assert video.shape == (clip.frames, 96, 96) and video.dtype == np.uint8
    assert np.array_equal(audio, load(clip, "audio"))
    looks = {(i, *(synthetic.PHONES[p][0] for p in word)) for i, row in enumerate(synthetic.MATRIX)
             for word in row.values()}  # fmt: skip
    assert len(looks) == 14  # of 32 words: a perfect lip reader has a WER of 56 %


# --- batches and the order of a run ------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_plan_loses_and_repeats_no_clip(world):
    frames, tokens = [10 + 7 * i % 90 for i in range(101)], [1 + i % 7 for i in range(101)]
    plans = [plan_run(frames, tokens, 2, 300, accumulate=2, seed=1, rank=rank, world=world) for rank in range(world)]
    for epoch in range(2):
        steps = [[step for step in plan if step.epoch == epoch] for plan in plans]
        clips = [i for own in steps for step in own for batch in step.batches for i in batch]
        assert sorted(clips) == list(range(101))
        assert all([len(s.batches) for s in own] == [len(s.batches) for s in steps[0]] for own in steps)
        assert all([step.last for step in own] == [False] * (len(own) - 1) + [True] for own in steps)
        for same in zip(*steps):  # the step in all processes
            assert all(batch for step in same for batch in step.batches)
    longer = [b for step in plans[0] for b in step.batches if len(b) * max(frames[i] for i in b) > 300]
    assert len(longer) <= 2 * (world > 1)  # what is left for too few processes joins another batch
    padded = sum(max(frames[i] for i in b) * len(b) for plan in plans for step in plan for b in step.batches)
    assert 1 - 2 * sum(frames) / padded < 0.12  # without the order by length 0.22 to 0.34
    assert [s.batches for s in plans[0] if s.epoch == 0] != [s.batches for s in plans[0] if s.epoch == 1]
    assert plans[0] == plan_run(frames, tokens, 2, 300, accumulate=2, seed=1, rank=0, world=world)
    assert plans[0] != plan_run(frames, tokens, 2, 300, accumulate=2, seed=2, rank=0, world=world)


def test_a_long_clip_is_a_batch_and_few_clips_for_many_processes_are_refused():
    assert pack([10, 900], 300) == [[0], [1]]
    with pytest.raises(InputError, match="3 clips cannot be shared by 4 processes"):
        pack([10, 10, 10], 300, world=4)
