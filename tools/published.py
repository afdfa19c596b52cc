"""The authors' checkpoints: Llama-SMoP and Llama-AVSR as their published code saves them, in and out.

    model = LlamaSMoP.from_published("model.pth", video_encoder="large_vox_iter5.pt")
    save_published(model, "again.pth")

One flat file holds every weight, frozen ones included, under the names of their modules:

    audio_encoder.*, video_encoder.*                Whisper's encoder, AV-HuBERT under fairseq's names
    audiovisual_proj.gate, .experts.{e}.{0,2,3}     Llama-SMoP: one mixture for both modalities (JEJR)
    audio_proj.{0,2,3}, video_proj.{0,2,3}          Llama-AVSR: an MLP a modality
    llm.model.layers.*.self_attn.lora_{down,up}_{Q,V}, llm.*
"""

import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from avhubert import load_inert, ours_from_fairseq
from data import TASKS
from model import MARKERS, LlamaSMoP, check_shapes


@torch.no_grad()
def load_published(
    checkpoint, llm="meta-llama/Llama-3.2-1B", audio_encoder="openai/whisper-medium.en", video_encoder=None, **settings
):
    """The model of a checkpoint of the authors' code: one flat file of weights, of torch or .safetensors.

    llm, audio_encoder, video_encoder: the pretrained parts that it was trained with.
    settings: what differs from the published setting and cannot be read off the weights: top_k, audio_pool,
        video_pool, prompt, and lora_scale, which is the authors' ALPHA / RANK (their RANK divides the width).

    The names on both sides must be the same. LoRA, the projector, the rows of the added tokens and BatchNorm's
    statistics (its mode follows the trainer's in the published code) are taken over; all else must equal the
    pretrained parts to within bf16's rounding. A ValueError names what does not. Nothing in the file is executed.

    Verified with random weights against numbers of the published code: Llama-SMoP (`audiovisual_proj`, JEJR). Read
    off the names and layers of that code: the MLP of Llama-AVSR (`audio_proj`, `video_proj`), built as one expert
    is. No trained checkpoint was at hand.
    """
    state = load_file(checkpoint) if Path(checkpoint).suffix == ".safetensors" else load_inert(checkpoint)
    kinds = tuple(
        kind for kind in ("audio", "video") if any(str(name).startswith(f"{kind}_encoder.") for name in state)
    )
    try:
        task = {names: task for task, names in TASKS.items()}[kinds]
        if "audiovisual_proj.gate.weight" in state:
            expert = state["audiovisual_proj.experts.0.0.weight"]
            settings |= {"projector": "JEJR", "num_experts": len(state["audiovisual_proj.gate.weight"])}
        else:
            expert = state[f"{kinds[0]}_proj.0.weight"]
            settings |= {"projector": "MLP"}
        if settings.get("num_experts", 1) > 1 and settings.get("top_k") == 1:
            raise ValueError(f"{checkpoint}: with top-1 the published gate is the constant 1, and ours is not")
        rank = len(state["llm.model.layers.0.self_attn.lora_down_Q.weight"])
    except (KeyError, TypeError):
        raise ValueError(
            f"{checkpoint}: a flat file with audio_encoder.* or video_encoder.*, audiovisual_proj.* or audio_proj.* or "
            f"video_proj.*, and llm.* with lora_down_Q expected, got {', '.join(map(str, list(state)[:3]))}, ..."
        ) from None
    model = LlamaSMoP(task, llm, audio_encoder, video_encoder, dim_hidden=len(expert), lora_rank=rank, **settings)
    own = published_state(model)
    new = model.tokenizer.convert_tokens_to_ids(["<pad>", *MARKERS])
    trained = {x.data_ptr() for x in model.trained_state().values()}
    try:
        check_shapes(own, state)
        for name, value in state.items():
            if name in ("llm.model.embed_tokens.weight", "llm.lm_head.weight"):
                own[name][new] = value[new].to(own[name])
            elif own[name].data_ptr() in trained:
                own[name].copy_(value)
        for name, value in state.items():
            if not torch.allclose(own[name].float(), value.float(), rtol=2**-7, atol=1e-6):
                raise ValueError(f"{name} is frozen, but not that of the pretrained part: another llm or encoder?")
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    return model.eval()


def save_published(model, path):
    """Write the whole model, frozen parts included, as `load_published` reads it. JEJR and MLP alone have that form."""
    torch.save({name: value.cpu() for name, value in published_state(model).items()}, path)


def published_state(model):
    """{name in the authors' code: tensor} of the whole model; what is ours shares its memory."""
    projector, file = model.config["projector"], model.config["video_encoder"]
    if projector not in ("JEJR", "MLP") or "video" in model.kinds and not os.path.isfile(str(file)):
        raise ValueError("the published form knows JEJR and MLP, with AV-HuBERT from its fairseq file")
    state = {}
    if "audio" in model.kinds:
        state |= {f"audio_encoder.{name}": x for name, x in model.audio_encoder.state_dict().items()}
    if "video" in model.kinds:
        fairseq, ours = load_inert(file)["model"], model.video_encoder.state_dict()  # the file has parts unused here
        fairseq |= {theirs: ours[name] for name, theirs in ours_from_fairseq({n: n for n in fairseq}).items()}
        state |= {f"video_encoder.{name}": x for name, x in fairseq.items()}
    if projector == "JEJR":
        smop = model.projector.smops[model.kinds[0]]
        state |= {f"audiovisual_proj.{name}": x for name, x in smop.state_dict().items()}
    else:
        for kind, smop in model.projector.smops.items():
            state |= {f"{kind}_proj.{name}": x for name, x in smop.experts[0].state_dict().items()}
    for name, x in model.llm.state_dict().items():
        name = name.replace(".base_layer", "")
        for place in "qv":
            name = name.replace(f"{place}_proj.lora_A.default", f"lora_down_{place.upper()}")
            name = name.replace(f"{place}_proj.lora_B.default", f"lora_up_{place.upper()}")
        state[f"llm.{name}"] = x
    return state
