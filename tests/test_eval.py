"""eval.py: the WER, what it depends on, and runs that train.py did not write."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from common import close, command, small_model

import eval as eval_module
from data import load_corpus
from eval import evaluate, routing_statistics, word_error_rate
from smop import SMoP
from tools import prepare
from tools.errors import InputError


def test_what_is_scored():
    """Case and the kind of white space never count, punctuation and Unicode's form only without --normalize."""
    assert word_error_rate(["BIN BLUE AT", "now", "go"], ["bin red at", "", "go on then"])[0] == 80.0  # of all words
    rate = lambda *texts, **how: word_error_rate(*([text] for text in texts), **how)[0]  # noqa: E731
    assert rate("lay\u00a0blue\tat\n", "Lay  blue at") == 0
    pair = "well, caf\u00e9", "well cafe\u0301"
    assert rate(*pair) == 100 and rate(*pair, normalize=True) == 0
    assert eval_module.count_errors(["", "a b"], ["one two", ""]) == [(2, 0), (2, 2)]  # a clip without speech


def test_snrs_are_parsed_or_refused():
    assert [eval_module.parse_snr(text) for text in ("clean", "0", "-2.5")] == [None, 0.0, -2.5]
    for text in ("loud", "nan", "101"):
        with pytest.raises(InputError, match="an SNR is clean or a number of dB"):
            eval_module.parse_snr(text)


def test_noise_is_babble_of_the_train_split_or_a_file(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_module, "make_babble", lambda clips, load: [clip.id for clip in clips])
    assert eval_module.load_noise(None, corpus) == [clip.id for clip in load_corpus(corpus, "train")[0]]
    sound = np.sin(np.arange(16000)).astype(np.float32) / 2
    prepare.write_audio(tmp_path / "hum.wav", sound)
    close(eval_module.load_noise(tmp_path / "hum.wav", "nowhere"), sound, atol=1e-4)


def test_neither_batches_nor_order_nor_workers_change_a_hypothesis():
    model, (clips, load) = small_model(tokens_per_second=3).eval(), load_corpus("synthetic", "test")
    shuffled = random.Random(0).sample(clips[:12], 12)
    ways = [(clips[:12], load, None, (None,), 1, 1), (shuffled, load, None, (None,), 1, 130, 2), (shuffled, load)]
    decodings = [{line["id"]: line["hypothesis"] for line in evaluate(model, *way)[1]} for way in ways]
    assert decodings[0] == decodings[1] == decodings[2] and len(set(decodings[0].values())) > 2


def test_endless_transcripts_are_cut_by_the_length_of_their_clip():
    """A model that has learnt nothing never ends: 2 tokens a second allow 1.5 * 2 * seconds + 10, whatever the batch."""
    model, (clips, load) = small_model("asr", tokens_per_second=2).eval(), load_corpus("synthetic", "test")
    short, long = clips[0]._replace(frames=25), clips[0]._replace(id="long", frames=250)
    fit = lambda clip, modality: np.resize(load(clips[0], modality), 640 * clip.frames)  # noqa: E731
    for beams in (1, 3):
        for chosen in ([long], [long, short]):
            results, lines = evaluate(model, chosen, fit, num_beams=beams)
            lengths = [model.count_tokens([line["hypothesis"]]).item() - 1 for line in lines]
            assert results["cut"]["clean"] == len(chosen) and all(length <= 40 for length in lengths)
        assert lengths[1] <= 13 < lengths[0]


def test_noise_changes_what_is_heard_and_the_routing_is_of_the_first_snr():
    model, (clips, load) = small_model("asr", tokens_per_second=3).eval(), load_corpus("synthetic", "test")
    noise = torch.randn(16000).numpy()
    results, lines = evaluate(model, clips[:4], load, noise, (None, -5.0))
    assert [line["snr"] for line in lines] == ["clean"] * 4 + ["-5"] * 4 and set(results["wer"]) == {"clean", "-5"}
    assert [line["hypothesis"] for line in lines[:4]] != [line["hypothesis"] for line in lines[4:]]
    assert results["routing"] == evaluate(model, clips[:4], load)[0]["routing"]
    assert results["routing"] != evaluate(model, clips[:4], load, noise, (-5.0,))[0]["routing"]
    asked, honest = [], model.generate_ids
    model.generate_ids = lambda batch, beams: asked.append(beams) or honest(batch, beams)
    evaluate(model, clips[:4], load, num_beams=3)
    assert set(asked) == {3}


def test_routing_statistics():
    x, layer = torch.randn(40, 6), SMoP(6, 5)
    routing = layer(x)[1]
    statistics = routing_statistics([{"audio": layer(x[:10])[1]}, {"audio": layer(x[10:])[1]}])["audio"]
    assert statistics["usage"] == [round((routing.experts == e).any(1).float().mean().item(), 4) for e in range(4)]
    p = routing.logits.softmax(-1)
    assert statistics["entropy"] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), abs=1e-3)


def test_model_of_unknown_training_is_evaluated(corpus, tmp_path):
    """As one of tools.published: there is no args.json."""
    small_model("asr").save(tmp_path)
    with pytest.raises(InputError, match="--data must say what to evaluate on"):
        command(eval_module, tmp_path)
    command(eval_module, tmp_path, "--data", corpus, "--snr", "0", "--device", "cpu")
    assert json.loads((tmp_path / "results.json").read_text())["clips"] == 4
    prepare.write_audio(tmp_path / "silent.wav", np.zeros(16000))
    with pytest.raises(InputError, match="silent.wav: silent, no noise"):
        command(eval_module, tmp_path, "--data", corpus, "--snr", "0", "--noise", tmp_path / "silent.wav")
    quiet = tmp_path / "quiet"
    shutil.copytree(corpus, quiet)
    manifest = quiet / "test.csv"
    manifest.write_text(manifest.read_text().rpartition(",")[0] + ",\n")
    with pytest.raises(InputError, match="test.csv:5: empty transcript"):
        command(eval_module, tmp_path, "--data", quiet, "--device", "cpu")
    command(eval_module, tmp_path, "--data", quiet, "--allow-empty", "--normalize", "--device", "cpu")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["clips"] == 4 and results["scoring"] == "lower case, NFC, no punctuation"
