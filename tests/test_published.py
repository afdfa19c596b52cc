"""tools/published.py: checkpoints of the authors' code are read, whole and exactly, or refused by name.

That what was read computes the authors' numbers is in test_parity.py.
"""

import shutil

import pytest
import torch
from common import close, command, small_batch, write_llama
from safetensors.torch import load_file, save_file
from torch import nn

from data import collate
from model import LlamaSMoP
from tools import published
from tools.errors import InputError
from tools.published import load_published

TEXTS = ("w1 w2", "w3", "w4")


@pytest.fixture(scope="module")
def weights(theirs):
    return torch.load(theirs / "model.pth", weights_only=True)


def load(theirs, checkpoint="model.pth", **settings):
    parts = theirs / "llm", theirs / "whisper", theirs / "avhubert.pt"
    return load_published(theirs / checkpoint, *parts, lora_scale=0.25, **settings)


def test_file_of_bf16_and_moved_statistics(theirs, weights, tmp_path):
    """As a run in bf16 leaves it: frozen parts rounded, BatchNorm's statistics changed. What is saved is what was read."""
    moved = {name: x.bfloat16() if x.is_floating_point() else x for name, x in weights.items()}
    name = "video_encoder.feature_extractor_video.resnet.frontend3D.1.running_mean"
    moved[name] += 1
    save_file(moved, theirs / "moved.safetensors")
    model, batch = load(theirs, "moved.safetensors"), collate(small_batch(texts=TEXTS))
    close(model.video_encoder.resnet.frontend3D[1].running_mean, moved[name].float())
    close(model.projector.gates["joint"].weight, moved["audiovisual_proj.gate.weight"].float())
    assert not model.training and not any(module.training for module in model.modules())
    expected = model(batch).total
    model.save(tmp_path / "run")
    close(LlamaSMoP.load(tmp_path / "run")(batch).total, expected)


def test_run_folder_names_frozen_parts_and_holds_the_rest(theirs, tmp_path):
    model = load(theirs)
    model.save(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"projector", "llm", "new_tokens", "video_encoder"}
    assert all("lora" in name for name in names if name.startswith("llm"))
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert all(name.endswith(statistics) for name in names if name.startswith("video"))


@pytest.mark.parametrize("modalities", [("audio", "video"), ("audio",), ("video",)])
def test_mlp_of_llama_avsr_is_one_expert(theirs, weights, modalities):
    prefix = "audiovisual_proj.experts.1"
    expert = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
    encoders = tuple(f"{modality}_encoder." for modality in modalities)
    mlp = {name: x for name, x in weights.items() if name.startswith(("llm.", *encoders))}
    for shift, modality in enumerate(modalities):  # two different ones
        mlp |= {f"{modality}_proj{name}": x + shift for name, x in expert.items()}
    torch.save(mlp, theirs / "mlp.pth")
    model = load(theirs, "mlp.pth")
    assert model.modalities == modalities and model.config["projector"] == "MLP"
    for shift, modality in enumerate(modalities):
        plain = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.LayerNorm(64))
        plain.load_state_dict({name[1:]: x + shift for name, x in expert.items()})
        x = torch.randn(2, 3, 64)
        close(model.projector({modality: x})[0][modality], plain(x))


@pytest.mark.parametrize("left", ["both", "llm.model.embed_tokens.weight", "llm.lm_head.weight"])
def test_tied_llm(theirs, weights, tmp_path, left):
    """safetensors keeps one of two names of the same tensor."""
    shutil.copytree(theirs / "llm", tmp_path / "llm")  # its tokenizer
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 2, "vocab_size": 64, "tie_word_embeddings": True}
    llm = write_llama(tmp_path / "llm", **sizes).state_dict()
    ends = {"llm.model.embed_tokens.weight", "llm.lm_head.weight"}
    rows = torch.cat([llm["lm_head.weight"], torch.randn(5, 64)])  # with the five added tokens
    parts = tmp_path / "llm", theirs / "whisper", theirs / "avhubert.pt"
    state = weights | {f"llm.{n}": x for n, x in llm.items()} | {n: rows.clone() for n in ends}
    save_file({n: x for n, x in state.items() if left in ("both", n) or n not in ends}, tmp_path / "a.safetensors")
    model = load_published(tmp_path / "a.safetensors", *parts)
    assert model.llm.get_output_embeddings().weight is model.llm.get_input_embeddings().weight
    close(model.llm.get_output_embeddings().weight, rows)
    if left == "both":
        state["llm.lm_head.weight"][64] += 1
        save_file(state, tmp_path / "untied.safetensors")
        with pytest.raises(InputError, match="untied.safetensors: llm.model.embed_tokens.weight is frozen"):
            load_published(tmp_path / "untied.safetensors", *parts)


def test_what_does_not_fit_is_named(theirs, weights, tmp_path):
    embeddings = weights["llm.model.embed_tokens.weight"]
    wrong = {
        "audio_encoder.conv1.bias is frozen": {"audio_encoder.conv1.bias": weights["audio_encoder.conv1.bias"] + 0.1},
        "embed_tokens.weight is frozen": {"llm.model.embed_tokens.weight": embeddings * 1.1},
        "avg_pool.weight: the model has None": {"avg_pool.weight": torch.ones(1)},
        "epoch: the model has None": {"epoch": 3},
        "v_proj.lora_B.* the model has .* the file None": {"llm.model.layers.1.self_attn.lora_up_V.weight": None},
        "audio_encoder.conv2.bias: the model has .* the file None": {"audio_encoder.conv2.bias": None},
        "experts.joint.3.*: the model has None": {"audiovisual_proj.gate.weight": torch.ones(3, 64)},
        "a flat file .* got": {"audiovisual_proj.gate.weight": None, "audiovisual_proj.experts.0.0.weight": None},
    }
    for message, change in wrong.items():
        state = {name: x for name, x in (weights | change).items() if x is not None}
        torch.save(state, tmp_path / "wrong.pth")
        with pytest.raises(InputError, match=f"wrong.pth: .*{message}"):
            load(theirs, tmp_path / "wrong.pth")
    for content, got in (({"state_dict": weights}, "state_dict"), ([1], "list"), ({1: torch.ones(1)}, "1")):
        torch.save(content, tmp_path / "wrong.pth")
        with pytest.raises(InputError, match=f"wrong.pth: a flat file .* got {got}"):
            load(theirs, tmp_path / "wrong.pth")
    (tmp_path / "half.safetensors").write_bytes(b"half a copy")
    for name in ("half", "missing"):
        with pytest.raises(InputError, match=f"{name}.safetensors: "):
            load(theirs, tmp_path / f"{name}.safetensors")


def test_command_writes_a_run_folder(theirs, tmp_path):
    parts = ("--llm", theirs / "llm", "--audio-encoder", theirs / "whisper", "--video-encoder", theirs / "avhubert.pt")
    line = (published, theirs / "model.pth", tmp_path / "run", *parts, "--lora-scale", 0.25)
    with pytest.raises(InputError, match="model.pth: with top-1"):
        command(*line, "--top-k", 1)
    assert not (tmp_path / "run").exists()
    command(*line, "--prompt", "w1 w2")
    batch = collate(small_batch(texts=TEXTS))
    close(LlamaSMoP.load(tmp_path / "run")(batch).total, load(theirs, prompt="w1 w2")(batch).total)
    with pytest.raises(InputError, match="run: exists; a new folder is expected"):
        command(*line)
