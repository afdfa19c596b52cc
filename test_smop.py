"""Tests: against published numbers, against a naive loop, one clip against a batch, and every command as a user runs it.

    pytest -q                  # a few minutes on two CPU cores

`golden_smop.npz` holds outputs, losses and gradients of the authors' published mixture (4 experts, top 2) with random
weights. More published numbers (AV-HuBERT, the whole model, transforms, mouth regions) are in ../shared/golden, where that exists;
without it those tests are skipped.
"""

import json
import math
import os
import random
import subprocess
import sys
import time
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import avhubert
import data
import prepare
from avhubert import AVHubertEncoder
from data import ClipDataset, FrameBatches, collate, load_corpus, read_manifest
from model import LlamaSMoP, train_tokenizer, whisper_frames
from smop import MultimodalSMoP, SMoP, load_balancing_loss, router_z_loss

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no published numbers in {GOLDEN}")
LLM = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5}
WHISPER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
AVHUBERT = {"dim": 32, "layers": 1, "heads": 2, "stem_width": 4, "stem_stride": 4, "trunk_widths": [4, 4, 4, 4]}


def close(a, b, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


# --- smop.py -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["e4_k2", "e4_k4", "e8_k1"])
def test_mixture_equals_published_numbers(case):
    golden = np.load(GOLDEN / "smop.npz" if GOLDEN.is_dir() else HERE / "golden_smop.npz")
    if f"{case}.config" not in golden:
        pytest.skip(f"{case} is only in {GOLDEN}")
    get = lambda name: torch.from_numpy(golden[f"{case}.{name}"])  # noqa: E731
    num_experts, top_k, dim_in, dim_hidden, dim_out = get("config").tolist()
    layer = SMoP(dim_in, dim_out, dim_hidden, num_experts, top_k)
    layer.load_state_dict({name: get(f"w.{name}") for name in layer.state_dict()})
    x = get("x").requires_grad_()
    y, routing = layer(x)
    close(y, get("out"))
    close(routing.logits.flatten(0, -2), get("router_logits"))
    assert torch.equal(routing.experts.flatten(0, -2), get("selected_experts"))
    close(routing.load_balancing_loss, get("load_balancing_loss"))
    close(routing.router_z_loss, get("z_loss"))
    ((y * get("g")).sum() + 0.01 * routing.load_balancing_loss + 0.001 * routing.router_z_loss).backward()
    close(x.grad, get("grad.x"), rtol=1e-4)
    for name, parameter in layer.named_parameters():
        close(parameter.grad, get(f"grad.{name}"), rtol=1e-4)


@pytest.mark.parametrize("num_experts, top_k, renormalize", [(4, 2, True), (5, 3, False), (3, 1, False), (1, 1, True)])
def test_mixture_equals_naive_loop(num_experts, top_k, renormalize):
    torch.manual_seed(0)
    layer = SMoP(6, 5, 7, num_experts, top_k, renormalize).double()
    x = torch.randn(2, 9, 6, dtype=torch.double, requires_grad=True)
    y, _ = layer(x)
    rows = []
    for token in x.flatten(0, 1):
        p = (layer.gate.weight @ token).softmax(0)
        best = p.argsort(descending=True)[:top_k]
        total = p[best].sum() if renormalize else 1
        rows.append(sum(p[e] / total * layer.experts[e](token) for e in best))
    expected = torch.stack(rows).view_as(y)
    close(y, expected, atol=1e-12)
    g = torch.randn_like(y)
    parameters = [x, *layer.parameters()]
    ours = torch.autograd.grad((y * g).sum(), parameters)
    theirs = torch.autograd.grad((expected * g).sum(), parameters, allow_unused=True)
    for a, b in zip(ours, theirs):
        close(a, torch.zeros_like(a) if b is None else b, atol=1e-12)


@pytest.mark.parametrize("filling", [0.0, 1e4, float("nan"), float("inf")])
def test_padding_changes_nothing(filling):
    torch.manual_seed(0)
    layer = SMoP(6, 5, num_experts=4, top_k=2)
    x = torch.randn(3, 8, 6)
    mask = torch.arange(8) < torch.tensor([[8], [3], [0]])
    padded = x.masked_fill(~mask[..., None], filling).requires_grad_()
    real = x[mask].requires_grad_()
    results = []
    for tokens, m in ((padded, mask), (real, None)):
        layer.zero_grad()
        y, routing = layer(tokens, m)
        (y.square().sum() + routing.load_balancing_loss + routing.router_z_loss).backward()
        results.append([routing.load_balancing_loss, routing.router_z_loss, *[p.grad for p in layer.parameters()]])
        if m is not None:
            assert not y[~m].any() and not routing.weights[~m].any() and not tokens.grad[~m].any()
        results[-1] += [y if m is None else y[m], tokens.grad if m is None else tokens.grad[m]]
    for a, b in zip(*results):
        close(a, b)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (2, 3, 6)])
def test_no_token_gives_zeros(shape):
    layer = SMoP(6, 5)
    x = torch.randn(shape, requires_grad=True)
    y, routing = layer(x, torch.zeros(shape[:-1], dtype=torch.bool))
    total = y.sum() + routing.load_balancing_loss + routing.router_z_loss
    total.backward()
    assert y.shape == (*shape[:-1], 5) and total == 0
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_losses_have_their_stated_values():
    logits = torch.zeros(400, 4)
    experts = torch.stack([torch.arange(400) % 4, (torch.arange(400) + 1) % 4], 1)
    assert load_balancing_loss(logits, experts).item() == pytest.approx(2)  # balanced: k
    assert router_z_loss(logits).item() == pytest.approx(math.log(4) ** 2)
    logits[:, 0] = 50.0
    collapsed = load_balancing_loss(logits, torch.zeros(400, 1, dtype=torch.long))
    assert collapsed.item() == pytest.approx(4)  # everything to one expert: E
    everything = torch.arange(4).expand(400, 4)
    assert load_balancing_loss(torch.randn(400, 4), everything).item() == pytest.approx(4)  # k = E: exactly E


def test_renormalised_top1_gives_the_router_no_gradient():
    x = torch.randn(50, 6)
    for renormalize in (True, False):
        layer = SMoP(6, 5, num_experts=4, top_k=1, renormalize=renormalize)
        layer(x)[0].square().sum().backward()
        assert (layer.gate.weight.grad.abs().max() < 1e-5) == renormalize


def test_one_expert_is_the_mlp_projector():
    layer = SMoP(6, 5, num_experts=1, top_k=1)
    x = torch.randn(3, 4, 6)
    close(layer(x)[0], layer.experts[0](x))


def test_router_stays_in_float32():
    layer = SMoP(6, 5)
    x = torch.randn(10, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(x)
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    assert torch.equal(routing.experts, layer(x)[1].experts)
    y, routing = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16 and routing.logits.dtype == torch.float32


def test_mixture_compiles():
    layer = SMoP(6, 5)
    x, mask = torch.randn(4, 7, 6), torch.rand(4, 7) > 0.3
    compiled = torch.compile(layer, backend="aot_eager")  # no C++ compiler needed
    y, routing = compiled(x, mask)
    close(y, layer(x, mask)[0])
    y.sum().backward()


@pytest.mark.parametrize("config", ["DEDR", "JEDR", "JEJR"])
def test_configurations_share_what_they_say(config):
    torch.manual_seed(0)
    projector = MultimodalSMoP({"audio": 6, "video": 6}, 5, config, num_experts=4, top_k=2)
    a, v = projector.smops["audio"], projector.smops["video"]
    assert (a.experts is v.experts) == (config != "DEDR") and (a.gate is v.gate) == (config == "JEJR")
    x = {"audio": torch.randn(2, 9, 6), "video": torch.randn(2, 4, 6)}
    masks = {"audio": torch.rand(2, 9) > 0.2, "video": torch.rand(2, 4) > 0.2}
    y, routing = projector(x, masks)
    for kind in x:
        close(y[kind], projector.smops[kind](x[kind], masks[kind])[0])
    if config == "JEJR":  # the losses of the joint router are over all tokens at once
        together = torch.cat([x[kind][masks[kind]] for kind in x])
        expected = a(together)[1]
        close(routing.load_balancing_loss, expected.load_balancing_loss)
        close(routing.router_z_loss, expected.router_z_loss)
        close(projector(x)[1].router_z_loss, a(torch.cat([t.flatten(0, 1) for t in x.values()]))[1].router_z_loss)
    else:
        close(routing.router_z_loss, sum(r.router_z_loss for r in routing.values()))
    alone, routing = MultimodalSMoP({"video": 6}, 5, config)({"video": x["video"]})
    assert alone["video"].shape == (2, 4, 5) and list(routing) == ["video"]


def test_wrong_mixtures_are_refused():
    with pytest.raises(ValueError, match="use DEDR"):
        MultimodalSMoP({"audio": 6, "video": 8}, 5, "JEJR")
    with pytest.raises(ValueError, match="DEDR, JEDR, JEJR"):
        MultimodalSMoP({"audio": 6}, 5, "dense")
    with pytest.raises(ValueError, match="top_k"):
        SMoP(6, 5, num_experts=2, top_k=3)
    with pytest.raises(ValueError, match="mask"):
        SMoP(6, 5)(torch.randn(2, 3, 6), torch.ones(2, 4, dtype=torch.bool))


def _ddp_step(rank, folder):
    """One of two processes; process 1 sees only one token, so most experts get none there."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = nn.parallel.DistributedDataParallel(SMoP(6, 5, num_experts=8, top_k=1, renormalize=False))
    x = torch.load(f"{folder}/x.pt")
    for _ in range(2):
        layer.zero_grad()
        y, _ = layer(x[:20] if rank == 0 else x[20:])
        (2 * y.square().sum()).backward()  # DDP takes the mean over two processes
    if rank == 0:
        torch.save([p.grad for p in layer.parameters()], f"{folder}/grad.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_gradient_of_one(tmp_path):
    x = torch.randn(21, 6)
    torch.save(x, tmp_path / "x.pt")
    torch.multiprocessing.spawn(_ddp_step, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    layer = SMoP(6, 5, num_experts=8, top_k=1, renormalize=False)
    layer(x)[0].square().sum().backward()
    for a, b in zip(torch.load(tmp_path / "grad.pt"), layer.parameters()):
        close(a, b.grad)


# --- avhubert.py -------------------------------------------------------------------------------------------------


@needs_golden
def test_avhubert_equals_published_numbers():
    golden = np.load(GOLDEN / "avhubert-tiny.npz")
    encoder = AVHubertEncoder.from_fairseq(GOLDEN / "avhubert-tiny.pt")
    video, padding = torch.from_numpy(golden["video"]), torch.from_numpy(golden["padding_mask"])
    close(encoder(video), golden["features"], atol=2e-5)
    close(encoder(video, padding), golden["features_with_padding_mask"], atol=2e-5)
    close(encoder(video[1:, :, :20]), golden["features_clip1_alone"], atol=2e-5)


@pytest.mark.parametrize("layer_norm_first", [True, False])
def test_video_padding_changes_nothing_even_in_training(layer_norm_first):
    torch.manual_seed(0)
    encoder = AVHubertEncoder(**AVHUBERT, layer_norm_first=layer_norm_first)
    video = torch.randn(1, 1, 9, 88, 88)
    padded = F.pad(video, (0, 0, 0, 0, 0, 5), value=7.0)
    padding = torch.arange(14)[None] >= 9
    for mode in (True, False):
        encoder.train(mode)
        close(encoder(padded, padding)[:, :9], encoder(video), atol=1e-4)


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
    torch.save({"model": {}, "cfg": {"model": {}}}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="b.pt: not a pretrained AV-HuBERT"):
        AVHubertEncoder.from_fairseq(tmp_path / "b.pt")


# --- model.py ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(model, description, cases, {published name: parameter}) of the golden whole model, loaded through our doors."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperModel,
    )

    folder = tmp_path_factory.mktemp("published")
    info = json.loads((GOLDEN / "llama_smop_tiny/model.json").read_text())
    weights = load_file(GOLDEN / "llama_smop_tiny/weights.safetensors")
    bos, eos = list(info["token_ids"])[:2]
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(62)} | {bos: 62, eos: 63}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token=bos, eos_token=eos).save_pretrained(folder / "llm")
    llm = LlamaForCausalLM(LlamaConfig(**info["llama"] | {"vocab_size": 64, "pad_token_id": None}))
    llm.load_state_dict({k.removeprefix("llm."): v[: len(llm.get_parameter(k.removeprefix("llm.")))]  # 5 rows are ours
                         for k, v in weights.items() if k.startswith("llm.") and "lora" not in k})  # fmt: skip
    llm.save_pretrained(folder / "llm")
    whisper = WhisperModel(WhisperConfig(**info["whisper"], decoder_layers=1, decoder_attention_heads=4, vocab_size=51865))
    prefix = "audio_encoder."
    whisper.encoder.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    whisper.save_pretrained(folder / "whisper")
    WhisperFeatureExtractor().save_pretrained(folder / "whisper")

    model = LlamaSMoP(
        "avsr", folder / "llm", folder / "whisper", GOLDEN / "avhubert-tiny.pt", projector="JEJR", dim_hidden=96,
        lora_rank=info["lora"]["real_rank"], lora_scale=info["lora"]["scaling"], prompt=info["prompt"],
    ).eval()  # fmt: skip
    parameters = dict(model.named_parameters())
    named = {}
    for name, value in weights.items():
        if not name.startswith(prefix):
            ours = name.replace("audiovisual_proj.", "projector.smops.audio.")
            for x in "qv":
                ours = ours.replace(f"lora_down_{x.upper()}", f"{x}_proj.lora_A.default")
                ours = ours.replace(f"lora_up_{x.upper()}", f"{x}_proj.lora_B.default")
                ours = ours.replace(f".{x}_proj.weight", f".{x}_proj.base_layer.weight")
            named[name] = parameters[ours]
            with torch.no_grad():
                named[name].copy_(value)
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
        {"id": case, "text": text, "audio": data.transform_audio(samples, 640 * frames)[:, 0]}
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


@needs_golden
def test_audio_frames_equal_published_rule():
    rule = np.load(GOLDEN / "llama_smop_tiny/audio_truncation.npz")
    samples = torch.from_numpy(rule["samples"])
    assert torch.equal(whisper_frames(samples), torch.from_numpy(rule["frames_kept_exact"]))


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
    features, counts, _ = model.project(batch)
    losses = model(batch)
    lm, words = 0, 0
    for i, item in enumerate(items):
        one, count, _ = model.project(collate([item]))
        for kind in features:
            assert counts[kind][i] == count[kind][0]
            close(features[kind][i, : counts[kind][i]], one[kind][0], rtol=0, atol=1e-4)
        tokens = len(model.tokenizer(item["text"], add_special_tokens=False).input_ids) + 1
        lm, words = lm + tokens * model(collate([item])).lm, words + tokens
    close(losses.lm, lm / words, rtol=0, atol=1e-4)
    for beams in (1, 3):
        alone = [model.generate(collate([item]), beams, max_new_tokens=6)[0] for item in items]
        assert model.generate(batch, beams, max_new_tokens=6) == alone
    assert len(set(alone)) > 1


def test_padding_does_not_reach_the_losses():
    model = small_model().eval()
    batch = collate(small_batch())
    padded = dict(batch, audio=F.pad(batch["audio"], (0, 6400)), video=F.pad(batch["video"], (0, 0, 0, 0, 0, 10)))
    for a, b in zip(model(batch), model(padded)):
        close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", ["asr", "vsr", "avsr"])
@pytest.mark.parametrize("projector", ["MLP", "JEJR", "JEDR", "DEDR"])
def test_save_and_load(tmp_path, task, projector):
    model = small_model(task, projector)
    batch = collate(small_batch(task))
    model(batch).total.backward()  # changes BatchNorm's statistics
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
    assert {name.split(".")[0] for name in names} == {"projector", "llm", "new_tokens"}
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


def test_clear_errors_of_the_model(tmp_path):
    model = small_model("asr")
    with pytest.raises(ValueError, match="long: longer than Whisper's 30 s"):
        model({"ids": ["long"], "texts": ["lay"], "audio": torch.zeros(1, 480640), "audio_lengths": torch.tensor([480640])})
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


# --- data.py -----------------------------------------------------------------------------------------------------


@needs_golden
def test_transforms_equal_published_numbers():
    golden = np.load(GOLDEN / "transforms.npz")
    for side in ("even", "odd"):
        close(data.transform_video(golden[f"{side}.frames_rgb_u8"]), golden[f"{side}.video"])
        close(data.transform_video(golden[f"{side}.grey_as_rgb_u8"]), golden[f"{side}.grey_as_rgb_video"])
        grey = golden[f"{side}.grey_as_rgb_u8"][..., 0]
        close(data.transform_video(grey), golden[f"{side}.grey_as_rgb_video"], atol=1e-3)
    for n in (4000, 3200, 5120):
        close(data.transform_audio(golden["wave"], n), golden[f"audio_cut_or_pad_{n}"])


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
    close(noisy, data.transform_audio(clean + added)[:, 0], atol=1e-4)


def test_augmentation_depends_on_the_epoch_alone():
    clips, load = load_corpus("synthetic", "train")
    draw = lambda epoch: [setattr(dataset, "epoch", epoch), dataset[3]][1]  # noqa: E731
    dataset = ClipDataset(clips, load, "avsr", train=True, noise=np.ones(10, np.float32), clean_epochs=1)
    first, again, other = draw(1), draw(1), draw(2)
    for kind in ("audio", "video"):
        assert torch.equal(first[kind], again[kind]) and not torch.equal(first[kind], other[kind])
    plain = ClipDataset(clips, load, "avsr")[3]
    assert torch.equal(draw(0)["audio"], plain["audio"]) and not torch.equal(draw(0)["video"], plain["video"])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_batches_lose_and_repeat_no_clip(world):
    frames = [10 + 7 * i % 90 for i in range(101)]
    seen, steps, orders = [], [], []
    for rank in range(world):
        sampler = FrameBatches(frames, 300, seed=1, rank=rank, world=world)
        sampler.epoch = 4
        batches = list(sampler)
        assert len(batches) == len(sampler) and all(batches)
        assert all(len(b) * max(frames[i] for i in b) <= 300 + 2 * max(frames) for b in batches)
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
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["valid"] and not texts["valid"] & texts["test"]
    clip = splits["test"][0]
    audio, video = (data.synthetic_media(clip, kind) for kind in ("audio", "video"))
    assert audio.shape == (640 * clip.frames,) and audio.dtype == np.float32
    assert video.shape == (clip.frames, 96, 96) and video.dtype == np.uint8
    assert np.array_equal(audio, data.synthetic_media(clip, "audio"))


def write_media(path, seconds=1.0, fps=25, size=96, rate=16000, channels=1, audio=True, video=True):
    """A media file whose picture brightens with time, with a tone that starts in the middle."""
    with av.open(str(path), "w") as container:
        streams = []
        if video:
            stream = container.add_stream("libx264", rate=fps)
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            frames = [
                av.VideoFrame.from_ndarray(np.full((size, size), 40 + 160 * t / (fps * seconds), np.uint8), format="gray")
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


def test_manifests(tmp_path):
    (tmp_path / "test.csv").write_text('id,path,frames,text\na,a.mp4,25,"one, two"\nb,s/b.mp4,30,three\n')
    clips = read_manifest(tmp_path / "test.csv")
    assert [tuple(c) for c in clips] == [("a", tmp_path / "a.mp4", 25, "one, two"), ("b", tmp_path / "s/b.mp4", 30, "three")]
    # auto_avsr's labels
    (tmp_path / "labels").mkdir()
    (tmp_path / "lrs3" / "lrs3_text_seg24s" / "x").mkdir(parents=True)
    (tmp_path / "lrs3" / "lrs3_text_seg24s" / "x" / "1.txt").write_text("HELLO THERE\n")
    (tmp_path / "labels" / "l.csv").write_text("lrs3,lrs3_video_seg24s/x/1.mp4,50,12 7 88\nlrs3,lrs3_video_seg24s/x/2.mp4,30,plain text\n")
    clips = read_manifest(tmp_path / "labels" / "l.csv")
    assert clips[0].path == tmp_path / "lrs3" / "lrs3_video_seg24s/x/1.mp4"
    assert [c.text for c in clips] == ["HELLO THERE", "plain text"] and clips[0].id == "lrs3_video_seg24s/x/1"


@pytest.mark.parametrize(
    "line, message",
    [
        ("a,a.mp4,25", "m.csv:2: expected id,path,frames,text"),
        ("a,a.mp4,many,text", "m.csv:2: expected .* number of frames"),
        ("a,a.mp4,0,text", "positive number"),
        ("a,a.mp4,25, ", "m.csv:2: empty transcript"),
        ("a,../../a.mp4,25,text", "lead out of the folder"),
        ("../a,a.mp4,25,text", "lead out of the folder"),
        ("a,a.mp4,25,one\na,b.mp4,25,two", "'a' stands for several"),
        ("", "no clips"),
    ],
)
def test_bad_manifests_are_refused(tmp_path, line, message):
    (tmp_path / "m.csv").write_text(f"id,path,frames,text\n{line}\n")
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
    with pytest.raises(ValueError, match="at least 88x88"):
        data.transform_video(load(write_media(tmp_path / "tiny.mp4", size=64), "video"))
    with wave.open(str(tmp_path / "good.wav"), "wb") as file:  # a .wav beside the video is read instead of its track
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(np.zeros(8000, "<i2").tobytes())
    assert not load(good, "audio").any()


def test_nan_audio_is_refused(tmp_path):
    with av.open(str(tmp_path / "nan.wav"), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.full((1, 1600), np.nan, np.float32), "flt", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="nan.wav: NaN"):
        data.load_audio(tmp_path / "nan.wav")


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
    assert prepare.fill_gaps(landmarks)[:, 0, 0].tolist() == [10, 10, 15, 20, 20]
    with pytest.raises(ValueError, match="no face"):
        prepare.fill_gaps(np.full((5, 68, 2), -1))


# --- the commands ------------------------------------------------------------------------------------------------


ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # sums depend on the number of threads


def run(*command, ok=True):
    """Run one of our scripts as a user does; returns what it printed."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, env=ENV, text=True, capture_output=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


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


def test_killed_run_resumes_bit_by_bit(corpus, tmp_path):
    """A run killed in the middle of an epoch and resumed equals an unbroken one; the WER of its folder repeats."""
    common = ("train.py", "--data", corpus, *TINY, "--save-every", 2, "--average", 2, "--epochs", 8, "--eval-snr", "clean 0")
    run(*common, "--out", tmp_path / "whole")
    process = subprocess.Popen([sys.executable, *map(str, common), "--out", tmp_path / "broken"], cwd=HERE, env=ENV)
    metrics = tmp_path / "broken" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 8:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "broken" / "results.json").exists()
    run("train.py", "--resume", tmp_path / "broken")
    whole, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert whole.keys() == broken.keys() and all(torch.equal(whole[name], broken[name]) for name in whole)
    logs = [
        [(m["step"], m.get("total"), m.get("valid_lm")) for m in map(json.loads, open(tmp_path / name / "metrics.jsonl"))]
        for name in ("whole", "broken")
    ]
    assert logs[0] == logs[1] and len(logs[0]) > 6

    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["task"] == "avsr" and results["clips"] == 4 and set(results["wer"]) == {"clean", "0"}
    assert results["routing"].keys() == {"audio", "video"}
    assert sum(results["routing"]["audio"]["usage"]) == pytest.approx(2, abs=1e-3)
    lines = [json.loads(line) for line in open(tmp_path / "whole" / "hypotheses.jsonl")]
    assert len(lines) == 8 and lines[0].keys() == {"snr", "id", "reference", "hypothesis"}
    run("eval.py", tmp_path / "whole", "--snr", "clean", "0", "--device", "cpu")
    assert json.loads((tmp_path / "whole" / "results.json").read_text())["wer"] == results["wer"]


def test_two_processes_train_together(corpus, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29500 + os.getpid() % 1000)
    run(*torchrun, "train.py", "--data", corpus, *TINY, "--epochs", 2, "--eval-snr", "clean", "--out", tmp_path)
    steps = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert [m["step"] for m in steps if "total" in m] == list(range(1, 1 + steps[-1]["step"]))
    assert json.loads((tmp_path / "results.json").read_text())["clips"] == 4


@pytest.mark.parametrize(
    "command, message",
    [
        (("train.py", "--data", "nowhere"), "nowhere/train.csv: no such manifest"),
        (("train.py", "--task", "tts"), "asr, vsr, avsr"),
        (("train.py", "--epoch", "3"), "--epoch"),
        (("train.py", "--epochs", "many"), "invalid int value"),
        (("train.py", "--top-k", "5"), "top_k must be between 1 and num_experts=4"),
        (("train.py", "--resume", "nowhere"), "no checkpoint.pt"),
        (("eval.py", "nowhere"), "nowhere: no args.json"),
        (("prepare.py", "nowhere", "out"), "nowhere"),
    ],
)
def test_wrong_commands_say_what_is_wrong(command, message, tmp_path):
    out = ("--out", tmp_path) if command[0] == "train.py" and "--resume" not in command else ()
    printed = run(*command, *out, ok=False)
    assert message in printed and printed.count("Traceback") == 0


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
    printed = run("prepare.py", raw, tmp_path / "out", "--workers", 1, ok=False)
    assert "faceless: ValueError" in printed and "1 clips prepared, 1 failed" in printed
    assert "1 clips prepared" in run("prepare.py", raw, tmp_path / "out", "--workers", 1, "--allow-failures", 1)
    clips = read_manifest(tmp_path / "out" / "test.csv")
    assert [c.id for c in clips] == [name] and clips[0].frames == 75
    assert data.load_media(clips[0], "video").shape == (75, 96, 96) and data.load_media(clips[0], "audio").shape == (48000,)
    assert (tmp_path / "out" / "sheet.png").stat().st_size > 1000
