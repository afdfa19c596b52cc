"""The numbers of the authors' code, made with random weights: see ../shared/golden/README.md.

`golden/compact.npz` is enough for AV-HuBERT and one clip through the whole model; with ../shared there are more cases.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import COMPACT, GOLDEN, close, needs_shared

from avhubert import AVHubertEncoder, normalise
from data import collate, crop_video, transform_audio
from test_smop import check_published
from tools.media import fit_audio
from tools.published import load_published, ours_from_published
from whisper_encoder import whisper_frames


@pytest.fixture(scope="module")
def published(theirs):
    """(model, its description): the tiny model of the authors' numbers, loaded as their users would."""
    folder, info = theirs, json.loads(str(np.load(COMPACT)["model.info_json"]))
    settings = {"lora_scale": info["lora"]["scaling"], "prompt": info["prompt"]}  # not the defaults
    model = load_published(folder / "model.pth", folder / "llm", folder / "whisper", folder / "avhubert.pt", **settings)
    assert model.config["lora_rank"] == info["lora"]["real_rank"]
    assert model.config["dim_hidden"] == info["smop"]["intermediate"]
    return model, info


# --- the mixture -------------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("case", ["e4_k4", "e8_k1"])
def test_more_mixtures(case):
    check_published(np.load(GOLDEN / "smop.npz"), case)


# --- AV-HuBERT ---------------------------------------------------------------------------------------------------


def test_avhubert(published):
    encoder, golden = published[0].video_encoder, np.load(COMPACT)
    video = normalise(torch.from_numpy(golden["avhubert.video_u8"])[None])
    close(encoder(video), golden["avhubert.features"], atol=2e-5)


@needs_shared
def test_avhubert_in_a_batch():
    """From a file like the published ones, which holds objects of fairseq."""
    golden = np.load(GOLDEN / "avhubert-tiny.npz")
    encoder = AVHubertEncoder.from_fairseq(GOLDEN / "avhubert-tiny.pt")
    video, mask = torch.from_numpy(golden["video"]), ~torch.from_numpy(golden["padding_mask"])
    close(encoder(video), golden["features"], atol=2e-5)
    close(encoder(video, mask), golden["features_with_padding_mask"], atol=2e-5)
    close(encoder(video[1:, :, :20]), golden["features_clip1_alone"], atol=2e-5)


# --- the whole model ---------------------------------------------------------------------------------------------


def check_case(published, case, golden, waves, video):
    """Everything that `golden` holds of one case; waves [(S,), ...], video (B, T, 88, 88) uint8, cut to whole pools."""
    model, info = published
    expected = {
        n.removeprefix(f"{case}."): torch.from_numpy(golden[n]) for n in golden.files if n.startswith(f"{case}.")
    }
    frames, texts = info["cases"][case]["clips_frames_samples"][0][0], info["cases"][case]["texts"]
    video = F.pad(video, (0, 0, 0, 0, 0, frames - video.shape[1]), value=99)  # the model cuts the rest off
    samples = [transform_audio(fit_audio(wave, 640 * frames)) for wave in waves]
    batch = collate([{"id": t, "text": t, "audio": a, "video": v} for t, a, v in zip(texts, samples, video)])
    close(batch["audio"], expected["audio"][..., 0])

    embeddings, mask, labels, routing = model.embed(batch, batch["texts"])
    close(embeddings, expected["embeddings"], atol=5e-5)
    assert torch.equal(labels[:, 1:], expected["labels"][:, 1:])
    logits, experts = ([getattr(r, name) for r in routing.by_modality.values()] for name in ("logits", "experts"))
    if len(texts) == 1:  # theirs are clip by clip, ours modality by modality
        close(torch.cat(logits), expected["router_logits"], atol=5e-5)
        assert torch.equal(torch.cat(experts), expected["selected_experts"])
    close(model.llm(inputs_embeds=embeddings, attention_mask=mask).logits, expected["logits"], atol=2e-4)

    model.zero_grad()
    losses = model(batch)
    parts = {"total": losses.total, "lm": losses.lm, "load_balancing": losses.load_balancing, "z": losses.router_z}
    for name, loss in parts.items():
        close(loss, expected[f"{name}_loss"], atol=2e-5)
    losses.total.backward()
    gradients = {name.removeprefix("grad."): x for name, x in expected.items() if name.startswith("grad.")}
    gradients = ours_from_published(gradients)
    for name, gradient in gradients.items():
        close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=2e-5)

    if len(texts) == 1:
        close(model.embed(batch)[0], expected["test_embeddings"], atol=5e-5)
        for beams, name in ((1, "decoded_greedy"), (4, "decoded_beam")):
            assert torch.equal(model.generate_ids(batch, beams, max_new_tokens=8), expected[name])
    return gradients


def test_one_clip(published):
    golden = np.load(COMPACT)
    video = torch.from_numpy(golden["short.video_u8"])[None]
    gradients = check_case(published, "short", golden, [golden["short.wave"]], video)
    assert len(gradients) == 15  # the gate, the first expert, LoRA


@needs_shared
@pytest.mark.parametrize("case", ["b1", "b2", "short", "round58"])
def test_more_clips(published, case):
    golden = np.load(GOLDEN / "llama_smop_tiny" / "cases.npz")
    video = golden[f"{case}.video"][:, :, 0]  # normalised
    video = torch.from_numpy(np.rint((video * 0.165 + 0.421) * 255).astype(np.uint8))
    waves = [golden[f"{case}.wave{i}"] for i in range(len(video))]
    gradients = check_case(published, case, golden, waves, video)
    assert len(gradients) == sum(p.requires_grad for p in published[0].parameters())


# --- what goes in ------------------------------------------------------------------------------------------------


def test_audio_frames():
    samples = torch.tensor([640, 8320, 48_128, 479_789, 480_640])
    assert whisper_frames(samples).tolist() == [25, 26, 150, 1499, 1500]


@needs_shared
@pytest.mark.parametrize("side", ["even", "odd"])
def test_video_transform(side):
    golden = np.load(GOLDEN / "transforms.npz")
    grey = golden[f"{side}.grey_as_rgb_u8"][..., 0]
    ours = normalise(crop_video(grey)[None])[0, 0]  # (T, 88, 88)
    close(ours, golden[f"{side}.grey_as_rgb_video"][:, 0], atol=1e-3)  # the authors' weights of grey sum to 0.9999
    colour = golden[f"{side}.frames_rgb_u8"] @ np.float32([0.2989, 0.587, 0.114])
    close(normalise(crop_video(colour)[None])[0, 0], golden[f"{side}.video"][:, 0])


@needs_shared
@pytest.mark.parametrize("samples", [4000, 3200, 5120])
def test_audio_transform(samples):
    golden = np.load(GOLDEN / "transforms.npz")
    close(transform_audio(fit_audio(golden["wave"], samples)), golden[f"audio_cut_or_pad_{samples}"][:, 0])
