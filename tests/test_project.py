"""Tests: against published numbers, against a naive loop, one clip against a batch, and every command as a user runs it.

    pytest -q                  # a few minutes on two CPU cores
    pytest -q -m slow          # many minutes: killed runs, damaged clips

`golden/smop.npz` holds outputs, losses and gradients of the authors' published mixture (4 experts, top 2) with random
weights. More published numbers (AV-HuBERT, the whole model, transforms, mouth regions) are in ../shared/golden, where that exists;
without it those tests are skipped.
"""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import wave
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)

import avhubert
import data
import eval as eval_module
import synthetic
import train
from avhubert import AVHubertEncoder
from data import ClipDataset, FrameBatches, collate, load_corpus, read_manifest
from eval import evaluate, word_error_rate
from model import (
    MARKERS,
    LlamaSMoP,
    add_lora,
    load_whisper,
    train_tokenizer,
    whisper_frames,
    whisper_on_clip,
    write_atomically,
)
from smop import MultimodalSMoP, SMoP, load_balancing_loss, router_z_loss
from study import bench
from tools import prepare, transcribe
from tools.published import published_state, save_published

torch.set_num_threads(1)  # as the commands below: sums depend on the number of threads
HERE = Path(__file__).resolve().parent.parent
GOLDEN = HERE.parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no published numbers in {GOLDEN}")
LLM = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
}
WHISPER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
PROJECTORS = ["MLP", "JEJR", "JEDR", "DEDR"]
AVHUBERT = {"dim": 32, "layers": 1, "heads": 2, "stem_width": 8, "stem_stride": 4, "trunk_widths": [8, 8, 8, 8]}


def close(a, b, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


# --- avhubert.py -------------------------------------------------------------------------------------------------


@needs_golden
def test_avhubert_equals_published_numbers():
    golden = np.load(GOLDEN / "avhubert-tiny.npz")
    encoder = AVHubertEncoder.from_fairseq(GOLDEN / "avhubert-tiny.pt")
    video, mask = torch.from_numpy(golden["video"]), ~torch.from_numpy(golden["padding_mask"])
    close(encoder(video), golden["features"], atol=2e-5)
    close(encoder(video, mask), golden["features_with_padding_mask"], atol=2e-5)
    close(encoder(video[1:, :, :20]), golden["features_clip1_alone"], atol=2e-5)


@pytest.mark.parametrize("layer_norm_first", [True, False])
def test_video_padding_changes_nothing_even_in_training(layer_norm_first):
    torch.manual_seed(0)
    encoder = AVHubertEncoder(**AVHUBERT, layer_norm_first=layer_norm_first)
    video = torch.randn(1, 1, 9, 88, 88)
    padded = F.pad(video, (0, 0, 0, 0, 0, 5), value=7.0)
    mask = torch.arange(14)[None] < 9
    for mode in (True, False):
        encoder.train(mode)
        close(encoder(padded, mask)[:, :9], encoder(video), atol=1e-4)


def test_frozen_encoder_keeps_its_batch_norm():
    encoder = AVHubertEncoder(**AVHUBERT).requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    assert not any(module.training for module in encoder.train().modules())
    encoder(torch.randn(2, 1, 5, 88, 88))
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())
    assert encoder.requires_grad_(True).train().training


class Touch:
    """Unpickling this creates a file: a checkpoint can run any code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_checkpoint_that_runs_code_is_refused(tmp_path):
    torch.save({"model": Touch(str(tmp_path / "ran"))}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt: refused.*open"):
        AVHubertEncoder.from_fairseq(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)["model"].close()  # what would have happened
    assert (tmp_path / "ran").exists()


def test_packed_checkpoint_is_refused(tmp_path):
    torch.save({"model": torch.zeros(10**6)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert (tmp_path / "bomb.pt").stat().st_size < 10**5
    with pytest.raises(ValueError, match="bomb.pt: refused, 400.* bytes are packed into"):
        avhubert.load_inert(tmp_path / "bomb.pt")
    assert len(avhubert.load_inert(tmp_path / "plain.pt")["model"]) == 10**6


def test_objects_of_foreign_packages_become_inert(tmp_path, monkeypatch):
    module = type(sys)("fairseq")
    module.Dictionary = type("Dictionary", (), {"__module__": "fairseq", "__init__": lambda self: pytest.fail("ran")})
    monkeypatch.setitem(sys.modules, "fairseq", module)
    torch.save({"task": module.Dictionary.__new__(module.Dictionary), "x": torch.ones(2)}, tmp_path / "a.pt")
    monkeypatch.delitem(sys.modules, "fairseq")
    loaded = avhubert.load_inert(tmp_path / "a.pt")
    assert loaded["x"].tolist() == [1, 1] and loaded["task"] == {}


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"text")
    with pytest.raises(ValueError, match="a.pt: not a PyTorch checkpoint"):
        AVHubertEncoder.from_fairseq(tmp_path / "a.pt")
    sizes = {"encoder_embed_dim": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_embed_dim": 32}
    sizes |= {"layer_norm_first": True, "conv_pos": 8, "conv_pos_groups": 2, "modality_fuse": "concat"}
    for cfg, message in (
        ({}, "not a pretrained AV-HuBERT"),
        (sizes | {"resnet_relu_type": "prelu"}, "missing weights"),
    ):
        torch.save({"model": {}, "cfg": {"model": cfg}}, tmp_path / "b.pt")
        with pytest.raises(ValueError, match=f"b.pt: {message}"):
            AVHubertEncoder.from_fairseq(tmp_path / "b.pt")


# --- model.py ----------------------------------------------------------------------------------------------------


def write_tokenizer(folder, words, **special):
    """A tokenizer of transformers whose tokens are `words`, numbered as listed."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def published_parts(tmp_path_factory):
    """(folder, description): the golden whole model as its authors' users have it, with llm/, whisper/ and model.pth."""
    folder = tmp_path_factory.mktemp("published")
    info = json.loads((GOLDEN / "llama_smop_tiny/model.json").read_text())
    weights = load_file(GOLDEN / "llama_smop_tiny/weights.safetensors")
    bos, eos = list(info["token_ids"])[:2]
    write_tokenizer(folder / "llm", [f"w{i}" for i in range(62)] + [bos, eos], bos_token=bos, eos_token=eos)
    llm = LlamaForCausalLM(LlamaConfig(**info["llama"] | {"vocab_size": 64, "pad_token_id": None}))
    llm.load_state_dict({k.removeprefix("llm."): v[: len(llm.get_parameter(k.removeprefix("llm.")))]  # 5 rows are ours
                         for k, v in weights.items() if k.startswith("llm.") and "lora" not in k})  # fmt: skip
    llm.save_pretrained(folder / "llm")
    whisper = WhisperModel(
        WhisperConfig(**info["whisper"], decoder_layers=1, decoder_attention_heads=4, vocab_size=51865)
    )
    prefix = "audio_encoder."
    whisper.encoder.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    whisper.save_pretrained(folder / "whisper")
    WhisperFeatureExtractor().save_pretrained(folder / "whisper")
    video = avhubert.load_inert(GOLDEN / "avhubert-tiny.pt")["model"]
    torch.save(weights | {f"video_encoder.{name}": value for name, value in video.items()}, folder / "model.pth")
    return folder, info


def from_published(folder, checkpoint="model.pth", **settings):
    """As a user of the golden model calls it; its LoRA scale and prompt are not the defaults."""
    settings = {"lora_scale": 0.25, "prompt": "w1 w2 w3 w4 w5 w6"} | settings
    parts = folder / "llm", folder / "whisper", GOLDEN / "avhubert-tiny.pt"
    return LlamaSMoP.from_published(folder / checkpoint, *parts, **settings)


@pytest.fixture(scope="module")
def published(published_parts):
    """(model, description, cases, {published name: parameter}) of the golden whole model, loaded through our doors."""
    folder, info = published_parts
    model = from_published(folder)
    assert model.config["lora_rank"] == info["lora"]["real_rank"] and model.config["dim_hidden"] == 96
    ours = {p.data_ptr(): p for p in model.parameters()}
    named = {name: ours.get(x.data_ptr()) for name, x in published_state(model).items()}
    return model, info, np.load(GOLDEN / "llama_smop_tiny/cases.npz"), named


@needs_golden
@pytest.mark.parametrize("case", ["b1", "b2", "short", "round58"])
def test_whole_model_equals_published_numbers(published, case):
    model, info, cases, named = published
    get = lambda name: torch.from_numpy(cases[f"{case}.{name}"])  # noqa: E731
    texts = info["cases"][case]["texts"]
    frames = info["cases"][case]["clips_frames_samples"][0][0]
    waves = [get(f"wave{i}").numpy() for i in range(len(texts))]
    items = [
        {"id": case, "text": text, "audio": data.transform_audio(data.fit_audio(samples, 640 * frames))}
        for text, samples in zip(texts, waves)
    ]
    batch = collate(items)
    close(batch["audio"], get("audio")[..., 0])
    video = get("video").transpose(1, 2)  # already cut to whole pools; give the raw number of frames back
    batch["video"] = F.pad(video, (0, 0, 0, 0, 0, frames - video.shape[2]))
    batch["video_lengths"] = torch.full((len(texts),), frames)

    embeddings, mask, labels, routing = model.embed(batch, batch["texts"])
    close(embeddings, get("embeddings"), atol=5e-5)
    assert torch.equal(labels[:, 1:], get("labels")[:, 1:])
    close(model.llm(inputs_embeds=embeddings, attention_mask=mask).logits, get("logits"), atol=2e-4)
    model.zero_grad()
    losses = model(batch)
    for ours, name in zip(losses, ("total_loss", "lm_loss", "load_balancing_loss", "z_loss")):
        close(ours, get(name), atol=2e-5)
    losses.total.backward()
    gradients = [name for name in cases.files if name.startswith(f"{case}.grad.")]
    assert len(gradients) == sum(p.requires_grad for p in model.parameters())
    for name in gradients:
        close(named[name.removeprefix(f"{case}.grad.")].grad, cases[name], rtol=1e-3, atol=2e-5)

    if len(texts) == 1:
        close(model.embed(batch)[0], get("test_embeddings"), atol=5e-5)
        for beams, name in ((1, "decoded_greedy"), (4, "decoded_beam")):
            expected = model.tokenizer.batch_decode(get(name), skip_special_tokens=True)
            assert model.generate(batch, num_beams=beams, max_new_tokens=8) == expected


def test_audio_frames_equal_published_rule():
    assert whisper_frames(torch.tensor([640, 8320, 48_128, 479_789, 480_640])).tolist() == [25, 26, 150, 1499, 1500]
    if GOLDEN.is_dir():
        rule = np.load(GOLDEN / "llama_smop_tiny/audio_truncation.npz")
        frames = whisper_frames(torch.from_numpy(rule["samples"]))
        assert torch.equal(frames, torch.from_numpy(rule["frames_kept_exact"]))


@needs_golden
def test_published_checkpoint_goes_both_ways(published_parts, published, tmp_path):
    folder, _ = published_parts
    given = torch.load(folder / "model.pth", weights_only=True)
    save_published(published[0], tmp_path / "again.pth")
    saved = torch.load(tmp_path / "again.pth", weights_only=True)
    assert saved.keys() == given.keys() and all(torch.equal(saved[name], given[name]) for name in given)
    save_file({name: value.contiguous() for name, value in given.items()}, folder / "model.safetensors")
    moved = {name: x.bfloat16() if x.is_floating_point() else x for name, x in given.items()}  # as a bf16 run holds it
    moved["video_encoder.feature_extractor_video.resnet.frontend3D.1.running_mean"] += 1
    torch.save(moved, folder / "moved.pth")
    batch = collate(small_batch(texts=("w1 w2", "w3", "w4")))
    expected = published[0](batch).total
    close(from_published(folder, "model.safetensors")(batch).total, expected)
    model = from_published(folder, "moved.pth")
    assert model.video_encoder.resnet.frontend3D[1].running_mean.mean() > 0.9  # BatchNorm's statistics are the file's
    model.video_encoder.load_state_dict(published[0].video_encoder.state_dict())
    close(model(batch).total, expected, rtol=0.01)
    model = from_published(folder, "moved.pth")
    model.save(tmp_path / "run")
    close(LlamaSMoP.load(tmp_path / "run")(batch).total, model(batch).total)


@needs_golden
@pytest.mark.parametrize("kinds", [("audio", "video"), ("audio",), ("video",)])
def test_published_mlp_is_one_expert(published_parts, kinds):
    folder, _ = published_parts
    weights = torch.load(folder / "model.pth", weights_only=True)
    expert = {name[26:]: x for name, x in weights.items() if name.startswith("audiovisual_proj.experts.1.")}
    mlp = {name: x for name, x in weights.items() if name.startswith(("llm.", *(f"{kind}_enc" for kind in kinds)))}
    for kind in kinds:
        mlp |= {f"{kind}_proj{name}": x + (kind == "video") for name, x in expert.items()}
    torch.save(mlp, folder / "mlp.pth")
    model = from_published(folder, "mlp.pth")
    assert model.kinds == kinds and model.config["projector"] == "MLP"
    for kind in kinds:
        projector = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.LayerNorm(64))
        projector.load_state_dict({name[1:]: x + (kind == "video") for name, x in expert.items()})
        x = torch.randn(2, 3, 64)
        close(model.projector({kind: x})[0][kind], projector(x))
    assert published_state(model).keys() == mlp.keys()


@needs_golden
def test_published_checkpoint_must_fit(published_parts, tmp_path):
    folder, _ = published_parts
    weights = torch.load(folder / "model.pth", weights_only=True)
    wrong = {
        "encoder.*frozen": {"audio_encoder.conv1.bias": weights["audio_encoder.conv1.bias"] + 0.1},
        "embed_tokens.*frozen": {"llm.model.embed_tokens.weight": weights["llm.model.embed_tokens.weight"] * 1.1},
        "avg_pool.weight: the model has None": {"avg_pool.weight": torch.ones(1)},
        "epoch: the model has None": {"epoch": 3},
        "lora_up_V.weight: the model has .* the file None": {"llm.model.layers.1.self_attn.lora_up_V.weight": None},
        "experts.3.0.*: the model has None": {"audiovisual_proj.gate.weight": torch.ones(3, 64)},
        "flat file .* got": {"audiovisual_proj.gate.weight": None, "audiovisual_proj.experts.0.0.weight": None},
    }
    for message, change in wrong.items():
        state = {name: x for name, x in (weights | change).items() if x is not None}
        torch.save(state, folder / "wrong.pth")
        with pytest.raises(ValueError, match=f"wrong.pth: .*{message}"):
            from_published(folder, "wrong.pth")
    torch.save({"state_dict": weights}, folder / "wrong.pth")
    with pytest.raises(ValueError, match="wrong.pth: a flat file .* got state_dict"):
        from_published(folder, "wrong.pth")
    torch.save(weights | {"llm.evil": Touch(str(tmp_path / "ran"))}, folder / "wrong.pth")
    with pytest.raises(ValueError, match="wrong.pth: refused.*open"):
        from_published(folder, "wrong.pth")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="model.pth: with top-1 the published gate is the constant 1"):
        from_published(folder, top_k=1)
    with pytest.raises(ValueError, match="published form knows JEJR and MLP"):
        save_published(small_model("asr"), tmp_path / "a.pth")


def small_model(task="avsr", projector="DEDR", **changes):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["lay blue at a one now", "set red by b two soon"], vocab_size=60)
    settings = {"audio_window": "clip", "prompt": ""} | changes
    model = LlamaSMoP(task, LLM, WHISPER | {"init_std": 0.2}, AVHUBERT, tokenizer, projector=projector, **settings)
    for name, buffer in model.named_buffers():  # random statistics of BatchNorm, so that differences would show
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return model


def small_batch(task="avsr", seconds=(0.8, 1.56, 0.28), texts=("lay blue", "set red by b", "now")):
    items = []
    for i, (length, text) in enumerate(zip(seconds, texts)):
        g = torch.Generator().manual_seed(i)
        frames = round(length * 25)
        item = {"id": str(i), "text": text, "audio": torch.randn(frames * 640, generator=g)}
        item["video"] = torch.randn(1, frames, 88, 88, generator=g)
        items.append({k: v for k, v in item.items() if k in ("id", "text", *data.TASKS[task])})
    return items


@pytest.mark.parametrize("window", ["clip", "30s"])
def test_batch_equals_its_clips_one_by_one(window):
    model = small_model(audio_window=window).eval()
    items = small_batch()
    batch = collate(items)
    features, counts, routing = model.project(batch)
    losses = model(batch)
    lm, words = 0, 0
    for i, item in enumerate(items):
        alone = collate([item])
        one, count, _ = model.project(alone)
        for kind in features:
            assert counts[kind][i] == count[kind][0]
            close(features[kind][i, : counts[kind][i]], one[kind][0], rtol=0, atol=1e-4)
        text = [*model.tokenizer(item["text"], add_special_tokens=False).input_ids, model.tokenizer.eos_token_id]
        logits = model.llm(inputs_embeds=model.embed(alone, alone["texts"])[0]).logits[0, -len(text) - 1 : -1]
        lm, words = lm + F.cross_entropy(logits, torch.tensor(text), reduction="sum"), words + len(text)
    close(losses.lm, lm / words, rtol=0, atol=1e-4)
    for kind, r in routing.items():  # over real tokens alone
        logits, experts = (torch.cat([row[:n] for row, n in zip(x, counts[kind])]) for x in (r.logits, r.experts))
        close(r.load_balancing_loss, load_balancing_loss(logits, experts))
        close(r.router_z_loss, router_z_loss(logits))
    close(losses.total, losses.lm + 0.01 * routing.load_balancing_loss + 0.001 * routing.router_z_loss)
    for beams in (1, 3):
        alone = [model.generate(collate([item]), beams, max_new_tokens=6)[0] for item in items]
        assert model.generate(batch, beams, max_new_tokens=6) == alone
    assert len(set(alone)) > 1


def many_experts(projector):
    """A model with more experts than some of its tokens, with a frozen video encoder: its BatchNorm has no batch."""
    model = small_model(projector=projector, num_experts=8, top_k=1)
    model.video_encoder.requires_grad_(False).eval()
    return model


def _step(rank, folder):
    """One of two processes, the second with one clip of three."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for projector in ("DEDR", "JEJR"):
        model = many_experts(projector)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            losses = wrapped(collate(small_batch()[2 * rank :][:2]), dist.group.WORLD)
            losses.total.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        torch.save((torch.stack(losses[:4]).detach(), gradients), f"{folder}/{projector}{rank}.pt")
    del wrapped  # see train.py
    dist.destroy_process_group()


def test_two_processes_give_the_losses_and_the_gradient_of_one(tmp_path):
    torch.multiprocessing.spawn(_step, (str(tmp_path),), nprocs=2)
    for projector in ("DEDR", "JEJR"):
        model = many_experts(projector)
        losses = model(collate(small_batch()))
        losses.total.backward()
        for rank in range(2):
            theirs, gradients = torch.load(tmp_path / f"{projector}{rank}.pt")
            close(theirs, torch.stack(losses[:4]), atol=1e-6)
            assert len(gradients) == sum(p.requires_grad for p in model.parameters())
            for name, gradient in gradients.items():
                close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
        idle = [
            not any(p.grad.any() for p in e.parameters()) for s in model.projector.smops.values() for e in s.experts
        ]
        assert any(idle)  # some expert had no token


@pytest.mark.parametrize("task, projector", [("asr", "MLP"), ("vsr", "DEDR"), *zip(["avsr"] * 4, PROJECTORS)])
def test_save_and_load(tmp_path, task, projector):
    model = small_model(task, projector)
    batch = collate(small_batch(task))
    losses = model(batch)
    assert (losses.total == losses.lm) == (projector == "MLP")  # which has no router to balance
    losses.total.backward()  # changes BatchNorm's statistics
    model.eval().save(tmp_path / "run")
    loaded = LlamaSMoP.load(tmp_path / "run")
    for a, b in zip(model(batch), loaded(batch)):
        close(a, b)
    assert model.generate(batch, max_new_tokens=5) == loaded.generate(batch, max_new_tokens=5)


@needs_golden
def test_frozen_parts_are_named_not_saved(published, tmp_path):
    model = published[0]
    model.save(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"projector", "llm", "new_tokens", "video_encoder"}
    assert all(
        ".bn" in name or "3D.1." in name or "downsample.1." in name for name in names if name.startswith("video")
    )
    assert all("lora" in name for name in names if name.startswith("llm"))
    batch = collate(small_batch(texts=("w1 w2", "w3", "w4")))
    close(model(batch).total, LlamaSMoP.load(tmp_path)(batch).total)
    model.train()
    assert model.training and not model.audio_encoder.training and not model.video_encoder.training
    frozen = [p for part in (model.audio_encoder, model.video_encoder) for p in part.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in frozen)
    model.eval()


def test_trained_video_encoder_serves_another_run(tmp_path):
    first = small_model("vsr")
    batch = collate(small_batch("avsr"))
    first(batch)
    first.save(tmp_path / "vsr")
    second = LlamaSMoP("avsr", LLM, WHISPER, tmp_path / "vsr", first.tokenizer, audio_window="clip")
    lengths = batch["video_lengths"]
    close(second.encode_video(batch, lengths), first.eval().encode_video(batch, lengths))
    assert not any(p.requires_grad for p in second.video_encoder.parameters())


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("task", ["asr", "vsr"])
def test_avsr_run_serves_one_modality(tmp_path, projector, task):
    model = small_model(projector=projector).eval()
    model.save(tmp_path)
    part = LlamaSMoP.load(tmp_path, task=task)
    (kind,) = part.kinds
    assert len(part.projector.smops) == 1 and not hasattr(part, {"asr": "video_encoder", "vsr": "audio_encoder"}[task])
    batch = collate(small_batch())
    features, _, routing = part.project(batch)
    expected, _, expected_routing = model.project(batch)
    close(features[kind], expected[kind])
    close(routing[kind].logits, expected_routing[kind].logits)
    part.save(tmp_path / "part")
    with pytest.raises(ValueError, match=f"part: trained on {task}, which lacks what avsr needs"):
        LlamaSMoP.load(tmp_path / "part", task="avsr")


def write_whisper(folder, **settings):
    """A whole Whisper as the hub has it, decoder included."""
    sizes = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "init_std": 0.2}
    whisper = WhisperForConditionalGeneration(WhisperConfig(**WHISPER | sizes | settings)).eval()
    whisper.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=whisper.config.num_mel_bins).save_pretrained(folder)
    return whisper


@pytest.mark.parametrize("mels, vocab", [(80, 51864), (80, 51865), (128, 51866)])  # .en, the others, large-v3
def test_any_whisper(tmp_path, mels, vocab):
    whisper = write_whisper(tmp_path, vocab_size=vocab, num_mel_bins=mels)
    encoder, log_mel = load_whisper(tmp_path)
    model = small_model("asr", audio_window="30s")
    model.audio_encoder, model.log_mel = encoder, log_mel
    batch = collate(small_batch("asr", seconds=[1.0], texts=["lay"]))
    mel = WhisperFeatureExtractor(feature_size=mels)(
        batch["audio"][0].numpy(), sampling_rate=16000, return_tensors="pt"
    )
    with torch.no_grad():
        expected = whisper.model.encoder(mel.input_features).last_hidden_state
        close(whisper_on_clip(encoder, mel.input_features, torch.ones(1, 1500, dtype=torch.bool)), expected, atol=1e-4)
    assert mel.input_features.shape[1] == mels and not any(p.requires_grad for p in encoder.parameters())
    assert not model.train().audio_encoder.training  # as it is frozen
    close(model.encode_audio(batch, torch.tensor([50])), expected[:, :50], atol=1e-4)
    whisper.model.encoder.save_pretrained(tmp_path / "alone")
    shutil.copy(tmp_path / "preprocessor_config.json", tmp_path / "alone")
    alone, _ = load_whisper(tmp_path / "alone")
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), encoder.parameters(), strict=True))


def write_llama(folder, rows, **settings):
    llm = LlamaForCausalLM(LlamaConfig(**LLM | {"vocab_size": rows} | settings))
    llm.save_pretrained(folder)
    return llm


def byte_level_tokenizer(folder):
    """As Llama-3 and SmolLM2: byte-level BPE which, asked for special tokens, puts BOS first."""
    from tokenizers import ByteLevelBPETokenizer, processors

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["lay blue at a one now"], 280, special_tokens=["<|begin|>", "<|end|>"])
    tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>").save_pretrained(
        folder
    )


WORDS = ["<unk>", "<s>", "</s>", "lay", "blue", "at", "a", "now"]
TOKENIZERS = {
    "no pad": lambda folder: write_tokenizer(folder, WORDS, unk_token="<unk>", bos_token="<s>", eos_token="</s>"),
    "no bos": lambda folder: write_tokenizer(folder, WORDS, unk_token="<unk>", eos_token="</s>"),
    "pad is eos": lambda folder: write_tokenizer(folder, WORDS, bos_token="<s>", eos_token="</s>", pad_token="</s>"),
    "pad is unk": lambda folder: write_tokenizer(folder, WORDS, unk_token="<unk>", eos_token="</s>", pad_token="<unk>"),
    "sentencepiece": lambda folder: train_tokenizer(["lay blue at a now"], 60).save_pretrained(folder),
    "byte-level": byte_level_tokenizer,
}


@pytest.mark.parametrize("tokenizer, tied, spare", [  # spare: rows without a token
    *((name, True, 0) for name in TOKENIZERS), ("no pad", True, 3), ("no pad", False, 0), ("byte-level", False, 64),
])  # fmt: skip
def test_any_llama(tmp_path, tokenizer, tied, spare):
    TOKENIZERS[tokenizer](tmp_path / "llm")
    plain = AutoTokenizer.from_pretrained(tmp_path / "llm")
    rows = len(plain) + spare
    torch.manual_seed(0)
    llm = write_llama(tmp_path / "llm", rows, tie_word_embeddings=tied)
    model = LlamaSMoP("asr", tmp_path / "llm", WHISPER, audio_window="clip", prompt="at").eval()
    model.save(tmp_path / "run")
    batch = collate(small_batch("asr", texts=("lay blue", "a now", "at")))
    for one in (model, LlamaSMoP.load(tmp_path / "run")):
        ends = one.llm.get_input_embeddings().weight, one.llm.get_output_embeddings().weight
        assert (ends[0] is ends[1]) == tied and len(ends[0]) == max(rows, len(plain) + 5)
        if rows == len(plain):
            assert torch.equal(ends[0][:rows], llm.get_input_embeddings().weight)
        assert one.tokenizer.convert_tokens_to_ids(["<pad>", *MARKERS]) == list(range(len(plain), len(plain) + 5))
        close(one(batch).total, model(batch).total)
    _, mask, labels, _ = model.embed(batch, batch["texts"])
    counts = {"audio": torch.tensor([2, 1, 3])}
    ids, labels = model.token_ids(counts, batch["texts"])
    begin = [] if plain.bos_token_id is None else [plain.bos_token_id]
    for row, target, count, text in zip(ids.tolist(), labels.tolist(), counts["audio"], batch["texts"]):
        text = [*plain(text, add_special_tokens=False).input_ids, plain.eos_token_id]
        prompt = plain("at", add_special_tokens=False).input_ids
        expected = [*begin, len(plain) + 1, *[-1] * int(count), len(plain) + 2, *prompt, *text]
        assert row == expected + [len(plain)] * (len(row) - len(expected))
        assert [t for t in target if t != -100] == text and (len(plain) in row) == (len(row) > len(expected))
    lengths = [
        model.embed(collate([item]), [item["text"]])[0].shape[1] for item in small_batch("asr", texts=batch["texts"])
    ]
    assert mask.sum(1).tolist() == lengths  # EOS is not taken for padding
    alone = [model.generate(collate([item]), max_new_tokens=5)[0] for item in small_batch("asr")]
    assert model.generate(batch, max_new_tokens=5) == alone


@pytest.mark.parametrize("projector", ["JEJR", "MLP"])
def test_published_form_of_a_tied_llm(tmp_path, projector):
    write_tokenizer(tmp_path / "llm", WORDS, bos_token="<s>", eos_token="</s>")
    write_llama(tmp_path / "llm", len(WORDS), tie_word_embeddings=True)
    write_whisper(tmp_path / "whisper")
    parts = tmp_path / "llm", tmp_path / "whisper"
    model = LlamaSMoP("asr", *parts, projector=projector, num_experts=3, dim_hidden=20, lora_rank=2).eval()
    with torch.no_grad():
        for parameter in [*model.llm.parameters(), *model.projector.parameters()]:
            if parameter.requires_grad:
                parameter.uniform_(-0.5, 0.5)
        model.llm.get_input_embeddings().weight[len(WORDS) :].uniform_(-0.5, 0.5)  # the added tokens
    save_published(model, tmp_path / "a.pth")
    again = LlamaSMoP.from_published(tmp_path / "a.pth", *parts)
    batch = collate(small_batch("asr"))
    close(again(batch).lm, model(batch).lm)
    assert again.llm.get_output_embeddings().weight is again.llm.get_input_embeddings().weight
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    state["llm.lm_head.weight"] = (
        state["llm.lm_head.weight"] + F.one_hot(torch.tensor(len(WORDS)), len(WORDS) + 5)[:, None]
    )
    torch.save(state, tmp_path / "untied.pth")
    with pytest.raises(ValueError, match="untied.pth: llm.model.embed_tokens.weight is frozen"):
        LlamaSMoP.from_published(tmp_path / "untied.pth", *parts)


def test_decoding_is_ours_whatever_the_checkpoint_prefers(tmp_path):
    write_tokenizer(tmp_path, WORDS, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(3)
    write_llama(tmp_path, len(WORDS))
    GenerationConfig(do_sample=True, top_k=3, repetition_penalty=9.0, no_repeat_ngram_size=1).save_pretrained(tmp_path)
    model = LlamaSMoP("asr", tmp_path, WHISPER, audio_window="clip").eval()
    batch = collate(small_batch("asr", seconds=[1.0], texts=["lay"]))
    embeddings, ids = model.embed(batch)[0], []
    for _ in range(8):
        ids.append(int(model.llm(inputs_embeds=embeddings).logits[0, -1].argmax()))
        embeddings = torch.cat([embeddings, model.llm.get_input_embeddings()(torch.tensor([ids[-1:]]))], 1)
    assert len(set(ids)) < len(ids)  # the penalties would have changed this
    expected = model.tokenizer.decode(ids[: ids.index(2)] if 2 in ids else ids, skip_special_tokens=True)
    assert model.generate(batch, max_new_tokens=8) == [expected]
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(ids[3])
    assert model.generate_ids(batch, max_new_tokens=8).tolist() == [ids[: ids.index(ids[3]) + 1]]


@pytest.mark.parametrize("part", ["llm", "run"])
def test_folder_that_brings_code_is_refused(tmp_path, part, monkeypatch):
    """transformers would ask on the terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda question: "y")
    model = small_model("asr")
    model.save(tmp_path / "run")
    write_tokenizer(tmp_path / "llm", WORDS, eos_token="</s>")
    folder = tmp_path / part
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if part == "llm":
        config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        LlamaSMoP.load(folder) if part == "run" else LlamaSMoP("asr", folder, WHISPER, tokenizer=model.tokenizer)
    assert not (tmp_path / "ran").exists()


def test_nothing_unpickles_freely():
    for path in (path for folder in (".", "tools", "study") for path in (HERE / folder).glob("*.py")):
        if not path.name.startswith("test_"):
            text = path.read_text()
            assert text.count("torch.load(") == len(re.findall(r"torch\.load\([^)]*weights_only=True", text)), path
            assert not re.search(r"import pickle|allow_pickle|weights_only=False|trust_remote_code=True", text), path


def test_clear_errors_of_the_model(tmp_path):
    model = small_model("asr")
    with pytest.raises(ValueError, match="long: longer than Whisper's 30 s"):
        model(collate([{"id": "long", "text": "lay", "audio": torch.zeros(480640)}]))
    model = small_model("vsr")
    with pytest.raises(ValueError, match="0: too short for video pooling by 2"):
        model(collate(small_batch("vsr", seconds=[0.04], texts=["lay"])))
    with pytest.raises(ValueError, match="asr, vsr, avsr"):
        LlamaSMoP("tts", LLM)
    with pytest.raises(FileNotFoundError, match="config.json"):
        LlamaSMoP.load(tmp_path)
    model.save(tmp_path / "run")
    with pytest.raises(ValueError, match="model.safetensors: .*gate.weight: the model has.*the file"):
        LlamaSMoP.load(tmp_path / "run", num_experts=3)


def test_lora_is_on_queries_and_values():
    llm = add_lora(LlamaForCausalLM(LlamaConfig(**LLM | {"hidden_size": 64, "vocab_size": 8})))
    x = torch.randn(3, 64)
    for layer in (llm.model.layers[0].self_attn.q_proj, llm.model.layers[0].self_attn.v_proj):
        a, b = layer.lora_A["default"].weight, nn.init.normal_(layer.lora_B["default"].weight)
        assert a.shape == (2, 64)  # a 32nd of the width
        close(layer(x), layer.base_layer(x) + 0.125 * x @ a.T @ b.T)
    trained = [name for name, p in llm.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all("lora_" in name for name in trained)


def test_place_and_bf16():
    """On a GPU, frozen matrices and the arithmetic are in bf16; here, on a CPU, by hand."""
    model, batch = small_model().place("cpu"), collate(small_batch())
    exact = model(batch).total
    for part in (model.audio_encoder, model.video_encoder, model.llm):
        part.requires_grad_(False)
    model.llm = add_lora(model.llm)
    model.bf16 = True
    model.halve_frozen()
    losses = model(batch)
    losses.total.backward()
    close(losses.total, exact, rtol=0.05)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32} and model.llm.lm_head.weight.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert model.eval().generate_ids(batch, 2, max_new_tokens=4).shape[0] == 3


# --- data.py -----------------------------------------------------------------------------------------------------


@needs_golden
def test_transforms_equal_published_numbers():
    golden = np.load(GOLDEN / "transforms.npz")
    for side in ("even", "odd"):
        grey = golden[f"{side}.frames_rgb_u8"] @ np.float32([0.2989, 0.587, 0.114])  # as torchvision does
        close(data.transform_video(grey), golden[f"{side}.video"])
        grey = golden[f"{side}.grey_as_rgb_u8"][..., 0]
        close(data.transform_video(grey), golden[f"{side}.grey_as_rgb_video"], atol=1e-3)  # their weights sum to 0.9999
    for n in (4000, 3200, 5120):
        close(data.transform_audio(data.fit_audio(golden["wave"], n)), golden[f"audio_cut_or_pad_{n}"][:, 0])


@pytest.mark.parametrize("snr", [-5.0, 0.0, 5.0])
def test_noise_has_the_stated_level_and_repeats(snr):
    clips, load = load_corpus("synthetic", "test")
    noise = np.random.default_rng(0).standard_normal(9000).astype(np.float32)
    clean = load(clips[0], "audio")
    dataset = ClipDataset(clips, load, "asr", noise=noise, snr=snr)
    noisy = dataset[0]["audio"]
    assert torch.equal(noisy, ClipDataset(clips, load, "asr", noise=noise, snr=snr)[0]["audio"])
    assert not torch.equal(noisy, ClipDataset(clips, load, "asr", noise=noise, snr=snr + 1)[0]["audio"])
    added = data.add_noise(clean, noise, snr, random.Random(f"0 0 {clips[0].id}")) - clean
    assert 10 * np.log10(np.mean(clean**2) / np.mean(added**2)) == pytest.approx(snr, abs=1e-3)
    close(noisy, data.transform_audio(clean + added), atol=1e-4)


def test_augmentation_depends_on_the_epoch_alone():
    clips, load = load_corpus("synthetic", "train")
    noise = np.random.default_rng(0).standard_normal(9000).astype(np.float32)
    draw = lambda epoch: [setattr(dataset, "epoch", epoch), dataset[3]][1]  # noqa: E731
    dataset = ClipDataset(clips, load, "avsr", train=True, noise=noise, clean_epochs=1)
    first, again, other = draw(1), draw(1), draw(2)
    for kind in ("audio", "video"):
        assert torch.equal(first[kind], again[kind]) and not torch.equal(first[kind], other[kind])
    plain = ClipDataset(clips, load, "avsr")[3]
    assert torch.equal(draw(0)["audio"], plain["audio"]) and not torch.equal(draw(0)["video"], plain["video"])
    dataset.noise = None  # masks alone
    assert not torch.equal(draw(1)["audio"], plain["audio"])
    square = np.random.default_rng(0).integers(0, 256, (2, 88, 88), np.uint8)
    mirrored = data.transform_video(square).flip(-1)
    assert 0 < sum(data.transform_video(square, random.Random(i)).equal(mirrored) for i in range(20)) < 20
    masked = data.mask_spans(np.ones(48000), 16000, random.Random(0))
    assert 0 < (masked == 0).sum() <= 3 * 6400 and set(masked) == {0, 1}  # three spans of up to 0.4 s


@pytest.mark.parametrize("world", [1, 2, 3])
def test_batches_lose_and_repeat_no_clip(world):
    frames = [10 + 7 * i % 90 for i in range(101)]
    seen, steps, orders = [], [], []
    for rank in range(world):
        sampler = FrameBatches(frames, 300, seed=1, rank=rank, world=world)
        sampler.epoch = 4
        batches = list(sampler)
        assert len(batches) == len(sampler) and all(batches)
        longer = [b for b in batches if len(b) * max(frames[i] for i in b) > 300]
        assert len(longer) <= (world > 1)  # what is left for too few processes joins another batch
        steps.append(len(batches))
        seen += [i for b in batches for i in b]
        sampler.skip = 2
        assert list(sampler) == batches[2:]
        sampler.epoch = 5
        orders.append(list(sampler) != batches[2:])
    assert sorted(seen) == list(range(101)) and len(set(steps)) == 1 and all(orders)


def test_synthetic_corpus_is_what_it_says():
    splits = {split: load_corpus("synthetic", split)[0] for split in ("train", "valid", "test")}
    texts = {split: {clip.text for clip in clips} for split, clips in splits.items()}
    assert (
        not texts["train"] & texts["test"]
        and not texts["train"] & texts["valid"]
        and not texts["valid"] & texts["test"]
    )
    clip = splits["test"][0]
    audio, video = (data.synthetic_media(clip, kind) for kind in ("audio", "video"))
    assert audio.shape == (640 * clip.frames,) and audio.dtype == np.float32
    assert video.shape == (clip.frames, 96, 96) and video.dtype == np.uint8
    assert np.array_equal(audio, data.synthetic_media(clip, "audio"))
    looks = {
        (i, *(synthetic.PHONES[p][0] for p in word)) for i, row in enumerate(synthetic.MATRIX) for word in row.values()
    }
    assert len(looks) == 14  # of 32 words: a perfect lip reader has a WER of 56 %


def write_media(path, seconds=1.0, fps=25, size=96, rate=16000, channels=1, audio=True, video=True):
    """A media file whose picture brightens with time, with a tone that starts in the middle."""
    with av.open(str(path), "w") as container:
        streams = []
        if video:
            stream = container.add_stream("libx264", rate=fps)
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            frames = [
                av.VideoFrame.from_ndarray(
                    np.full((size, size), 40 + 160 * t / (fps * seconds), np.uint8), format="gray"
                )
                for t in range(round(fps * seconds))
            ]
            for t, frame in enumerate(frames):
                frame.pts, frame.time_base = t, Fraction(1, fps)
            streams.append((stream, frames))
        if audio:
            stream = container.add_stream("aac", rate=rate, layout="stereo" if channels == 2 else "mono")
            t = np.arange(round(rate * seconds)) / rate
            tone = 0.3 * np.sin(2 * np.pi * 440 * t) * (t > seconds / 2)
            frame = av.AudioFrame.from_ndarray(
                np.tile(tone.astype(np.float32), (channels, 1)), "fltp", "stereo" if channels == 2 else "mono"
            )
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            streams.append((stream, [frame]))
        for stream, frames in streams:
            for frame in frames:
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize("fps, rate, channels", [(25, 16000, 1), (30, 44100, 2), (50, 8000, 1), (10, 48000, 2)])
def test_any_rate_becomes_25_fps_and_16_khz(tmp_path, fps, rate, channels):
    path = write_media(tmp_path / "a.mp4", fps=fps, rate=rate, channels=channels)
    video, audio = data.load_video(path), data.load_audio(path)
    assert video.shape == (25, 96, 96)
    brightness = video.mean((1, 2))
    expected = 40 + 160 * np.arange(25) / 25
    assert np.abs(brightness - expected).max() < 160 / min(fps, 25) + 12  # up to one source frame, and the codec
    assert abs(len(audio) - 16000) < 1600  # the AAC encoder pads to whole frames
    onset = np.flatnonzero(np.abs(audio) > 0.1)[0] / 16000
    assert onset == pytest.approx(0.5, abs=0.03)


def test_video_is_turned_upright(tmp_path):
    with av.open(str(tmp_path / "lying.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        picture = np.zeros((64, 128), np.uint8)
        picture[:32, :64] = 200  # top left
        for t in range(3):
            frame = av.VideoFrame.from_ndarray(picture, format="gray")
            frame.pts, frame.time_base = t, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    content = bytearray((tmp_path / "lying.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 44  # of the track: a quarter turn clockwise, in 16.16 (and 2.30) fixed point
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30)
    (tmp_path / "held.mp4").write_bytes(content)
    lying, held = data.load_video(tmp_path / "lying.mp4"), data.load_video(tmp_path / "held.mp4")
    assert lying.shape == (3, 64, 128) and np.array_equal(held, np.rot90(lying, -1, (1, 2)))  # top right now


def test_huge_picture_is_refused(tmp_path):
    """A hundred megapixels in a hundred kilobytes."""
    row = zlib.compress(bytes(10001) * 10000)
    chunks = [(b"IHDR", struct.pack(">2I5B", 10000, 10000, 8, 0, 0, 0, 0)), (b"IDAT", row), (b"IEND", b"")]
    png = b"".join(struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks)
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    with pytest.raises(ValueError, match="huge.png: 10000x10000 pixels, at most 9437184 are read"):
        data.load_video(tmp_path / "huge.png")


def test_manifests(tmp_path):
    (tmp_path / "test.csv").write_text('id,path,frames,text\na,a.mp4,25,"one, two"\nb,s/b.mp4,30,three\n')
    clips = read_manifest(tmp_path / "test.csv")
    assert [tuple(c) for c in clips] == [
        ("a", tmp_path / "a.mp4", 25, "one, two"),
        ("b", tmp_path / "s/b.mp4", 30, "three"),
    ]
    # auto_avsr's labels, and Llama-AVSR's
    (tmp_path / "labels").mkdir()
    (tmp_path / "lrs3" / "lrs3_text_seg24s" / "x").mkdir(parents=True)
    (tmp_path / "lrs3" / "lrs3_text_seg24s" / "x" / "1.txt").write_text("HELLO THERE\n")
    (tmp_path / "labels" / "l.csv").write_text(
        "lrs3,lrs3_video_seg24s/x/1.mp4,50,12 7 88\nlrs3,lrs3_video_seg24s/x/2.mp4,30,plain text\n"
        "lrs3,lrs3_video_seg24s/x/3.mp4,30,4,more text\nlrs3,lrs3_video_seg24s/x/4.mp4,30,4,2008\n"
    )
    clips = read_manifest(tmp_path / "labels" / "l.csv")
    assert clips[0].path == tmp_path / "lrs3" / "lrs3_video_seg24s/x/1.mp4"
    assert [c.text for c in clips] == ["HELLO THERE", "plain text", "more text", "2008"]
    assert clips[0].id == "lrs3_video_seg24s/x/1"


@pytest.mark.parametrize(
    "line, message",
    [
        ("a,a.mp4,25", "m.csv:2: expected id,path,frames,text"),
        ("a,a.mp4,many,text", "m.csv:2: expected .* number of frames"),
        ("a,a.mp4,0,text", "positive number"),
        ("a,a.mp4,25, ", "m.csv:2: empty transcript"),
        ("a,../../a.mp4,25,text", "lead out of the folder"),
        ("../a,a.mp4,25,text", "lead out of the folder"),
        ("a,a.mp4,25,one\na,b.mp4,25,two", "m.csv:3: the id 'a' stands for several"),
        ("", "no clips"),
        ("a,a,\xb2,t", "m.csv: not a CSV file in UTF-8"),  # written in Latin-1
        ('a,a,"1', "m.csv:2: expected"),
    ],
)
def test_bad_manifests_are_refused(tmp_path, line, message):
    (tmp_path / "m.csv").write_text(f"id,path,frames,text\n{line}\n", encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / "m.csv")


def test_bad_files_are_refused(tmp_path):
    def load(path, kind, frames=25):
        return data.load_media(data.Clip("x", path, frames, "text"), kind)

    good = write_media(tmp_path / "good.mp4")
    assert load(good, "video").shape == (25, 96, 96) and load(good, "audio").shape == (16000,)
    with pytest.raises(FileNotFoundError, match="none.mp4"):
        load(tmp_path / "none.mp4", "video")
    with pytest.raises(ValueError, match="mute.mp4: no audio track"):
        load(write_media(tmp_path / "mute.mp4", audio=False), "audio")
    with pytest.raises(ValueError, match="blind.mp4: no video track"):
        load(write_media(tmp_path / "blind.mp4", video=False), "video")
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:3000])
    with pytest.raises(ValueError, match="cut.mp4"):
        load(tmp_path / "cut.mp4", "video")
    with pytest.raises(ValueError, match="good.mp4: 25 frames at 25 fps, but its manifest says 40"):
        load(good, "video", frames=40)
    for name, size in (("tiny.mp4", 64), ("raw.mp4", 288)):  # what prepare.py has not seen must not be trained on
        with pytest.raises(ValueError, match=f"{name}: {size}x{size} pixels, but mouth regions of .* prepare.py"):
            load(write_media(tmp_path / name, size=size), "video")
    with pytest.raises(ValueError, match="at least 88x88"):
        data.transform_video(np.zeros((25, 64, 64), np.uint8))
    with wave.open(str(tmp_path / "good.wav"), "wb") as file:  # a .wav beside the video is read instead of its track
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(np.zeros(8000, "<i2").tobytes())
    assert not load(good, "audio").any()


# --- bench.py ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 4])
def test_shared_prefix_decodes_as_the_published_way(num_beams):
    clips, load = load_corpus("synthetic", "test")
    torch.manual_seed(0)
    tokenizer = train_tokenizer([clip.text for clip in clips])
    model = LlamaSMoP("avsr", LLM, WHISPER, AVHUBERT, tokenizer, audio_window="clip").eval()
    items = [ClipDataset(clips[:3], load, "avsr")[i] for i in range(3)]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6}
    alone = bench.one_by_one(model, items, num_beams, **settings)
    assert torch.equal(model.generate_ids(collate(items), num_beams, **settings), alone)
    assert len(set(map(tuple, alone.tolist()))) > 1


def test_bench_compares_equal_things(monkeypatch):
    monkeypatch.setattr(bench, "D", 8), monkeypatch.setattr(bench, "H", 8), monkeypatch.setattr(bench, "O", 8)
    compare = bench.compare
    monkeypatch.setattr(bench, "compare", lambda functions, device, *_, **__: compare(functions, device, 0, 1))
    rows = bench.bench_projector(torch.device("cpu"), torch.float32)  # compares their outputs as well
    assert {"smop.py", "where loop"} <= rows[0].keys() and all(row["smop.py"] > 0 for row in rows)
    assert [row["experts"] for row in bench.bench_experts(torch.device("cpu"), torch.float32)] == [4, 8, 16, 32, 64] * 2


def damaged_clips(folder, count):
    """(kind of damage, path, whether it must be refused) of `count` media files and what can be wrong with them."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    good = write_media(folder / "good.mp4").read_bytes()
    made = {"mute": dict(audio=False), "blind": dict(video=False), "one frame": dict(seconds=0.04), "7 fps": dict(fps=7),
            "96 kHz": dict(rate=96000), "8 kHz": dict(rate=8000), "stereo": dict(channels=2)}  # fmt: skip
    if count > 100:
        made["long"] = dict(seconds=600)
    refused = ("mute", "blind", "one frame", "long")
    for name, settings in made.items():
        yield name, write_media(folder / f"{name}.mp4", **settings), name in refused
    for name, samples in {
        "silent": np.zeros(16000), "clipped": np.full(16000, 40.0), "nan": np.full(16000, np.nan),
        "loud": np.full(16000, 1e38),
    }.items():  # fmt: skip
        write_media(folder / f"{name}.mp4")
        with av.open(str(folder / f"{name}.wav"), "w") as container:
            stream = container.add_stream("pcm_f32le", rate=16000, layout="mono")
            frame = av.AudioFrame.from_ndarray(samples.astype(np.float32)[None], "flt", "mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
        yield name, folder / f"{name}.mp4", name in ("nan", "loud")
    (folder / "folder.mp4").mkdir(exist_ok=True)
    yield "a folder", folder / "folder.mp4", True
    (folder / "good.png").write_bytes(good)
    yield "wrong extension", folder / "good.png", False
    for i in range(count - 6 - len(made)):
        kind = ("truncated", "bits", "zeros", "noise")[i % 4]
        content = bytearray(good)
        if kind == "truncated":
            del content[rng.randrange(len(content)) :]
        elif kind == "noise":
            content[:] = rng.randbytes(rng.randrange(5000))
        for _ in range(rng.choice((1, 10, 200)) if kind == "bits" else 0):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        if kind == "zeros":
            start, length = rng.randrange(len(content)), rng.choice((4, 100, 2000))
            content[start : start + length] = bytes(len(content[start : start + length]))
        path = folder / f"{i}.mp4"
        path.write_bytes(content)
        yield kind, path, kind == "noise"


def check_damaged_clips(folder, count):
    """Each is refused with its name, or read at the length its manifest states: {kind: [read, refused]}."""
    figures = {}
    for kind, path, must in damaged_clips(folder, count):
        clip, refused = data.Clip(path.stem, path, 25, "text"), 0
        begin = time.time()
        for what, shape in (("audio", (16000,)), ("video", (25, 96, 96))):
            try:
                read = data.load_media(clip, what)
            except (ValueError, FileNotFoundError) as error:
                assert path.stem in str(error)
                refused = 1
            else:
                assert read.shape == shape and (what == "video" or data.transform_audio(read).isfinite().all())
        assert refused or not must, path
        assert time.time() - begin < 60, path
        figures.setdefault(kind, [0, 0])[refused] += 1
    return figures


def test_damaged_clips_are_read_whole_or_refused_by_name(tmp_path):
    assert sum(map(sum, check_damaged_clips(tmp_path, 54).values())) == 54


@pytest.mark.slow
def test_500_damaged_clips_are_read_whole_or_refused_by_name(tmp_path):
    figures = check_damaged_clips(tmp_path, 500)
    print(figures, [sum(column) for column in zip(*figures.values())])  # with pytest -s: read, refused


def test_a_corpus_is_checked_as_a_whole(tmp_path, monkeypatch, capsys):
    for name in ("a", "b", "c"):
        write_media(tmp_path / f"{name}.mp4", size=64 if name == "b" else 96)
    rows = [
        'a,a.mp4,25,"one, two"',
        "b,b.mp4,25,three",
        "c,c.mp4,40,four",
        "a,a.mp4,25,again",
        "d,d.mp4,25, ",
        "e,e,1,x,y",
    ]
    (tmp_path / "test.csv").write_text("\n".join(["", "id,path,frames,text", *rows]) + "\n")
    monkeypatch.setattr(sys, "argv", ["data.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="1|True"):
        data.main()
    faults = capsys.readouterr().out.splitlines()
    assert len(faults) == 6 and faults[-1] == "5 faults"
    for fault, words in zip(
        faults, ("b.mp4: 64x64 pixels", "c.mp4: 1.0", "'a' stands for several", ":7: empty", ":8: expected")
    ):
        assert words in fault
    assert len((tmp_path / "test.csv").read_text().splitlines()) == 8  # only changed when asked
    assert len(data.check_corpus(tmp_path, clean=True)) == 5 and not data.check_corpus(tmp_path)
    with pytest.raises(ValueError, match="test.csv.old: the rows of an earlier --clean"):
        data.check_corpus(tmp_path, clean=True)
    assert [c.id for c in read_manifest(tmp_path / "test.csv")] == ["a"] and (tmp_path / "test.csv.old").exists()


def test_variable_frame_rate_is_read_by_time(tmp_path):
    """As phones record: a frame stands until the next one, whenever that comes."""
    starts = [0, 2, 4, 14, 16, 20, 42, 48]  # fiftieths of a second; the grey level is the start
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=50, options={"crf": "1", "bf": "0"})
        stream.width = stream.height = 96
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 50)
        for start in starts:
            frame = av.VideoFrame.from_ndarray(np.full((96, 96), 20 + 4 * start, np.uint8), format="gray")
            frame.pts, frame.time_base = start, Fraction(1, 50)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    # How long the last frame stands is not in the file: as long as an average one.
    levels = data.load_video(tmp_path / "a.mp4").mean((1, 2))
    shown = [max(start for start in starts if start <= 2 * tick) for tick in range(len(levels))]
    assert 25 <= len(levels) <= 28 and np.abs(levels - (20 + 4 * np.array(shown))).max() < 12


# --- prepare.py --------------------------------------------------------------------------------------------------


@needs_golden
@pytest.mark.parametrize("name", ["pgak2n", "sgwqzp", "bgau1a"])
def test_mouth_regions_equal_published_ones(name):
    golden = np.load(GOLDEN / "mouth.npz")
    frames = data.video_frames(GOLDEN.parent / "grid" / "video" / f"{name}.mp4")
    mouths = prepare.cut_mouths(frames, golden[f"{name}.landmarks"])
    assert mouths.shape == golden[f"{name}.roi"].shape
    assert np.abs(mouths.astype(int) - golden[f"{name}.roi"]).mean() < 2


def test_similarity_and_gaps():
    points = np.random.default_rng(0).normal(size=(5, 2))
    turn = 1.7 * np.array([[math.cos(0.4), -math.sin(0.4)], [math.sin(0.4), math.cos(0.4)]])
    matrix = prepare.similarity(points, points @ turn.T + [3, -2])
    close(matrix, np.column_stack([turn, [3, -2]]))
    landmarks = np.full((5, 68, 2), -1)
    landmarks[1], landmarks[3] = 10, 20
    landmarks[3, 0, 1] = -5  # a jaw outside the picture
    assert prepare.fill_gaps(landmarks)[:, 0].tolist() == [[10, 10], [10, 10], [15, 2.5], [20, -5], [20, -5]]
    with pytest.raises(ValueError, match="no face"):
        prepare.fill_gaps(np.full((5, 68, 2), -1))


def test_missing_dlib_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "dlib", None)
    prepare._dlib.cache_clear()
    with pytest.raises(SystemExit, match="dlib: pip install -r requirements-extra.txt"):
        prepare.find_landmarks([])
    prepare._dlib.cache_clear()


@needs_golden
def test_larger_face_is_followed():
    """Two faces; the larger is covered for 3 frames, which must not lead to the other, and later for good."""
    pytest.importorskip("dlib", reason="dlib is not installed: pip install -r requirements-extra.txt")
    large, small = (
        np.stack(list(data.video_frames(GOLDEN.parent / "grid" / "video" / f"{name}.mp4", "rgb24"))[:24])
        for name in ("pgak2n", "sgwqzp")
    )
    rows, columns = np.arange(0, 288, 1.25).astype(int), np.arange(0, 360, 1.25).astype(int)
    frames = np.zeros((24, 288, 360 + len(columns), 3), np.uint8)
    frames[:, : len(rows), 360:] = small[:, rows][:, :, columns]
    shown = [0, 1, 2, 6, 7]
    frames[shown, :, :360] = large[shown]
    x = prepare.find_landmarks(frames)[:, :, 0]
    assert all((x[t] > 0).all() and (x[t] < 360).all() for t in shown)
    assert all((x[t] == -1).all() for t in [3, 4, 5, *range(8, 20)])
    assert all((x[t] >= 360).all() for t in range(20, 24))


# --- transcribe.py -----------------------------------------------------------------------------------------------


def speech(seconds, pauses, rng=np.random.default_rng(0)):
    """Noise with silent stretches (start, end) in seconds."""
    audio = rng.normal(0, 0.1, round(seconds * 16000)).astype(np.float32)
    for start, end in pauses:
        audio[round(start * 16000) : round(end * 16000)] = 0
    return audio


def test_long_clips_are_cut_at_pauses():
    pauses = [(9, 9.4), (22, 22.4), (29.5, 29.9), (50, 50.4), (79, 79.4)]
    cuts = transcribe.find_cuts(2150, speech(86, pauses))
    assert [any(a <= cut / 25 <= b for a, b in pauses) for cut in cuts[1:-1]] == [True] * (len(cuts) - 2)
    assert cuts[0] == 0 and cuts[-1] == 2150 and len(cuts) == 5
    rng = np.random.default_rng(1)
    for frames in (1, 50, 51, 75, 749, 750, 751, 775, 1501, 5000):
        for audio in (None, speech(frames / 25, [], rng)):
            for longest in (50, 750):
                pieces = np.diff(transcribe.find_cuts(frames, audio, longest))
                assert pieces.sum() == frames and pieces.max() <= longest and (frames == 1 or pieces.min() >= 25)
    assert transcribe.find_cuts(1501) == [0, 500, 1001, 1501]


def test_long_clip_is_its_pieces(tmp_path, monkeypatch):
    """A silent piece is empty; the others are what they are alone, sound and lips cut at the same places."""
    monkeypatch.setattr(transcribe, "find_mouths", data.load_video)
    monkeypatch.setattr(transcribe, "load_audio", lambda path: data.load_audio(path.with_suffix(".wav")))
    model = small_model().eval()
    generate = model.generate
    model.generate = lambda batch, num_beams: generate(batch, num_beams, max_new_tokens=6)
    write_media(tmp_path / "long.mp4", seconds=80, audio=False)
    prepare.write_audio(tmp_path / "long.wav", speech(80, [(20, 20.5), (29, 60)]))
    segments = transcribe.transcribe(model, tmp_path / "long.mp4")
    cuts = [0.0, *(s["end"] for s in segments)]
    assert [s["start"] for s in segments] == cuts[:-1] and cuts[-1] == 80 and "" in [s["text"] for s in segments]
    audio, mouths = data.load_audio(tmp_path / "long.wav"), data.load_video(tmp_path / "long.mp4")
    for segment in segments:
        frames = slice(round(25 * segment["start"]), round(25 * segment["end"]))
        piece = audio[640 * frames.start : 640 * frames.stop]
        item = {"id": "a", "text": "", "audio": data.transform_audio(piece)}
        item["video"] = data.transform_video(mouths[frames]).transpose(0, 1)
        expected = model.generate(collate([item]), 1)[0] if piece.any() else ""
        assert segment["text"] == expected
    assert any(s["text"] for s in segments)
    prepare.write_audio(tmp_path / "long.wav", speech(82, []))
    with pytest.raises(ValueError, match="long.mp4: 82.0 s of sound, but 80.0 s of video; --task asr or vsr"):
        transcribe.transcribe(model, tmp_path / "long.mp4")


# --- the commands ------------------------------------------------------------------------------------------------


ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LIMIT = 600  # seconds that a command may take: one that hangs must not hold up the other tests


def run(*command, ok=True):
    """Run one of our scripts as a user does; returns what it printed."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=HERE, env=ENV, text=True, capture_output=True, timeout=LIMIT)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def wait_until(condition, process):
    """Until the condition holds, while the process lives; it is killed where that takes too long."""
    begin = time.time()
    while not condition():
        if process.poll() is not None or time.time() - begin > LIMIT:
            process.kill()
            pytest.fail(f"the process ended with {process.wait()} before it was to be disturbed")
        time.sleep(0.005)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve synthetic clips as real files with manifests, as prepare.py writes them."""
    folder = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 12), ("valid", 3), ("test", 4)):
        clips, load = load_corpus("synthetic", split)
        rows = ["id,path,frames,text"]
        for clip in clips[:count]:
            prepare.write_video(folder / f"{clip.id}.mp4", load(clip, "video"))
            prepare.write_audio(folder / f"{clip.id}.wav", load(clip, "audio"))
            rows.append(f"{clip.id},{clip.id}.mp4,{clip.frames},{clip.text}")
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return folder


TINY = (
    "--llm", json.dumps(LLM), "--audio-encoder", json.dumps(WHISPER), "--video-encoder", json.dumps(AVHUBERT),
    "--max-frames", 200, "--workers", 0, "--device", "cpu", "--clean-epochs", 1,
)  # fmt: skip


def train_here(folder, *arguments):
    train.train(*train.parse_args(list(map(str, [*TINY, "--eval-snr", "clean", "--out", folder, *arguments]))))


def test_numbers_gone_bad_stop_the_run(corpus, tmp_path, monkeypatch, capsys):
    """A loss that is no number, then a gradient without end: the clips are named, the checkpoint stays."""
    honest = LlamaSMoP.forward
    faults = {"nan": lambda total: total * math.nan, "inf": lambda total: total + (total - total.detach()).sqrt()}
    for name, fault in faults.items():
        calls = []

        def forward(model, batch, group=None):
            calls.extend([batch["ids"]] * model.training)
            losses = honest(model, batch, group)
            return losses._replace(total=fault(losses.total)) if len(calls) > 5 else losses

        monkeypatch.setattr(LlamaSMoP, "forward", forward)
        with pytest.raises(SystemExit, match="error: .* after 5 steps; the last checkpoint is kept; clips of") as stop:
            train_here(tmp_path / name, "--data", corpus, "--task", "asr", "--save-every", 1, "--epochs", 4)
        assert str(stop.value).endswith(", ".join(calls[-1])) and len(metrics(tmp_path / name)) >= 5
        assert torch.load(tmp_path / name / "checkpoint.pt")["step"] == 5


def test_a_run_is_the_plain_loop_written_out(corpus, tmp_path, monkeypatch):
    """AdamW on the mean gradient of a step's batches, clipped, at the scheduled rate; noise and masks in the second epoch.
    The last step of an epoch has fewer batches."""
    honest, add_noise, seen, heard, noisy = LlamaSMoP.forward, data.add_noise, [], {}, []
    flat = lambda tensors: torch.cat([x.detach().flatten() for x in tensors])  # noqa: E731

    def forward(model, batch, group=None):
        losses = honest(model, batch, group)
        if model.training:
            trained = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(losses.total, trained, retain_graph=True, materialize_grads=True)
            seen.append((flat(trained), losses.lm.detach(), flat(gradients)))
            for name, audio in zip(batch["ids"], batch["audio"]):
                heard.setdefault(name, []).append(audio.square().mean())
        return losses

    monkeypatch.setattr(LlamaSMoP, "forward", forward)
    monkeypatch.setattr(data, "add_noise", lambda *args: noisy.append(args) or add_noise(*args))
    train_here(tmp_path, "--data", corpus, "--max-frames", 100, "--accumulate", 3, "--epochs", 2)
    assert noisy and all(len(energies) == 2 for energies in heard.values())
    assert any(a != b for a, b in heard.values())
    batches = len(seen) // 2
    assert batches % 3
    steps = [epoch[i : i + 3] for epoch in (seen[:batches], seen[batches:]) for i in range(0, batches, 3)]
    start, _, _ = seen[0]
    weights = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([weights], betas=(0.9, 0.98), weight_decay=0.1)
    logged = [line for line in metrics(tmp_path) if "lm" in line]
    for i, (step, line) in enumerate(zip(steps, logged, strict=True)):
        gradient = torch.stack([gradients for _, _, gradients in step]).mean(0)
        close(torch.stack([lm for _, lm, _ in step]).mean(), line["lm"])
        close(gradient.norm(), line["grad_norm"])
        weights.grad = gradient / max(gradient.norm(), 1)
        optimizer.param_groups[0]["lr"] = 4e-4 * train.learning_rate(i, len(steps), 0.05)
        optimizer.step()
    monkeypatch.undo()
    model = LlamaSMoP.load(tmp_path)
    end = flat(p for p in model.parameters() if p.requires_grad)
    assert (weights - end).norm() < 0.0015 * (end - start).norm()
    args, _ = train.parse_args(["--resume", str(tmp_path)])
    expected = train.valid_loss(model, *load_corpus(corpus, "valid"), args, torch.device("cpu"))
    assert metrics(tmp_path)[-1]["valid_lm"] == pytest.approx(expected)
    with pytest.raises(SystemExit, match="holds a run; continue it with --resume"):
        train_here(tmp_path, "--data", corpus)


def test_learning_rate_rises_then_falls_as_a_cosine():
    rates = [train.learning_rate(step, 20, 0.1) for step in range(20)]
    close(rates[:3] + rates[11:12] + rates[-1:], [0.5, 1.0, 1.0, 0.5, 0.5 * (1 + math.cos(math.pi * 17 / 18))])


def test_arguments_reach_the_model():
    values = {"num_experts": 3, "top_k": 1, "dim_hidden": 7, "audio_pool": 5, "video_pool": 3, "lora_rank": 2,
              "lora_scale": 0.5, "prompt": "a", "load_balancing_weight": 0.02, "router_z_weight": 0.003}  # fmt: skip
    parts = dict(zip(("llm", "audio_encoder", "video_encoder"), map(json.dumps, (LLM, WHISPER, AVHUBERT))))
    config = train.build_model(train.Args(**parts, **values, projector="jejr"), ["a b"]).config
    assert values.items() <= config.items() and config["projector"] == "JEJR"


def test_babble_is_made_of_the_train_split(corpus, monkeypatch):
    monkeypatch.setattr(eval_module, "make_babble", lambda clips, load: [clip.id for clip in clips])
    assert eval_module.load_noise(None, corpus) == [clip.id for clip in load_corpus(corpus, "train")[0]]


def test_a_bad_clip_ends_the_run_by_name(corpus, tmp_path):
    """With workers, too, which must not outlive it."""
    shutil.copytree(corpus, tmp_path / "corpus")
    bad = sorted((tmp_path / "corpus").glob("train*.mp4"))[3]
    bad.write_text("no media")
    printed = run("train.py", "--data", tmp_path / "corpus", *TINY, "--workers", 2, "--out", tmp_path / "run", ok=False)
    assert printed.count("error: ") == 1 and f"error: {bad}: not a readable" in printed


def test_collapsed_router_is_warned_about(corpus, tmp_path, monkeypatch, capsys):
    train_here(tmp_path / "mlp", "--data", corpus, "--epochs", 1, "--projector", "mlp", "--task", "vsr")
    assert "collapsed" not in capsys.readouterr().out
    assert json.loads((tmp_path / "mlp" / "results.json").read_text())["wer"].keys() == {"clean"}
    route = SMoP.route
    everything_to_two = lambda *args: route(*args)._replace(
        experts=torch.tensor([1, 2]).expand_as(route(*args).experts)
    )  # noqa: E731
    monkeypatch.setattr(SMoP, "route", everything_to_two)
    train_here(tmp_path / "dedr", "--data", corpus, "--epochs", 1)
    assert capsys.readouterr().out.count("warning: a router has collapsed") == 2  # one a modality


def test_killed_run_resumes_bit_by_bit(corpus, tmp_path):
    """A run killed in the middle of an epoch and resumed equals an unbroken one; the WER of its folder repeats."""
    common = ("train.py", "--data", corpus, *TINY, "--save-every", 1, "--average", 2, "--epochs", 8,
              "--eval-snr", "clean 0")  # fmt: skip
    run(*common, "--out", tmp_path / "whole")
    common = map(str, (*common, "--workers", 2, "--out", tmp_path / "broken"))  # they change nothing
    process = subprocess.Popen([sys.executable, *common], cwd=HERE, env=ENV)
    log = tmp_path / "broken" / "metrics.jsonl"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 8, process)
    with pytest.raises(ValueError, match="broken: another process is training this run"):
        train.hold(tmp_path / "broken")
    process.kill()
    process.wait()
    assert not (tmp_path / "broken" / "results.json").exists()
    resume = ("train.py", "--resume", tmp_path / "broken")
    for number in (signal.SIGINT, signal.SIGTERM):  # to the workers, too, as a terminal and a batch system send them
        lines = len(log.read_text().splitlines())
        process = subprocess.Popen(
            [sys.executable, *map(str, resume)],
            cwd=HERE, env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        wait_until(lambda: len(log.read_text().splitlines()) >= lines + 3, process)
        os.killpg(process.pid, number)
        printed = process.communicate(timeout=LIMIT)[1]
        assert f"interrupted; continue with: python train.py --resume {tmp_path / 'broken'}\n" in printed, printed
        step = torch.load(tmp_path / "broken" / "checkpoint.pt")["step"]
        assert process.returncode == 1 and step == metrics(tmp_path / "broken")[-1]["step"]  # not a step is lost
        assert not (tmp_path / "broken" / "results.json").exists()
    run(*resume)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")

    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["task"] == "avsr" and results["clips"] == 4 and set(results["wer"]) == {"clean", "0"}
    assert results["routing"].keys() == {"audio", "video"}
    assert sum(results["routing"]["audio"]["usage"]) == pytest.approx(2, abs=1e-3)
    lines = [json.loads(line) for line in open(tmp_path / "whole" / "hypotheses.jsonl")]
    assert len(lines) == 8 and lines[0].keys() == {"snr", "id", "reference", "hypothesis"}
    assert [line["hypothesis"] for line in lines[:4]] != [line["hypothesis"] for line in lines[4:]]  # noise is heard
    first, second = map(load_file, (tmp_path / "whole").glob("epoch-*.safetensors"))  # --average 2
    for name, x in load_file(tmp_path / "whole" / "model.safetensors").items():
        close(x.double(), (first[name].double() + second[name].double()).div(2).to(x).double())
    printed = (tmp_path / "whole" / "results.json").read_text(), (tmp_path / "whole" / "hypotheses.jsonl").read_text()
    run("eval.py", tmp_path / "whole", "--snr", "clean", "0", "--device", "cpu")
    assert json.loads((tmp_path / "whole" / "results.json").read_text()) == json.loads(printed[0])
    assert (tmp_path / "whole" / "hypotheses.jsonl").read_text() == printed[1]

    # The size of the batches, the order of the clips and the workers change no hypothesis.
    model, (clips, load) = LlamaSMoP.load(tmp_path / "whole"), load_corpus("synthetic", "test")
    generate = model.generate  # a model that has learnt nothing never ends: later tokens hang on the last bit of a sum
    model.generate = lambda batch, num_beams: generate(batch, num_beams, max_new_tokens=16)
    shuffled = random.Random(0).sample(clips[:12], 12)
    decodings = [
        {line["id"]: line["hypothesis"] for line in evaluate(model, *arguments)[1]}
        for arguments in (
            (clips[:12], load, None, (None,), 1, 1), (shuffled, load, None, (None,), 1, 130, 2), (shuffled, load),
        )
    ]  # fmt: skip
    assert decodings[0] == decodings[1] == decodings[2] and len(set(decodings[0].values())) > 2


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(a, b):
    """Equal weights, losses and results, bit by bit."""
    weights, others = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    times = {"clips_per_s", "waited"}
    logs = [[{k: v for k, v in m.items() if k not in times} for m in metrics(folder)] for folder in (a, b)]
    assert logs[0] == logs[1] and len(logs[0]) > 6
    for name in ("results.json", "hypotheses.jsonl"):
        assert (a / name).read_text() == (b / name).read_text()


DIE_WRITING = """
import os, torch, train
whole = torch.save
def half(state, path):
    whole(state, path)
    if state["step"] % 3 == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), 9)
torch.save = half
train.main()
"""


@pytest.mark.slow
def test_twenty_kills_cost_nothing(corpus, tmp_path):
    """Killed at random moments of training, while a checkpoint is being written, and in the evaluation."""
    dropout = json.dumps(AVHUBERT | {"dropout": 0.2})
    common = ("train.py", "--data", corpus, *TINY, "--video-encoder", dropout, "--workers", 1, "--max-frames", 100,
              "--epochs", 60, "--average", 2, "--save-every", 1, "--eval-snr", "clean 5 0 -5")  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(*common, "--out", whole)
    rng = random.Random(0)
    command = (*common, "--out", broken)
    for when in rng.sample(["parameters trained"] * 12 + ["a write"] * 4, 16) + ["evaluating"] * 4:
        if when == "a write":
            done = subprocess.run([sys.executable, "-c", DIE_WRITING, *map(str, command[1:])], cwd=HERE, env=ENV)
            assert done.returncode == -signal.SIGKILL and (broken / "checkpoint.pt.partial").exists()
        else:
            with open(tmp_path / "printed", "w") as printed:
                process = subprocess.Popen(
                    [sys.executable, "-u", *map(str, command)], cwd=HERE, env=ENV, stdout=printed
                )
            wait_until(lambda: when in (tmp_path / "printed").read_text(), process)
            time.sleep(rng.uniform(0, 0.3))
            assert process.poll() is None
            process.kill()
            process.wait()
        command = ("train.py", "--resume", broken)
    assert not (broken / "results.json").exists()
    run(*command)
    assert_same_run(whole, broken)


def test_full_disk_keeps_the_previous_file(tmp_path):
    resource = pytest.importorskip("resource", reason="no limits on this system")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (torch.save, save_file):
        write_atomically(tmp_path / "a", lambda path: write({"x": torch.zeros(9)}, path))
        before = (tmp_path / "a").read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(
                OSError, match="a: could not be written, is the disk full. .*; the previous one is kept"
            ):
                write_atomically(tmp_path / "a", lambda path: write({"x": torch.zeros(99_999)}, path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "a").read_bytes() == before and os.listdir(tmp_path) == ["a"]
    with pytest.raises(OSError, match=r"nowhere/a: could not be written \(.*No such file") as error:
        write_atomically(tmp_path / "nowhere" / "a", lambda path: path.write_text("text"))
    assert "is the disk full" not in str(error.value)


def test_two_processes_train_resume_and_evaluate(corpus, tmp_path):
    torchrun = lambda n: ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n)  # noqa: E731
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    dropout = json.dumps(AVHUBERT | {"dropout": 0.2})  # LayerDrop, too: each process draws its own
    command = (*torchrun(2), "train.py", "--data", corpus, *TINY, "--video-encoder", dropout, "--epochs", 4, "--average", 2,
               "--max-frames", 100, "--save-every", 1, "--eval-snr", "clean 0", "--out", whole)  # fmt: skip
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, env=ENV)
    wait_until(lambda: (whole / "checkpoint.pt").exists() and len(metrics(whole)) >= 3, process)
    broken.mkdir()  # as a killed run leaves it: the log is never behind the checkpoint
    for name in ("args.json", "checkpoint.pt", "metrics.jsonl"):
        shutil.copy(whole / name, broken)
    for path in whole.glob("epoch-*.safetensors"):
        shutil.copy(path, broken)
    assert process.wait(LIMIT) == 0
    run(*torchrun(2), "train.py", "--resume", broken)
    assert_same_run(whole, broken)
    assert [m["step"] for m in metrics(whole) if "total" in m] == list(range(1, 1 + metrics(whole)[-1]["step"]))

    run(*torchrun(2), "eval.py", whole, "--data", "synthetic", "--split", "valid", "--device", "cpu", "--out", tmp_path)
    for folder, source, split in ((whole, corpus, "test"), (tmp_path, "synthetic", "valid")):  # one batch and several
        results, hypotheses = evaluate(LlamaSMoP.load(whole), *load_corpus(source, split))
        lines = [json.loads(line) for line in open(folder / "hypotheses.jsonl")]
        assert [line for line in lines if line["snr"] == "clean"] == hypotheses
        theirs = json.loads((folder / "results.json").read_text())
        assert theirs["wer"]["clean"] == results["wer"]["clean"] and theirs["clips"] == results["clips"]
        for kind in ("audio", "video"):
            close(theirs["routing"][kind]["usage"], results["routing"][kind]["usage"], atol=2e-4)


@pytest.mark.parametrize(
    "command, message",
    [
        (("train.py", "--data", "nowhere"), "nowhere/train.csv: no such manifest"),
        (("train.py", "--epoch", "3"), "--epoch"),
        (("train.py", "--resume", "nowhere"), "nowhere: no args.json"),
        (("eval.py", "nowhere"), "nowhere: no config.json"),
        (("-m", "tools.prepare", "nowhere", "out"), "nowhere"),
        (("-m", "tools.transcribe", "nowhere", "talk.mp4"), "nowhere: no config.json"),
    ],
)
def test_wrong_commands_say_what_is_wrong(command, message, tmp_path):
    out = ("--out", tmp_path) if command[0] == "train.py" and "--resume" not in command else ()
    printed = run(*command, *out, ok=False)
    assert message in printed and printed.count("Traceback") == 0


def test_transcribe_clips_good_and_bad(tmp_path):
    small_model("asr").save(tmp_path / "run")
    write_media(tmp_path / "good.mkv", fps=30, rate=44100, channels=2)
    write_media(tmp_path / "mute.mp4", audio=False)
    prepare.write_audio(tmp_path / "silent.wav", np.zeros(16000))
    prepare.write_sheet(tmp_path / "still.png", [np.zeros((96, 96), np.uint8)], columns=1)
    (tmp_path / "text.mp4").write_text("no media")
    names = ["mute.mp4", "silent.wav", "still.png", "text.mp4", "none.mp4", "good.mkv"]
    clips = [tmp_path / name for name in names]
    printed = run("-m", "tools.transcribe", tmp_path / "run", *clips, "--json", "--device", "cpu", ok=False)
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert [line["clip"] for line in lines] == [str(clip) for clip in clips]
    for line, message in zip(
        lines, ["no audio track", "silent, no sound", "no audio track", "not a readable", "no such file"]
    ):
        assert f"{line['clip']}: {message}" in line["error"] and f"error: {line['error']}" in printed
        assert "--task vsr" not in line["error"]  # this run knows sound alone
    assert lines[-1].keys() == {"clip", "text", "segments"} and lines[-1]["segments"][0]["end"] == pytest.approx(
        1, abs=0.1
    )
    printed = run("-m", "tools.transcribe", tmp_path / "run", clips[-1], "--device", "cpu")
    assert f"{clips[-1]}\t{lines[-1]['text']}" in printed and "Traceback" not in printed
    assert "trained on asr, which lacks what vsr needs" in run(
        "-m", "tools.transcribe", tmp_path / "run", clips[-1], "--task", "vsr", ok=False
    )


@needs_golden
def test_transcribe_finds_the_mouth(tmp_path):
    pytest.importorskip("dlib", reason="dlib is not installed: pip install -r requirements-extra.txt")
    small_model(audio_window="clip").save(tmp_path / "run")
    talk = GOLDEN.parent / "grid" / "video" / "pgak2n.mp4"
    prepare.write_sheet(tmp_path / "still.png", [next(data.video_frames(talk))], columns=1)
    write_media(tmp_path / "frame.mp4", seconds=0.04, size=128, audio=False)
    write_media(tmp_path / "mouth.mp4", size=96)
    write_media(tmp_path / "faceless.mp4", size=256)
    clips = [talk, *(tmp_path / name for name in ("still.png", "frame.mp4", "faceless.mp4", "mouth.mp4"))]
    printed = run(
        "-m", "tools.transcribe", tmp_path / "run", *clips, "--task", "vsr", "--json", "--device", "cpu", ok=False
    )
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert "trained on avsr, never on vsr alone" in printed and lines[0]["text"]
    messages = ["a still picture", "a still picture, or one frame", *["no face in any of 25 frames"] * 2]
    for line, message in zip(lines[1:], messages):
        assert f"{line['clip']}: {message}" in line["error"]
    assert "already" in lines[-1]["error"] and "already" not in lines[-2]["error"]
    (tmp_path / "text.mp4").write_text("no media")
    faulty = [tmp_path / "still.png", tmp_path / "text.mp4"]
    printed = run("-m", "tools.transcribe", tmp_path / "run", *faulty, "--device", "cpu", ok=False)
    assert "still.png: no audio track; --task vsr reads the lips alone" in printed and printed.count("--task vsr") == 1
    assert f"{talk}\t" in run("-m", "tools.transcribe", tmp_path / "run", talk, "--device", "cpu")


def test_numbers_out_of_range_are_refused():
    for field in dataclasses.fields(train.Args):
        if "str" not in str(field.type):
            least, most = field.metadata["least"], field.metadata["most"]
            for value in (-1, 10**19, *[0] * (least > 0), *[math.nan, math.inf] * ("float" in str(field.type))):
                with pytest.raises(ValueError) as error:
                    train.Args(**{field.name: value})
                message = f"--{train.flag(field.name)} must be between {least} and {most}, got {value}"
                assert str(error.value) == message


@pytest.mark.parametrize(
    "setting, message",
    [
        (("--audio-pool", 300), "train-0000: too short for audio pooling by 300; train-0001"),
        (("--average", 3, "--epochs", 2), "--average 3 is more than --epochs 2"),
        (("--task", "tts"), "--task must be one of asr, vsr, avsr, got 'tts'"),
        (("--top-k", 5), "--top-k 5 is more than --num-experts 4"),
        (("--eval-snr", ""), "--eval-snr is empty"),
        (("--eval-snr", "loud"), "an SNR is clean or a number of dB between -100 and 100, got 'loud'"),
        (("--device", "cpux"), "--device must be cpu, or cuda"),
        (("--audio-encoder", "no/where/here"), "no/where/here: neither a folder of transformers nor found on its hub"),
        (("--llm", "no/where/here"), "no/where/here: neither a folder"),
        (("--video-encoder", "nowhere.pt"), "nowhere.pt: no such checkpoint"),
    ],
)
def test_wrong_settings_are_refused_before_training(setting, message, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_noise", lambda *_: pytest.fail("work began"))
    with pytest.raises((ValueError, OSError), match=message):
        train_here(tmp_path, *setting)


def test_run_folders_of_another_version_are_refused(tmp_path):
    args = dataclasses.asdict(train.Args()) | {"experts": 4}
    del args["num_experts"]
    (tmp_path / "args.json").write_text(json.dumps(args))
    with pytest.raises(ValueError, match="args.json: of another version .* experts, num_experts"):
        train.parse_args(["--resume", str(tmp_path)])
    model = small_model("asr")
    model.config["experts"] = model.config.pop("num_experts")
    model.save(tmp_path)
    with pytest.raises(ValueError, match="config.json: of another version.* experts, num_experts"):
        LlamaSMoP.load(tmp_path)
    small_model("asr").save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half a copy")
    with pytest.raises(ValueError, match="model.safetensors: .*header"):
        LlamaSMoP.load(tmp_path)


def test_clips_that_do_not_fit_the_model_are_all_named():
    model = small_model(audio_pool=30, video_pool=20)
    lengths, texts = (9, 19, 20, 751), ("now", "now", "lay " * 300, "now")
    clips = [data.Clip(f"clip{i}", None, frames, text) for i, (frames, text) in enumerate(zip(lengths, texts))]
    with pytest.raises(ValueError) as error:
        model.check(clips)
    assert str(error.value) == (
        "clip0: too short for audio pooling by 30; clip0: too short for video pooling by 20; clip1: too short for video "
        "pooling by 20; clip2: a transcript of more than 256 tokens; clip3: longer than Whisper's 30 s"
    )
    model.llm.config.max_position_embeddings = 60
    with pytest.raises(ValueError, match="clip3: more tokens than the LLM's 60 positions"):
        model.check(clips[3:])


def test_vocabularies_that_do_not_fit_are_refused(tmp_path):
    write_tokenizer(tmp_path / "llm", WORDS, eos_token="</s>")
    write_llama(tmp_path / "llm", len(WORDS) - 2)
    with pytest.raises(ValueError, match="llm: it knows 6 tokens, but its tokenizer .* has 8"):
        LlamaSMoP("asr", tmp_path / "llm", WHISPER)


def test_wer_is_over_all_words_whatever_their_case():
    assert word_error_rate(["BIN BLUE AT", "now", "go"], ["bin red at", "", "go on then"])[0] == 80.0


def test_model_of_unknown_training_is_evaluated(corpus, tmp_path):
    """As one of `from_published` and `save`: there is no args.json."""
    small_model("asr").save(tmp_path)
    assert "--data must say what to evaluate on" in run("eval.py", tmp_path, ok=False)
    run("eval.py", tmp_path, "--data", corpus, "--snr", "0", "--device", "cpu")
    assert json.loads((tmp_path / "results.json").read_text())["clips"] == 4


def test_pretrained_llms_have_the_published_recipe():
    read = lambda *line: train.parse_args(line)[0]  # noqa: E731
    recipe = lambda args: (args.epochs, args.clean_epochs, args.max_frames, args.lr)  # noqa: E731
    assert recipe(read("--llm", "a/b")) == (10, 0, 1500, 1e-3)
    assert recipe(read("--llm", "a/b", "--task", "vsr", "--max-frames", "900")) == (10, 0, 900, 5e-4)
    assert recipe(read("--lr", "1e-4")) == (6, 3, 320, 1e-4)


def test_a_difference_is_paired_over_clips():
    pytest.importorskip("matplotlib")
    from study import claims

    keys = [(snr, f"clip{i}") for i in range(50) for snr in ("clean", "0")]
    hard = {key: (1 + i % 12 // 2, 6) for i, key in enumerate(keys)}  # clips differ much more than the models do
    gain = {key: (errors - (i % 3 == 0), words) for i, (key, (errors, words)) in enumerate(hard.items())}
    even = {key: (errors + (-1) ** (i // 2), words) for i, (key, (errors, words)) in enumerate(hard.items())}
    seeds = lambda *runs: dict(enumerate(runs))  # noqa: E731
    gains, evens, hards = (seeds(run, run, run) for run in (gain, even, hard))
    better = claims.difference(gains | {3: even}, hards, ["clean", "0"])
    assert better["points"] == round(-100 * 34 / 600, 2) and (better["lower"], better["verdict"]) == ("3 of 3", "shown")
    assert better["95"][0] < better["points"] < better["95"][1] < 0
    worse = claims.difference(hards, gains, ["clean", "0"])
    assert worse["points"] == -better["points"] and worse["verdict"] == "opposite"
    same = claims.difference(evens, hards, ["clean", "0"])
    assert same["95"][0] < 0 < same["95"][1] and same["verdict"] == "not shown"
    one = claims.difference({0: gain}, {0: hard}, ["clean", "0"])  # a seed may be luck
    assert one["points"] == better["points"] and one["verdict"] == "open"
    assert claims.difference({0: gain}, {1: hard}, ["clean"])["verdict"] == "open"


@pytest.mark.slow
def test_study_keeps_finished_runs_and_refuses_changed_ones(corpus, tmp_path):
    """A video encoder and four models that need it: trained, tabled, continued, refused when asked for otherwise."""
    pytest.importorskip("matplotlib")
    whisper = json.dumps(WHISPER | {"d_model": 512})  # as wide as the study's video encoder
    study = ["-m", "study.reproduce", "--data", corpus, "--name", "tiny", "--quick", "--claims", "usage"]
    study += ["--audio-encoder", whisper, "--runs", tmp_path / "runs", "--out", tmp_path / "out"]
    study += ["--", "--epochs", 2, "--eval-snr", "clean 0"]
    study += [part for pair in zip(TINY[::2], TINY[1::2]) if "encoder" not in pair[0] for part in pair]
    assert "0 runs are finished, 5 to train" in run(*study)
    folders = {folder.name: folder for folder in (tmp_path / "runs" / "tiny").iterdir()}
    encoder, dedr = "vsr-dedr-e4-k2-small-s0", "avsr-dedr-e4-k2-small-s0"
    others = {f"avsr-{cell}-small-s0" for cell in ("jejr-e4-k2", "jedr-e4-k2", "dedr-e4-k2-unbalanced")}
    assert set(folders) == {encoder, dedr} | others
    assert json.loads((folders[dedr] / "args.json").read_text())["video_encoder"] == str(folders[encoder])
    results = json.loads((folders[dedr] / "results.json").read_text())
    table = (tmp_path / "out" / "tiny.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| AVSR DEDR e4 k2 small |")).split(" | ")
    assert row[1:4] == [f"{results['wer']['clean']:.1f}", f"{results['wer']['0']:.1f}", "–"]
    usage = results["routing"]["audio"]["usage"]
    assert row[8].startswith(", ".join(f"{100 * share:.0f}" for share in usage) + ": ")
    assert json.loads((tmp_path / "out" / "tiny.json").read_text())["runs"][dedr]["wer"] == results["wer"]
    assert all((tmp_path / "out" / f"tiny-{picture}.png").is_file() for picture in ("usage", "clip"))

    weights = load_file(folders[dedr] / "model.safetensors")
    sizes = json.loads((folders[dedr] / "sizes.json").read_text())
    assert sizes["projector"] == sum(x.numel() for name, x in weights.items() if name.startswith("projector."))
    trained = [x for name, x in weights.items() if not name.startswith("video_encoder.")]  # it is frozen
    assert sizes["trained"] == sum(x.numel() for x in trained)
    one = [x.numel() for name, x in weights.items() if name.startswith("projector.smops.audio.experts.3.")]
    assert sizes["active"] == weights["projector.smops.audio.gate.weight"].numel() + 2 * sum(one)

    (folders[dedr] / "results.json").unlink()  # as if it had been killed
    assert "4 runs are finished, 1 to train" in run(*study)
    assert json.loads((folders[dedr] / "results.json").read_text())["wer"] == results["wer"]
    assert "no model of usage is of the tasks asr" in run(*study[:9], "--tasks", "asr", ok=False)
    printed = run(*study, "--epochs", 3, ok=False)
    assert f"{folders[encoder]} (epochs)" in printed and "(epochs, encoder)" in printed and "Traceback" not in printed
    assert all((folder / "results.json").is_file() for folder in folders.values())


@needs_golden
def test_prepare_finds_real_mouths(tmp_path):
    pytest.importorskip("dlib", reason="dlib is not installed: pip install -r requirements-extra.txt")
    grid = GOLDEN.parent / "grid"
    rows = (grid / "test.csv").read_text().splitlines()[:2]
    raw = tmp_path / "raw"
    (raw / "video").mkdir(parents=True)
    name = rows[1].split(",")[0]
    (raw / "video" / f"{name}.mp4").write_bytes((grid / "video" / f"{name}.mp4").read_bytes())
    write_media(raw / "video" / "faceless.mp4")
    (raw / "test.csv").write_text("\n".join([*rows, "faceless,video/faceless.mp4,25,nothing"]) + "\n")
    printed = run("-m", "tools.prepare", raw, tmp_path / "out", "--workers", 1, ok=False)
    assert "faceless: ValueError" in printed and "1 clips prepared, 1 failed" in printed
    assert "1 clips prepared" in run(
        "-m", "tools.prepare", raw, tmp_path / "out", "--workers", 1, "--allow-failures", 1
    )
    clips = read_manifest(tmp_path / "out" / "test.csv")
    assert [c.id for c in clips] == [name] and clips[0].frames == 75
    assert data.load_media(clips[0], "video").shape == (75, 96, 96) and data.load_media(clips[0], "audio").shape == (
        48000,
    )
    assert (tmp_path / "out" / "sheet.png").stat().st_size > 1000
