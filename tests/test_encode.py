"""Training and evaluation on stored features equal those on clips, and a lip encoder learns to read."""

import json

import pytest
import torch
from common import AVHUBERT, LLM, close, command, metrics, small_batch, small_model
from safetensors import safe_open
from safetensors.torch import load_file

import eval as evaluation
import synthetic
import train
from data import ClipDataset, collate, load_corpus
from encoders import MODALITIES, Encoders
from eval import load_noise
from tools import encode, lips
from tools.errors import InputError
from tools.features import Features
from tools.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """(the run whose encoders are taken, the features of 12, 3 and 4 synthetic clips)."""
    folder, sizes = tmp_path_factory.mktemp("encoded"), dict(synthetic.SIZES)
    synthetic.SIZES.update(train=12, valid=3, test=4)
    small_model().save(folder / "run")
    command(encode, "synthetic", folder / "features", *encoders_of(folder / "run"))
    yield folder / "run", folder / "features"
    synthetic.SIZES.update(sizes)


def encoders_of(run):
    settings = "--copies 2 --snr 0 --workers 0 --device cpu".split()  # a GPU rounds to bf16
    return "--audio-encoder", run, "--video-encoder", run, *settings


@pytest.mark.parametrize("task", MODALITIES)
def test_a_batch_of_features_gives_the_losses_of_its_clips(encoded, task):
    run, folder = encoded
    clips, load = load_corpus("synthetic", "train")
    tokenizer = train_tokenizer([clip.text for clip in clips])
    torch.manual_seed(1)
    model = train.LlamaSMoP(task, LLM, run, run, tokenizer)
    assert model.audio_window == "clip"  # as in the run
    noise = load_noise(None, "synthetic")
    raw = ClipDataset(clips, load, ("audio", "video"), noise)
    stored = ClipDataset(*load_corpus(folder, "train"), model.modalities)
    for version in range(2):
        stored.load.copies = [f"copy{version}"]
        for ours, theirs in (([0, 1, 2], [0, 1, 2]), ([(i, 9) for i in range(3)], [(i, version) for i in range(3)])):
            with torch.no_grad():
                expected = torch.stack(model(collate([raw[key] for key in theirs])))
                found = torch.stack(model(collate([stored[key] for key in ours])))
            close(found, expected, rtol=2e-3, atol=0)  # of float16
    at_0_db = [ClipDataset(*load_corpus(data, "test"), model.modalities, noise, 0.0) for data in ("synthetic", folder)]
    with torch.no_grad():
        expected, found = (torch.stack(model(collate([data[i] for i in range(4)]))) for data in at_0_db)
    close(found, expected, rtol=2e-3, atol=0)


def test_training_draws_a_copy_for_each_clip_and_epoch(encoded):
    dataset = ClipDataset(*load_corpus(encoded[1], "train"), ("audio",), seed=1, clean_epochs=1)
    versions = {
        name: [dataset.load(clip, "audio", name) for clip in dataset.clips] for name in ("clean", "copy0", "copy1")
    }

    def drawn(epoch):
        items = [dataset[i, epoch]["audio_features"] for i in range(12)]
        return [next(name for name, of in versions.items() if torch.equal(of[i], x)) for i, x in enumerate(items)]

    assert set(drawn(0)) == {"clean"} and set(drawn(1)) == set(drawn(2)) == {"copy0", "copy1"}
    assert drawn(1) == drawn(1) != drawn(2)


def test_a_run_on_features_is_evaluated_alike_from_features_and_clips(encoded, tmp_path, capsys):
    """It needs no encoder flag, and eval.py finds the same WER from the clips; 0 dB is no other SNR."""
    settings = "--epochs 2 --clean-epochs 1 --max-frames 200 --workers 0 --device cpu".split()
    words = ("--data", encoded[1], "--llm", json.dumps(LLM), "--eval-snr", "clean 0", "--out", tmp_path)
    command(train, *words, *settings)
    assert (tmp_path / "clip.png").is_file()
    files = {name: (tmp_path / name).read_text() for name in ("results.json", "hypotheses.jsonl")}
    command(evaluation, tmp_path, "--data", "synthetic", "--snr", "clean", "0", "--device", "cpu")
    assert (tmp_path / "hypotheses.jsonl").read_text() == files["hypotheses.jsonl"]
    command(evaluation, tmp_path, "--snr", "clean", "0", "--device", "cpu")
    assert {name: (tmp_path / name).read_text() for name in files} == files
    with pytest.raises(InputError, match="snr5.safetensors: missing"):
        command(evaluation, tmp_path, "--snr", "clean", "5", "--device", "cpu")
    torch.manual_seed(3)
    other = Encoders("avsr", encoded[0], AVHUBERT)
    with pytest.raises(InputError, match="features: not made with the model's video encoder"):
        Features(encoded[1]).check(other, {})
    other = Encoders("asr", encoded[0], None, audio_pool=2)
    with pytest.raises(InputError, match="model's audio encoder: pool 4, clip, weights .*, not pool 2"):
        Features(encoded[1]).check(other, {})
    for module in (encode, lips):
        with pytest.raises(InputError, match="features"):
            command(module, encoded[1], tmp_path / "out", "--video-encoder" if module is encode else "--seed", 1)


def test_what_is_not_given_comes_from_the_features(encoded, tmp_path):
    facts = json.loads((encoded[1] / "features.json").read_text()) | {"audio_pool": 8}
    (tmp_path / "features.json").write_text(json.dumps(facts))
    pools = [train.parse_args(["--data", str(tmp_path), *given])[0].audio_pool for given in ((), ("--audio-pool", "4"))]
    assert pools == [8, 4]  # 4: the default, but given


def test_encoding_goes_on_shard_by_shard(encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "SHARD", 5)
    begin = (encode, "synthetic", tmp_path, *encoders_of(encoded[0]))
    command(*begin)
    files = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*.safetensors"))}
    assert len(files) == 3 * 3 + 1 + 2
    whole, of_whole = load_corpus(encoded[1], "train")
    for clip, same in zip(load_corpus(tmp_path, "train")[0], whole, strict=True):
        close(Features(tmp_path)(clip, "audio", "copy1"), of_whole(same, "audio", "copy1"), atol=2e-3)  # another batch
    lost = list(files)[3:6]
    for file in lost:
        file.unlink()
    encode_shard, encoded_shards = encode.encode_shard, []
    monkeypatch.setattr(encode, "encode_shard", lambda *args: encoded_shards.append(0) or encode_shard(*args))
    command(*begin)
    assert len(encoded_shards) == 3
    assert {file: file.read_bytes() for file in files} == files
    with pytest.raises(InputError, match="begun with other settings .seed 0, now 1."):
        command(*begin, "--seed", 1)
    with safe_open(lost[0], "pt") as file:
        assert file.get_tensor(next(iter(file.keys()))).dtype == torch.float16


def test_greedy_ctc_joins_repetitions_and_drops_blanks(monkeypatch):
    reader = lips.LipReader(" ab", AVHUBERT)
    classes = torch.tensor([[2, 2, 0, 2, 1, 3, 3, 0], [0, 3, 1, 0, 1, 0, 2, 2]])  # 1 is the space
    monkeypatch.setattr(reader, "score", lambda batch: torch.nn.functional.one_hot(classes, 4))
    assert reader.read({"video_lengths": torch.tensor([8, 5])}) == ["aa b", "b  "]


def test_padding_does_not_change_the_loss_of_lips():
    items, model = small_batch("vsr", texts=("a b", "b", "a")), lips.LipReader(" ab", AVHUBERT).eval()
    alone = sum(len(item["text"]) * model(collate([item])).lm for item in items) / 5  # characters
    close(model(collate(items)).lm, alone, atol=1e-4)


def test_lips_learn_and_serve_as_video_encoder(encoded, tmp_path):
    words = ("synthetic", tmp_path, "--encoder", json.dumps(AVHUBERT), "--workers", 0, "--device", "cpu")
    command(lips, *words, "--epochs", 3, "--lr", 3e-3)
    losses = [line["lm"] for line in metrics(tmp_path) if "lm" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert json.loads((tmp_path / "results.json").read_text())["wer"].keys() == {"valid", "test"}
    encoder = Encoders("vsr", None, tmp_path).video_encoder
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(x, saved[f"video_encoder.{name}"]) for name, x in encoder.state_dict().items())
