"""Llama-SMoP: frozen encoders, average pooling, a sparse mixture of projectors, and a Llama with LoRA.

    model = LlamaSMoP(task="avsr", llm="meta-llama/Llama-3.2-1B", audio_encoder="openai/whisper-medium.en",
                      video_encoder="large_vox_iter5.pt", projector="DEDR", num_experts=4, top_k=2)
    losses = model(batch)                       # batch from data.collate; losses.total.backward()
    texts = model.generate(batch, num_beams=15)
    model.save("run"); model = LlamaSMoP.load("run")

On a GPU: `model.place("cuda")`, which runs under bf16 autocast.

What the LLM reads, as in the authors' code, one clip; training continues it with the transcript and EOS:

    BOS <audio> A...A </audio> <video> V...V </video> prompt

Legend: B clips, S samples, T frames, L length of the LLM's input, D width (the LLM's, where nothing else is said).
"""

import errno
import inspect
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from avhubert import AVHubertEncoder, indices
from data import FPS, MAX_SECONDS, SAMPLE_RATE, SAMPLES_PER_FRAME, TASKS
from smop import MultimodalSMoP, mean_of

WHISPER_RATE = 50  # encoder frames a second
MEL_PER_FRAME = 2
SAMPLES_PER_WHISPER_FRAME = SAMPLE_RATE // WHISPER_RATE  # 320
PROMPTS = {
    "asr": "Transcribe speech to text.",
    "vsr": "Transcribe video to text.",
    "avsr": "Transcribe speech and video to text.",
}
MARKERS = ["<audio>", "</audio>", "<video>", "</video>"]
SLOT = {"audio": -1, "video": -2}  # places in the token ids that projected features take
IGNORE = -100  # cross_entropy's ignore_index
MAX_NEW_TOKENS = 256  # of a transcript: 30 s of fast speech


class Losses(NamedTuple):
    total: torch.Tensor  # lm + load_balancing_weight * load_balancing + router_z_weight * router_z
    lm: torch.Tensor
    load_balancing: torch.Tensor
    router_z: torch.Tensor


class LlamaSMoP(nn.Module):
    """Any Whisper, any AV-HuBERT and any Llama, joined by a mixture of projectors.

    task: "asr", "vsr" or "avsr"; a task that lacks a modality needs no encoder for it.
    llm, audio_encoder: a hub name or a folder of transformers (frozen; the LLM gets LoRA), or a dict of
        LlamaConfig / WhisperConfig arguments (random weights, trained).
    video_encoder: a fairseq AV-HuBERT checkpoint (frozen), the folder of a run that trained one (frozen), or a dict
        of AVHubertEncoder's arguments (random weights, trained).
    tokenizer: of transformers; by default the LLM's own. A random LLM needs one, see `train_tokenizer`.
    projector: "DEDR", "JEDR", "JEJR", or "MLP" (one expert: the projector of Llama-AVSR).
    num_experts, top_k, dim_hidden: of each mixture; dim_hidden defaults to the LLM's width.
    audio_pool, video_pool: features averaged into one token (the paper's downsampling factors).
    audio_window: "30s" gives Whisper 30 seconds as it was trained; "clip" only the clip (its positions cut), which
        costs a tenth for clips of 3 s. A frozen Whisper then sees inputs unlike its training, hence off by default.
    lora_rank: default a 32nd of the LLM's width; lora_scale multiplies the update (published: 64 of 2048, 0.125).
    load_balancing_weight, router_z_weight: of the two routing losses in the total; "MLP" has neither.
    prompt: default PROMPTS[task], and none for a random LLM, which has nothing to recall.
    """

    def __init__(
        self,
        task="avsr",
        llm="meta-llama/Llama-3.2-1B",
        audio_encoder="openai/whisper-medium.en",
        video_encoder=None,
        tokenizer=None,
        projector="DEDR",
        num_experts=4,
        top_k=2,
        dim_hidden=None,
        audio_pool=4,
        video_pool=2,
        audio_window="30s",
        lora_rank=None,
        lora_scale=0.125,
        prompt=None,
        load_balancing_weight=0.01,
        router_z_weight=0.001,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "tokenizer", "__class__")}
        if task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
        if projector not in ("MLP", *MultimodalSMoP.CONFIGS):
            raise ValueError(f"projector must be MLP, {', '.join(MultimodalSMoP.CONFIGS)}, got {projector!r}")
        if audio_window not in ("30s", "clip"):
            raise ValueError(f"audio_window must be 30s or clip, got {audio_window!r}")
        self.kinds = TASKS[task]
        self.pools = {"audio": audio_pool, "video": video_pool}
        self.audio_window = audio_window
        self.loss_weights = load_balancing_weight, router_z_weight
        self.bf16 = False  # see `place`

        dims = {}
        if "audio" in self.kinds:
            self.audio_encoder, self.log_mel = load_whisper(audio_encoder)
            dims["audio"] = self.audio_encoder.config.d_model
        if "video" in self.kinds:
            self.video_encoder = load_video_encoder(video_encoder)
            dims["video"] = self.video_encoder.dim
        self.llm, self.tokenizer = load_llm(llm, tokenizer, lora_rank, lora_scale)
        dim = self.llm.config.hidden_size
        if projector == "MLP":
            projector, num_experts, top_k = "DEDR", 1, 1
            self.config |= {"num_experts": 1, "top_k": 1}
            self.loss_weights = 0.0, 0.0  # its router has no choice
        self.projector = MultimodalSMoP(
            dims, dim, projector, dim_hidden=dim_hidden, num_experts=num_experts, top_k=top_k
        )
        self.prompt = prompt if prompt is not None else "" if isinstance(llm, dict) else PROMPTS[task]
        self.train()

    # --- from clips to losses and texts --------------------------------------------------------------------------

    def forward(self, batch, process_group=None):
        """Losses of a batch of `data.collate`: mean cross entropy over the tokens of all transcripts and their EOS,
        and the routers' two losses. Padding has no part in any of them. With a process_group, they are those of the
        batches of all its processes together (see `smop.mean_of`)."""
        decoder, head = self.llm.get_decoder(), self.llm.get_output_embeddings()
        with self.autocast():
            embeddings, mask, labels, routing = self.embed(batch, batch["texts"], process_group)
            hidden = decoder(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)[0]  # (B, L, D)
            target = labels[:, 1:] != IGNORE  # logits only where a transcript is predicted
            logits = head(hidden[indices(target, hidden.device)])  # (text tokens, vocabulary)
        labels = labels[:, 1:][target].to(logits.device, non_blocking=True)
        lm = F.cross_entropy(logits.float(), labels, reduction="sum")
        lm = mean_of(lm, torch.tensor(len(labels)), process_group)
        balance, z = routing.load_balancing_loss, routing.router_z_loss
        return Losses(lm + self.loss_weights[0] * balance + self.loss_weights[1] * z, lm, balance, z)

    @torch.no_grad()
    def generate(self, batch, num_beams=1, max_new_tokens=MAX_NEW_TOKENS):
        """The transcripts of a batch, by greedy or beam search; nothing is sampled."""
        ids = self.generate_ids(batch, num_beams=num_beams, max_new_tokens=max_new_tokens)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @torch.no_grad()
    def generate_ids(self, batch, num_beams=1, **settings):
        """The new tokens' ids (B, length) after each clip's prefix; `settings` are GenerationConfig's.

        All of the prefix but its last token runs through the LLM once a clip, and only its cache is repeated for the
        beams: `generate` alone would run it once a beam.
        """
        config = GenerationConfig(
            num_beams=num_beams,
            do_sample=False,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **settings,
        )
        with self.autocast():
            embeddings, mask, _, _ = self.embed(batch)
            positions = (mask.cumsum(1) - 1).clamp(min=0)  # padding, on the left, takes none
            cache = self.llm.get_decoder()(
                inputs_embeds=embeddings[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions[:, :-1],
                use_cache=True,
            ).cache
            cache.batch_repeat_interleave(num_beams)
            return self.llm.generate(
                inputs_embeds=embeddings, attention_mask=mask, cache=cache, generation_config=config
            )

    def embed(self, batch, texts=None, process_group=None):
        """The LLM's input: embeddings (B, L, D), attention mask (B, L), labels (B, L) on the CPU, routing.

        With texts (training) rows are padded on the right, without (generation) on the left.
        """
        features, counts, routing = self.project(batch, process_group)
        ids, labels = self.token_ids(counts, texts)  # on the CPU, so that finding the slots makes no GPU wait
        embedding = self.llm.get_input_embeddings()
        device = embedding.weight.device
        embeddings = embedding(ids.clamp(min=0).to(device, non_blocking=True))  # (B, L, D)
        for kind, x in features.items():
            real = indices(torch.arange(x.shape[1]) < counts[kind][:, None], device)
            embeddings[indices(ids == SLOT[kind], device)] = x[real].to(embeddings.dtype)
        mask = (ids != self.tokenizer.pad_token_id).long().to(device, non_blocking=True)
        return embeddings, mask, labels, routing

    def token_ids(self, counts, texts=None):
        """Token ids (B, L) with SLOTs for the features, and labels (B, L): IGNORE but for each text and its EOS."""
        encode = self.tokenizer.convert_tokens_to_ids
        bos, eos, pad = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        prompt = self.tokenizer(self.prompt, add_special_tokens=False).input_ids
        rows, targets = [], []
        for i in range(len(next(iter(counts.values())))):
            row = [] if bos is None else [bos]
            for kind in self.kinds:
                row += [encode(f"<{kind}>"), *[SLOT[kind]] * int(counts[kind][i]), encode(f"</{kind}>")]
            row += prompt
            text = [] if texts is None else [*self.tokenizer(texts[i], add_special_tokens=False).input_ids, eos]
            rows.append(torch.tensor(row + text))
            targets.append(torch.tensor([IGNORE] * len(row) + text))
        side = "left" if texts is None else "right"
        pad_to = nn.utils.rnn.pad_sequence
        return pad_to(rows, True, pad, side), pad_to(targets, True, IGNORE, side)

    def project(self, batch, process_group=None):
        """LLM-wide tokens of each modality: features {kind: (B, tokens, D)}, counts {kind: (B,) on the CPU}, routing."""
        features, masks, counts = {}, {}, {}
        for kind in self.kinds:
            pool, encode = self.pools[kind], {"audio": self.encode_audio, "video": self.encode_video}[kind]
            lengths = whisper_frames(batch["audio_lengths"]) if kind == "audio" else batch["video_lengths"]
            counts[kind] = lengths // pool  # the remainder is dropped
            if (counts[kind] < 1).any():
                short = [name for name, count in zip(batch["ids"], counts[kind]) if count < 1]
                raise ValueError(f"{', '.join(short)}: too short for {kind} pooling by {pool}")
            x = encode(batch, lengths)  # (B, frames, D_encoder)
            features[kind] = F.avg_pool1d(x.transpose(1, 2), pool).transpose(1, 2)  # (B, tokens, D_encoder)
            mask = torch.arange(features[kind].shape[1]) < counts[kind][:, None]
            masks[kind] = mask.to(x.device, non_blocking=True)
        features, routing = self.projector(features, masks, process_group)
        return features, counts, routing

    def check(self, clips):
        """A ValueError names every clip whose length or transcript this model cannot take; no clip is read."""
        frames = torch.tensor([clip.frames for clip in clips])
        lengths = {"audio": whisper_frames(frames * SAMPLES_PER_FRAME), "video": frames}
        counts = {kind: lengths[kind] // self.pools[kind] for kind in self.kinds}
        texts = self.tokenizer([clip.text for clip in clips], add_special_tokens=False).input_ids
        texts = torch.tensor([len(text) + 1 for text in texts])  # with EOS
        most = self.llm.config.max_position_embeddings
        rest = self.token_ids({kind: torch.tensor([0]) for kind in self.kinds})[0].numel()  # markers, prompt
        total = rest + sum(counts.values()) + texts
        faults = {f"too short for {kind} pooling by {self.pools[kind]}": counts[kind] < 1 for kind in self.kinds}
        faults[f"a transcript of more than {MAX_NEW_TOKENS} tokens"] = texts > MAX_NEW_TOKENS
        faults[f"more tokens than the LLM's {most} positions"] = total > most
        if "audio" in self.kinds:
            faults[f"longer than Whisper's {MAX_SECONDS} s"] = frames > MAX_SECONDS * FPS
        found = [f"{clips[i].id}: {fault}" for fault, where in faults.items() for i in where.nonzero().flatten()]
        if found:
            more = f"; and {len(found) - 20} more" if len(found) > 20 else ""
            raise ValueError("; ".join(found[:20]) + more)

    def encode_audio(self, batch, frames):
        """Whisper's features of `frames` (B,) 20 ms frames a clip: (B, max(frames), D_audio)."""
        audio, samples = batch["audio"], batch["audio_lengths"]
        if samples.max() > MAX_SECONDS * SAMPLE_RATE:
            raise ValueError(f"{batch['ids'][int(samples.argmax())]}: longer than Whisper's {MAX_SECONDS} s")
        most = int(frames.max())
        window = MAX_SECONDS * SAMPLE_RATE
        if self.audio_window == "clip":  # one frame more: the last frames of a spectrogram reflect its edge
            window = min((most + 1) * SAMPLES_PER_WHISPER_FRAME, window)
        device = self.audio_encoder.conv1.weight.device
        # Waveforms stay in float32 until here, also under autocast: bf16 has 8 bits.
        clips = [clip[:length].cpu().numpy() for clip, length in zip(audio, samples)]
        with torch.autocast(device.type, enabled=False):
            mel = self.log_mel(
                clips,
                sampling_rate=SAMPLE_RATE,
                padding="max_length",
                max_length=window,
                return_tensors="pt",
                device=str(device),
            ).input_features.to(device)  # (B, mels, 2 * window frames)
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained(self.audio_encoder)):
            if self.audio_window == "30s":
                return self.audio_encoder(mel).last_hidden_state[:, :most]
            mask = (torch.arange(most) < frames[:, None]).to(device, non_blocking=True)
            return whisper_on_clip(self.audio_encoder, mel[..., : MEL_PER_FRAME * most], mask)

    def encode_video(self, batch, frames):
        """AV-HuBERT's features of `frames` (B,) 40 ms frames a clip, cut to whole pools: (B, max(frames), D_video)."""
        frames = frames // self.pools["video"] * self.pools["video"]
        video = batch["video"][:, :, : int(frames.max())]
        video = video.to(self.video_encoder.proj.weight.device, non_blocking=True)
        mask = torch.arange(video.shape[2]) < frames[:, None]
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained(self.video_encoder)):
            return self.video_encoder(video, mask)

    def place(self, device):
        """Move to a device, and on a GPU run under bf16 autocast from now on, with `halve_frozen`."""
        self.bf16 = torch.device(device).type == "cuda"
        return (self.halve_frozen() if self.bf16 else self).to(device)

    def autocast(self):
        return torch.autocast(next(self.parameters()).device.type, torch.bfloat16, enabled=self.bf16)

    def halve_frozen(self):
        """Keep frozen matrices in bf16; autocast would cast them again at every use, a billion weights a token."""
        for p in self.parameters():
            if not p.requires_grad and p.ndim > 1:
                p.data = p.data.bfloat16()
        return self

    def train(self, mode=True):
        """Like nn.Module.train, but frozen parts stay in eval mode: no dropout, no new BatchNorm statistics."""
        super().train(mode)
        for part in self.children():
            part.train(mode and is_trained(part))
        return self

    # --- files ---------------------------------------------------------------------------------------------------

    def trained_state(self):
        """{name: tensor} of all that training changes, or that was drawn at random: what a run has to keep."""
        state = {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}
        if "video" in self.kinds:  # BatchNorm's statistics, also frozen ones: in the authors' training they moved
            state |= {f"video_encoder.{name}": b for name, b in self.video_encoder.named_buffers()}
        if not isinstance(self.config["llm"], dict):  # the rows of the new tokens, in a vocabulary that is frozen
            new = self.tokenizer.convert_tokens_to_ids(["<pad>", *MARKERS])
            state["new_tokens.input"] = self.llm.get_input_embeddings().weight[new].detach()
            state["new_tokens.output"] = self.llm.get_output_embeddings().weight[new].detach()
        return state

    @torch.no_grad()
    def load_trained_state(self, state):
        """Take over a `trained_state`; a ValueError names what is missing, left over or of another shape."""
        own = self.trained_state()
        check_shapes(own, state)
        for name, value in state.items():
            if name.startswith("new_tokens."):
                new = self.tokenizer.convert_tokens_to_ids(["<pad>", *MARKERS])
                end = getattr(self.llm, f"get_{name.partition('.')[2]}_embeddings")()
                end.weight[new] = value.to(end.weight)
            else:
                own[name].copy_(value)

    def save(self, folder):
        """Write config.json, model.safetensors (only what was trained) and the tokenizer to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = dict(self.config)
        for part in ("llm", "audio_encoder", "video_encoder"):  # a path must be valid from anywhere, a hub name stays
            if isinstance(config[part], (str, Path)) and os.path.exists(config[part]):
                config[part] = os.path.abspath(config[part])
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.tokenizer.save_pretrained(folder)
        state = {name: tensor.contiguous() for name, tensor in self.trained_state().items()}
        write_atomically(folder / "model.safetensors", lambda path: save_file(state, path))

    @classmethod
    def load(cls, folder, **changes):
        """The model of a folder written by `save`. `changes` replace entries of its config: a moved encoder, say.

        task="asr" or "vsr" takes from a run of avsr only what it needs; the run never learnt to do without the rest.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder}: no config.json; expected a folder of LlamaSMoP.save, or of a finished train.py"
            )
        config = json.loads((folder / "config.json").read_text())
        other = (config | changes).keys() ^ (inspect.signature(cls).parameters.keys() - {"tokenizer"})
        if other:
            raise ValueError(f"{folder / 'config.json'}: of another version, differing in {', '.join(sorted(other))}")
        task = changes.get("task", config["task"])
        if not set(TASKS.get(task, ())) <= set(TASKS[config["task"]]):
            raise ValueError(f"{folder}: trained on {config['task']}, which lacks what {task} needs")
        model = cls(**config | changes, tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        try:
            state = load_file(folder / "model.safetensors")
            if task != config["task"]:  # what is joint has the name of the first modality
                joint = {name: name.replace(".smops.video.", ".smops.audio.") for name in model.trained_state()}
                state = {name: state.get(name, state.get(joint[name])) for name in joint}
            model.load_trained_state(state)
        except (ValueError, SafetensorError) as error:  # of another model, or half a copy
            raise ValueError(f"{folder / 'model.safetensors'}: {error}") from None
        return model.eval()

    @classmethod
    def from_published(cls, checkpoint, *parts, **settings):
        """The model of a checkpoint of the authors' code: see `published.load_published`."""
        from tools.published import load_published  # it needs this class

        return load_published(checkpoint, *parts, **settings)


def write_atomically(path, write):
    """write(partial path), then rename: whoever reads `path` finds a whole file, whenever the program is killed. Where
    it cannot be written, an OSError says why and the file that was there stays."""
    partial = Path(f"{path}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise their own, without a number
        partial.unlink(missing_ok=True)
        full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        kept = "; the previous one is kept" if Path(path).exists() else ""
        raise OSError(f"{path}: could not be written{', is the disk full?' * full} ({error}){kept}") from None


# --- parts -------------------------------------------------------------------------------------------------------


def is_trained(module):
    """Whether any of a module's parameters is trained; all others are frozen."""
    return any(p.requires_grad for p in module.parameters())


def check_shapes(own, state):
    """A ValueError unless two {name: tensor} have the same names and shapes."""
    for name in own | state:
        here, there = (
            tuple(x.shape) if isinstance(x, torch.Tensor) else None for x in (own.get(name), state.get(name))
        )
        if here is None or here != there:
            raise ValueError(f"{name}: the model has {here}, the file {there}")


def whisper_frames(samples):
    """Encoder frames kept of clips with `samples` (B,) 16 kHz samples: 50 a second, at least 25, at most 1500.

    In integers and per clip; the published code takes the longest clip of the batch, in the default dtype.
    """
    return (samples * WHISPER_RATE // SAMPLE_RATE).clamp(25, MAX_SECONDS * WHISPER_RATE)


def whisper_on_clip(encoder, mel, mask):
    """A Whisper encoder on fewer than 30 s: mel (B, mels, 2T), mask (B, T) bool, True = real -> (B, T, D).

    As WhisperEncoder.forward without LayerDrop, with its first T positions, and with padding hidden from the
    convolutions and as attention keys, so that a clip's features do not depend on its batch.
    """
    x = F.gelu(encoder.conv1(mel * mask.repeat_interleave(MEL_PER_FRAME, 1).unsqueeze(1)))  # (B, D, 2T)
    x = F.gelu(encoder.conv2(x * mask.repeat_interleave(MEL_PER_FRAME, 1).unsqueeze(1)))  # (B, D, T)
    x = x.transpose(1, 2) + encoder.embed_positions.weight[: mask.shape[1]]  # (B, T, D)
    x = F.dropout(x, encoder.dropout, encoder.training)
    for layer in encoder.layers:
        x = layer(x, mask[:, None, None, :])
    return encoder.layer_norm(x)


def make_config(cls, settings):
    """A configuration of transformers, which would take a misspelt setting without a word."""
    unknown = settings.keys() - cls().to_dict().keys()
    if unknown:
        raise ValueError(f"{cls.__name__} has no {', '.join(sorted(unknown))}")
    return cls(**settings, attn_implementation="sdpa")


def from_hub(cls, source, **settings):
    """from_pretrained, with an error that names what was not found."""
    try:
        return cls.from_pretrained(source, **settings)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{source}: neither a folder of transformers nor found on its hub ({reason})") from None


def load_whisper(source):
    """(WhisperEncoder, its log-mel extractor): frozen from a hub name or folder, random from a dict of WhisperConfig."""
    if isinstance(source, dict):
        config = make_config(WhisperConfig, source)
        return WhisperEncoder(config), WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    config = from_hub(WhisperConfig, source)
    # Of a folder with the encoder alone, WhisperModel would find no weight under its names and stay random.
    alone = config.architectures == ["WhisperEncoder"]
    model, report = (WhisperEncoder if alone else WhisperModel).from_pretrained(
        source, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    missing = [name for name in report["missing_keys"] if alone or name.startswith("encoder.")]
    if missing:
        raise ValueError(f"{source}: not a Whisper encoder, it lacks {missing[0]} and {len(missing) - 1} more")
    encoder = model if alone else model.get_encoder()
    return encoder.requires_grad_(False).eval(), WhisperFeatureExtractor.from_pretrained(source)


def load_video_encoder(source):
    """AVHubertEncoder: frozen from a fairseq file or from the folder of a run that trained one, random from a dict."""
    if source is None:
        raise ValueError("video_encoder: a fairseq AV-HuBERT checkpoint, a run folder or a configuration is needed")
    if isinstance(source, dict):
        try:
            return AVHubertEncoder(**source)
        except TypeError as error:
            raise ValueError(f"video_encoder: {error}") from None
    if not os.path.isdir(source):
        return AVHubertEncoder.from_fairseq(source)
    config = json.loads((Path(source) / "config.json").read_text())
    if "video" not in TASKS[config["task"]]:
        raise ValueError(f"{source}: a run of the task {config['task']} has no video encoder")
    config = config["video_encoder"]
    if not isinstance(config, dict):
        return load_video_encoder(config)
    encoder = AVHubertEncoder(**config)
    state = load_file(Path(source) / "model.safetensors")
    prefix = "video_encoder."
    encoder.load_state_dict({n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)})
    return encoder.requires_grad_(False).eval()


def load_llm(source, tokenizer, lora_rank, lora_scale):
    """(causal LM, tokenizer) with the tokens <pad>, <audio>, </audio>, <video>, </video> added, in this order.

    From a hub name or folder: frozen, with LoRA on q and v. From a dict of LlamaConfig arguments: random, all trained.
    """
    if tokenizer is None:
        if isinstance(source, dict):
            raise ValueError("a random LLM needs a tokenizer: see train_tokenizer")
        tokenizer = from_hub(AutoTokenizer, source, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{source}: its tokenizer has no end-of-sequence token, so no transcript could end")
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": MARKERS})
    if isinstance(source, dict):
        vocab_size = max(len(tokenizer), source.get("vocab_size", 0))
        return LlamaForCausalLM(make_config(LlamaConfig, source | {"vocab_size": vocab_size})), tokenizer
    llm = from_hub(AutoModelForCausalLM, source, dtype=torch.float32, trust_remote_code=False)
    llm.generation_config = GenerationConfig()  # a checkpoint's own may sample or punish repetition
    ours, own = len(tokenizer) - 1 - len(MARKERS), llm.get_input_embeddings().num_embeddings
    if ours > own:  # a larger one would be resized, with random rows for words
        raise ValueError(f"{source}: it knows {own} tokens, but its tokenizer (or the run's) has {ours}")
    if len(tokenizer) > own:
        llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return add_lora(llm, lora_rank, lora_scale), tokenizer


def add_lora(llm, rank=None, scale=0.125):
    """Freeze a Llama and add LoRA to its q and v: W x + scale * B A x, with `rank` rows in A (default: width / 32)."""
    rank = llm.config.hidden_size // 32 if rank is None else rank
    lora = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=["q_proj", "v_proj"])
    return inject_adapter_in_model(lora, llm.requires_grad_(False))


def train_tokenizer(texts, vocab_size=1000):
    """A tokenizer of transformers around a sentencepiece BPE model trained on transcripts, with at most `vocab_size`
    pieces (fewer where the texts have fewer)."""
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=f"{folder}/tokenizer",
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            minloglevel=2,
        )
        settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
        return AutoTokenizer.from_pretrained(folder)
