"""Read a checkpoint of the authors' code, Llama-SMoP or Llama-AVSR, and write it as a run folder of this project.

    python -m tools.published model_avg_1.pth runs/authors --video-encoder large_vox_iter5.pt
    python eval.py runs/authors --data DIR

The checkpoint is one flat file with every weight, frozen ones included, under the names of the authors' modules:

    audio_encoder.*, video_encoder.*                Whisper's encoder, AV-HuBERT under fairseq's names
    audiovisual_proj.gate, .experts.{e}.{0,2,3}     Llama-SMoP: one mixture for both modalities (JEJR)
    audio_proj.{0,2,3}, video_proj.{0,2,3}          Llama-AVSR: an MLP a modality
    llm.model.layers.*.self_attn.lora_{down,up}_{Q,V}, llm.*
"""

import argparse
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from avhubert import load_inert, ours_from_fairseq
from encoders import MODALITIES
from model import MARKERS, LlamaSMoP, check_shapes
from tools.errors import InputError, run_command

EXPECTED = (
    "a flat file with audio_encoder.* or video_encoder.*, audiovisual_proj.* or audio_proj.* or video_proj.*, and llm.* "
    "with lora_down_Q expected"
)
PROJECTOR = {
    "audiovisual_proj.gate.": "projector.gates.joint.",
    "audiovisual_proj.experts.": "projector.experts.joint.",
    "audio_proj.": "projector.experts.audio.0.",
    "video_proj.": "projector.experts.video.0.",
}
LORA = {"q_proj.": "q_proj.base_layer.", "v_proj.": "v_proj.base_layer."}
LORA |= {"lora_down_Q.": "q_proj.lora_A.default.", "lora_up_Q.": "q_proj.lora_B.default."}
LORA |= {"lora_down_V.": "v_proj.lora_A.default.", "lora_up_V.": "v_proj.lora_B.default."}
ENDS = {"new_tokens.input": "llm.model.embed_tokens.weight", "new_tokens.output": "llm.lm_head.weight"}


def load_published(
    checkpoint, llm="meta-llama/Llama-3.2-1B", audio_encoder="openai/whisper-medium.en", video_encoder=None, **settings
):
    """The model of a checkpoint of the authors' code, of torch or .safetensors. Nothing in the file is executed.

    llm, audio_encoder, video_encoder: the pretrained parts that it was trained with.
    settings: what differs from the published setting and cannot be read off the weights: top_k, audio_pool,
        video_pool, prompt, and lora_scale, which is the authors' ALPHA / RANK (their RANK divides the width).

    The file and the model must have the same weights. LoRA, the projector, the rows of the added tokens and BatchNorm's
    statistics (its mode follows the trainer's in the published code) come from the file; all else must equal the
    pretrained parts up to bf16's rounding.

    Verified with random weights against numbers of the published code: Llama-SMoP. Read off the names and layers of that
    code: the MLP of Llama-AVSR. No trained checkpoint was tried.
    """
    try:
        state = load_file(checkpoint) if Path(checkpoint).suffix == ".safetensors" else load_inert(checkpoint)
        modalities = tuple(m for m in ("audio", "video") if any(n.startswith(f"{m}_encoder.") for n in state))
        task = {modalities: task for task, modalities in MODALITIES.items()}[modalities]
        if "audiovisual_proj.gate.weight" in state:
            settings |= {"projector": "JEJR", "num_experts": len(state["audiovisual_proj.gate.weight"])}
            settings["dim_hidden"] = len(state["audiovisual_proj.experts.0.0.weight"])
        else:
            settings |= {"projector": "MLP", "dim_hidden": len(state[f"{modalities[0]}_proj.0.weight"])}
        settings["lora_rank"] = len(state["llm.model.layers.0.self_attn.lora_down_Q.weight"])
    except (OSError, SafetensorError) as error:
        raise InputError(f"{checkpoint}: {error}") from None
    except (KeyError, TypeError, AttributeError):  # other names, a list, numbers as names
        got = ", ".join(map(str, list(state)[:3])) if isinstance(state, dict) else type(state).__name__
        raise InputError(f"{checkpoint}: {EXPECTED}, got {got}, ...") from None
    if settings.get("num_experts", 1) > 1 and settings.get("top_k") == 1:
        raise InputError(f"{checkpoint}: with top-1 the published gate is the constant 1, and ours is not")
    model = LlamaSMoP(task, llm, audio_encoder, video_encoder, **settings)
    try:
        take_over(model, ours_from_published(state))
    except InputError as error:
        raise InputError(f"{checkpoint}: {error}") from None
    return model.eval()


def ours_from_published(weights):
    """The authors' names -> ours."""
    ours = {}
    for name, x in weights.items():
        if name.startswith("video_encoder."):
            fairseq = ours_from_fairseq({name.removeprefix("video_encoder."): x})
            ours |= {f"video_encoder.{name}": x for name in fairseq}
            continue
        for old, new in (LORA if name.startswith("llm.") else PROJECTOR).items():
            name = name.replace(old, new)
        ours[name] = x
    return ours


@torch.no_grad()
def take_over(model, state):
    """Load what was trained from a state with our names; an InputError names what is missing, left over or different."""
    own = model.state_dict()
    if model.config["projector"] == "MLP":  # its gates have no choice, and the authors' model has none
        state = state | {name: x for name, x in own.items() if name.startswith("projector.gates.")}
    if model.llm.config.tie_word_embeddings:  # safetensors keeps only one of the two
        for one, other in (ENDS.values(), reversed(ENDS.values())):
            state = {one: state.get(other)} | state
    check_shapes(own, state)
    new = model.tokenizer.convert_tokens_to_ids(["<pad>", *MARKERS])
    trained = {name: state[ENDS[name]][new] if name in ENDS else state[name] for name in model.trained_state()}
    model.load_trained_state(trained)
    for name, x in state.items():
        if not torch.allclose(own[name].float(), x.float(), rtol=2**-7, atol=1e-6):
            raise InputError(f"{name} is frozen, but not that of the pretrained part: another llm or encoder?")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("checkpoint", type=Path, help="the authors' file")
    parser.add_argument("folder", type=Path, help="the run folder to write")
    for part in ("llm", "audio-encoder", "video-encoder"):
        parser.add_argument(f"--{part}", help="the pretrained part that it was trained with")
    for name, kind in {"top-k": int, "audio-pool": int, "video-pool": int, "lora-scale": float, "prompt": str}.items():
        parser.add_argument(f"--{name}", type=kind, help="as it was trained, if not as published")
    settings = vars(parser.parse_args())
    folder = settings.pop("folder")
    if folder.exists():
        raise InputError(f"{folder}: exists; a new folder is expected")
    load_published(**settings).save(folder)


if __name__ == "__main__":
    run_command(main)
