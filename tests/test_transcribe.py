"""tools/transcribe.py: long clips are cut at pauses, good clips become text, bad ones are refused by name."""

import json

import numpy as np
import pytest
from common import SHARED, command, needs_faces, small_model, write_picture

from data import collate, crop_video, transform_audio
from model import LlamaSMoP
from tools import prepare, transcribe
from tools.media import load_audio, load_video, video_frames

TALK = SHARED / "grid" / "video" / "pgak2n.mp4"


def speech(seconds, pauses=()):
    """Noise with silent stretches (start, end) in seconds."""
    audio = np.random.default_rng(0).normal(0, 0.1, round(seconds * 16000)).astype(np.float32)
    for start, end in pauses:
        audio[round(start * 16000) : round(end * 16000)] = 0
    return audio


def transcribe_clips(capsys, *arguments):
    """(exit status, what the command printed, the lines that are JSON)."""
    with pytest.raises(SystemExit) as end:
        command(transcribe, *arguments, "--device", "cpu")
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines() if line.startswith("{")]
    return end.value.code, printed.out + printed.err, lines


def test_long_clips_are_cut_at_pauses():
    pauses = [(9, 9.4), (22, 22.4), (29.5, 29.9), (50, 50.4), (79, 79.4)]
    cuts = transcribe.find_cuts(2150, speech(86, pauses))
    assert all(any(a <= cut / 25 <= b for a, b in pauses) for cut in cuts[1:-1])
    assert cuts[0] == 0 and cuts[-1] == 2150 and len(cuts) == 5
    for frames in (1, 50, 51, 75, 749, 750, 751, 775, 1501, 5000):
        for audio in (None, speech(frames / 25)):
            for longest in (50, 750):
                pieces = np.diff(transcribe.find_cuts(frames, audio, longest))
                assert pieces.sum() == frames and pieces.max() <= longest and (frames == 1 or pieces.min() >= 25)
    assert transcribe.find_cuts(1501) == [0, 500, 1001, 1501]


def test_long_clip_is_its_pieces(tmp_path, monkeypatch):
    """A silent piece is empty; the others are what they are by themselves, sound and lips cut at the same places."""
    monkeypatch.setattr(prepare, "find_mouths", load_video)
    model = small_model().eval()
    generate = model.generate
    model.generate = lambda batch, num_beams: generate(batch, num_beams, max_new_tokens=6)
    clip = write_picture(tmp_path / "long.mp4", 80)
    prepare.write_audio(tmp_path / "long.wav", speech(80, [(20, 20.5), (29, 60)]))
    segments = transcribe.transcribe(model, clip)
    cuts = [0.0, *(s["end"] for s in segments)]
    assert [s["start"] for s in segments] == cuts[:-1] and cuts[-1] == 80 and "" in [s["text"] for s in segments]
    audio, mouths = load_audio(tmp_path / "long.wav"), load_video(clip)
    for segment in segments:
        frames = slice(round(25 * segment["start"]), round(25 * segment["end"]))
        piece = audio[640 * frames.start : 640 * frames.stop]
        item = {"id": "a", "text": "", "audio": transform_audio(piece), "video": crop_video(mouths[frames])}
        assert segment["text"] == (model.generate(collate([item]), 1)[0] if piece.any() else "")
    assert any(s["text"] for s in segments)


def test_good_and_bad_clips(tmp_path, capsys):
    small_model("asr").save(tmp_path / "run")
    write_picture(tmp_path / "mute.mp4", 1)
    (tmp_path / "text.mp4").write_text("no media")
    write_picture(tmp_path / "good.mp4", 1)
    prepare.write_audio(tmp_path / "good.wav", speech(1))  # beside a video without sound: heard
    faults = {"mute.mp4": "no audio track", "text.mp4": "not a readable", "none.mp4": "no such file"}
    clips = [tmp_path / name for name in (*faults, "good.mp4")]
    code, printed, lines = transcribe_clips(capsys, tmp_path / "run", *clips, "--json")
    assert code == 1 and [line["clip"] for line in lines] == list(map(str, clips))
    for line, message in zip(lines, faults.values()):
        assert f"{line['clip']}: {message}" in line["error"] and f"error: {line['error']}" in printed
    assert lines[-1].keys() == {"clip", "text", "segments"} and lines[-1]["segments"][0]["end"] == 1
    code, printed, _ = transcribe_clips(capsys, tmp_path / "run", clips[-1])
    assert code == 0 and f"{clips[-1]}\t{lines[-1]['text']}\n" in printed


def test_our_own_faults_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaSMoP, "load", lambda folder: small_model("asr"))
    monkeypatch.setattr(transcribe, "transcribe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        transcribe.run_command(lambda: command(transcribe, "run", "talk.mp4", "--device", "cpu"))


@needs_faces
def test_the_mouth_is_found(tmp_path, capsys):
    small_model("vsr").save(tmp_path / "run")
    prepare.write_sheet(tmp_path / "still.png", [next(video_frames(TALK))], columns=1)
    write_picture(tmp_path / "frame.mp4", 0.04)
    write_picture(tmp_path / "faceless.mp4", 1, size=256)
    write_picture(tmp_path / "mouth.mp4", 1)
    clips = [TALK, *(tmp_path / name for name in ("still.png", "frame.mp4", "faceless.mp4", "mouth.mp4"))]
    code, printed, lines = transcribe_clips(capsys, tmp_path / "run", *clips, "--json")
    assert code == 1 and lines[0]["text"] and lines[0]["segments"][0]["end"] == 3
    messages = ["a still picture", "a still picture, or one frame", *["no face in any of 25 frames"] * 2]
    for line, message in zip(lines[1:], messages):
        assert f"{line['clip']}: {message}" in line["error"]
    assert "already" in lines[-1]["error"] and "already" not in lines[-2]["error"]
