"""Llama-SMoP: frozen encoders, average pooling, a sparse mixture of projectors, and a Llama with LoRA.

    model = LlamaSMoP(task="avsr", llm="meta-llama/Llama-3.2-1B", audio_encoder="openai/whisper-medium.en",
                      video_encoder="large_vox_iter5.pt", projector="DEDR", num_experts=4, top_k=2).to("cuda")
    losses = model(batch)                       # batch from data.collate; losses.total.backward()
    texts = model.generate(batch, num_beams=15)
    model.save("run"); model = LlamaSMoP.load("run")

What the LLM reads of one clip, as in the authors' code, here with 3 audio tokens A, 2 video tokens V and two words:

    ids     BOS <audio> A A A </audio> <video> V V </video> prompt lay blue EOS
    labels   -     -    - - -    -        -    - -    -       -    lay blue EOS        - is IGNORE

A and V are what the projector makes of the encoders' features; each label is predicted from the position before it.

Legend: B clips, L length of the LLM's input, N tokens of a modality in all clips, D the LLM's width.
"""

import inspect
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LogitsProcessor,
)

from encoders import RATES, Encoders
from smop import MultimodalSMoP
from tools.errors import InputError
from tools.tokenizer import load_tokenizer
from whisper_encoder import make_config

PROMPTS = {
    "asr": "Transcribe speech to text.",
    "vsr": "Transcribe video to text.",
    "avsr": "Transcribe speech and video to text.",
}
MARKERS = ["<audio>", "</audio>", "<video>", "</video>"]
SLOT = {"audio": -1, "video": -2}  # places in the token ids that projected features take
IGNORE = -100  # cross_entropy's ignore_index
# What transformers calls the cache of keys and values; 5.24 gave it a new name.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
MAX_NEW_TOKENS = 256  # of a transcript: 30 s of fast speech


class Losses(NamedTuple):
    lm: torch.Tensor  # mean cross entropy over the tokens of all transcripts, EOS included
    auxiliary: torch.Tensor  # load_balancing_weight * load_balancing + router_z_weight * router_z
    load_balancing: torch.Tensor
    router_z: torch.Tensor

    @property
    def total(self):
        return self.lm + self.auxiliary


class LlamaSMoP(Encoders):
    """Any Whisper, any AV-HuBERT and any Llama, joined by a mixture of projectors.

    task: "asr", "vsr" or "avsr"; a task that lacks a modality needs no encoder for it.
    llm: a hub name or a folder of transformers, or a dict of LlamaConfig's arguments.
    audio_encoder: the same with WhisperConfig, or the folder of a run that trained one.
    video_encoder: a fairseq checkpoint of AV-HuBERT, the folder of a run that trained one, or a dict of AVHubertEncoder's
        arguments.
    tokenizer: of transformers; by default the LLM's own. A random LLM needs one, see tools/tokenizer.py.
    projector: `config` of MultimodalSMoP ("DEDR", "JEDR", "JEJR"), or "MLP" (one expert: the projector of Llama-AVSR).
    num_experts, top_k, dim_hidden: of each mixture; dim_hidden defaults to the LLM's width.
    audio_pool, video_pool: features averaged into one token (the paper's downsampling factors).
    audio_window: how much Whisper hears. "30s": always 30 seconds, as it was trained; the default for a pretrained one.
        "clip": only the clip, a tenth of the cost for clips of 3 s; the default for a random one. An encoder from a run
        keeps the window of that run.
    lora_rank: default a 32nd of the LLM's width; lora_scale: factor of the update (published: rank 64 at width 2048, 0.125).
    prompt: default PROMPTS[task], and none for a random LLM, which has nothing to recall.
    load_balancing_weight, router_z_weight: of the two routing losses; "MLP" has neither.
    tokens_per_second: of transcript in the fastest training speech; bounds a transcript's length, see `most_tokens`.

        what is trained       pretrained (the paper)       from a dict (the default run)
        Whisper, AV-HuBERT    nothing                      everything
        projector             everything                   everything
        Llama                 LoRA on q and v              everything

    With a pretrained LLM, the rows of the added tokens are random and are not trained. Whisper's positions are never trained.

    Padding is masked in the encoders, in project (tokens: for the mixture and its losses), embed (attention mask) and
    token_ids (labels: for the transcripts' loss).
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
        audio_window=None,
        lora_rank=None,
        lora_scale=0.125,
        prompt=None,
        load_balancing_weight=0.01,
        router_z_weight=0.001,
        tokens_per_second=None,
    ):
        super().__init__(task, audio_encoder, video_encoder, audio_pool, video_pool, audio_window)
        audio_window = self.audio_window  # where it was None, the default that Encoders chose
        self.config = {k: v for k, v in locals().items() if k not in ("self", "tokenizer", "__class__")}  # for save()
        if projector not in (known := ["MLP", *MultimodalSMoP.CONFIGS]):
            raise InputError(f"projector must be one of {', '.join(known)}, got {projector!r}")
        self.llm, self.tokenizer = load_llm(llm, tokenizer, lora_rank, lora_scale)
        self.load_balancing_weight, self.router_z_weight = load_balancing_weight, router_z_weight
        if projector == "MLP":
            projector, num_experts, top_k = "DEDR", 1, 1
            self.config |= {"num_experts": 1, "top_k": 1}
            self.load_balancing_weight = self.router_z_weight = 0.0  # its router has no choice
        if projector != "DEDR" and len(set(self.widths.values())) > 1:
            raise InputError(
                f"{projector} shares its experts: encoders must be of one width, not {self.widths}; use DEDR"
            )
        self.projector = MultimodalSMoP(
            self.widths,
            self.llm.config.hidden_size,
            projector,
            dim_hidden=dim_hidden,
            num_experts=num_experts,
            top_k=top_k,
        )
        self.prompt = prompt if prompt is not None else "" if isinstance(llm, dict) else PROMPTS[task]
        self.train()

    # --- from clips to losses ------------------------------------------------------------------------------------

    def forward(self, batch):
        """Losses of a batch of `data.collate`. Padding has no part in any of them."""
        with self.autocast():
            embeddings, mask, labels, routing = self.embed(batch, batch["texts"])
            decoder, head = self.llm.get_decoder(), self.llm.get_output_embeddings()
            hidden = decoder(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)[0]  # (B, L, D)
            text = torch.where(labels[:, 1:] != IGNORE)  # where a transcript is predicted; indices: see smop.mix
            logits = head(hidden[:, :-1][text])  # (text tokens, vocabulary)
        lm = F.cross_entropy(logits.float(), labels[:, 1:][text])
        balance, z = routing.load_balancing_loss, routing.router_z_loss
        return Losses(lm, self.load_balancing_weight * balance + self.router_z_weight * z, balance, z)

    def embed(self, batch, texts=None):
        """The LLM's input: embeddings (B, L, D), attention mask (B, L), labels (B, L), MultimodalRouting.

        Rows are padded on the right with texts (training), on the left without (generation).
        """
        features, counts, routing = self.project(batch)
        ids, labels = (x.to(self.device, non_blocking=True) for x in self.token_ids(counts, texts))
        embeddings = self.llm.get_input_embeddings()(ids.clamp(min=0))  # (B, L, D)
        for modality, x in features.items():
            embeddings[torch.where(ids == SLOT[modality])] = x.to(embeddings.dtype)
        return embeddings, (ids != self.tokenizer.pad_token_id).long(), labels, routing

    def project(self, batch):
        """The projected tokens of each modality, clip after clip: {modality: (N, D)}, how many each clip has:
        {modality: (B,) on the CPU}, MultimodalRouting."""
        features, counts = self.encode(batch)  # (B, tokens, D_encoder)
        masks = {modality: self.mask_of(counts[modality], x.shape[1]) for modality, x in features.items()}
        with self.autocast():
            features, routing = self.projector(features, masks)  # (B, tokens, D)
        real = {modality: torch.where(mask) for modality, mask in masks.items()}  # indices: see smop.mix
        return {modality: x[real[modality]] for modality, x in features.items()}, counts, routing

    def token_ids(self, counts, texts=None):
        """Token ids (B, L) with SLOTs for the features, and labels (B, L): IGNORE except at each text and its EOS."""
        id_of = self.tokenizer.convert_tokens_to_ids
        bos, eos, pad = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        prompt = self.tokenizer(self.prompt, add_special_tokens=False).input_ids
        rows, targets = [], []
        for i in range(len(counts[self.modalities[0]])):
            row = [] if bos is None else [bos]
            for modality in self.modalities:
                slots = [SLOT[modality]] * int(counts[modality][i])
                row += [id_of(f"<{modality}>"), *slots, id_of(f"</{modality}>")]
            row += prompt
            text = [] if texts is None else [*self.tokenizer(texts[i], add_special_tokens=False).input_ids, eos]
            rows.append(torch.tensor(row + text))
            targets.append(torch.tensor([IGNORE] * len(row) + text))
        side = "left" if texts is None else "right"
        pad_to = nn.utils.rnn.pad_sequence
        return pad_to(rows, True, pad, side), pad_to(targets, True, IGNORE, side)

    def count_tokens(self, texts):
        """Tokens of each transcript and its EOS, (B,)."""
        return torch.tensor([len(ids) + 1 for ids in self.tokenizer(texts, add_special_tokens=False).input_ids])

    # --- generation ----------------------------------------------------------------------------------------------

    def generate(self, batch, num_beams=1, max_new_tokens=None):
        """The transcripts of a batch, by greedy or beam search; nothing is sampled. Changes nothing in the model."""
        return self.decode(self.generate_ids(batch, num_beams, max_new_tokens))

    def decode(self, ids):
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def most_tokens(self, batch):
        """The most tokens that each transcript may have, (B,): 1.5 times what the fastest training speech would need, plus
        10. A model may repeat itself endlessly on unfamiliar speech."""
        modality, rate = self.modalities[0], self.config["tokens_per_second"]
        counts = self.counts_of(batch)[modality]
        if rate is None:  # not trained by train.py
            return torch.full_like(counts, MAX_NEW_TOKENS)
        seconds = counts * self.pools[modality] / RATES[modality]
        return (1.5 * rate * seconds + 10).long().clamp(max=MAX_NEW_TOKENS)

    @torch.no_grad()
    def generate_ids(self, batch, num_beams=1, max_new_tokens=None, **settings):
        """The new tokens' ids (B, length) after each clip's prefix, at most `max_new_tokens`, or as many as
        `most_tokens` says; `settings` are GenerationConfig's.

        The prefix (all that the LLM reads before the transcript), without its last token, runs once per clip, and its
        cache is repeated for the beams; transformers' `generate` would run it once per beam.
        """
        ends = []
        if max_new_tokens is None:
            most = self.most_tokens(batch).to(self.device)
            max_new_tokens = int(most.max()) + 1
            ends.append(EndAfter(most.repeat_interleave(num_beams), self.tokenizer.eos_token_id))
        config = GenerationConfig(
            num_beams=num_beams,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **settings,
        )
        training = self.training
        self.eval()
        try:
            with self.autocast():
                embeddings, mask, _, _ = self.embed(batch)
                positions = (mask.cumsum(1) - 1).clamp(min=0)  # padding, on the left, takes none
                cache = DynamicCache()
                self.llm.get_decoder()(
                    inputs_embeds=embeddings[:, :-1],
                    attention_mask=mask[:, :-1],
                    position_ids=positions[:, :-1],
                    use_cache=True,
                    **{CACHE: cache},
                )
                cache.batch_repeat_interleave(num_beams)
                return self.llm.generate(
                    inputs_embeds=embeddings,
                    attention_mask=mask,
                    generation_config=config,
                    logits_processor=ends,
                    **{CACHE: cache},
                )
        finally:
            self.train(training)

    # --- files ---------------------------------------------------------------------------------------------------

    def trained_state(self):
        """{name: tensor} of all that training changes, or that was drawn at random: what a run has to keep."""
        state = {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}
        if "video" in self.modalities:  # BatchNorm's statistics, frozen or not: the authors' training moved them
            state |= {f"video_encoder.{name}": b for name, b in self.video_encoder.named_buffers()}
        if not isinstance(self.config["llm"], dict):  # the rows of the new tokens, in a vocabulary that is frozen
            new = self.tokenizer.convert_tokens_to_ids(["<pad>", *MARKERS])
            state["new_tokens.input"] = self.llm.get_input_embeddings().weight[new].detach()
            state["new_tokens.output"] = self.llm.get_output_embeddings().weight[new].detach()
        return state

    @torch.no_grad()
    def load_trained_state(self, state):
        """Take over a `trained_state`; an InputError names what is missing, left over or of another shape."""
        own = self.trained_state()
        check_shapes(own, state)
        for name, value in state.items():
            if name.startswith("new_tokens."):
                new = self.tokenizer.convert_tokens_to_ids(["<pad>", *MARKERS])
                is_input = name == "new_tokens.input"
                rows = (self.llm.get_input_embeddings() if is_input else self.llm.get_output_embeddings()).weight
                rows[new] = value.to(rows)
            else:
                own[name].copy_(value)

    def save(self, folder):
        """Write config.json, model.safetensors (see trained_state) and the tokenizer to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = dict(self.config)
        for part in ("llm", "audio_encoder", "video_encoder"):  # a path must be valid from anywhere, a hub name stays
            if isinstance(config[part], (str, Path)) and os.path.exists(config[part]):
                config[part] = os.path.abspath(config[part])
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.tokenizer.save_pretrained(folder)
        save_file(self.trained_state(), folder / "model.safetensors")

    @classmethod
    def load(cls, folder, **changes):
        """The model of a folder written by `save`, in eval mode. `changes` replace entries of its config: a moved
        encoder, say."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder}: no config.json; expected a folder of LlamaSMoP.save, or of a finished train.py"
            )
        config = json.loads((folder / "config.json").read_text()) | changes
        other = config.keys() ^ (inspect.signature(cls).parameters.keys() - {"tokenizer"})
        if other:
            raise InputError(f"{folder / 'config.json'}: of another version, differing in {', '.join(sorted(other))}")
        model = cls(**config, tokenizer=load_tokenizer(folder))
        try:
            model.load_trained_state(load_file(folder / "model.safetensors"))
        except (InputError, OSError, SafetensorError) as error:  # of another model, half a copy or none
            raise InputError(f"{folder / 'model.safetensors'}: {error}") from None
        return model.eval()


class EndAfter(LogitsProcessor):
    """Forces EOS in each row (clips times beams) after its own number of tokens: its end does not depend on the batch."""

    def __init__(self, most, eos):
        self.most, self.eos = most, eos

    def __call__(self, ids, scores):
        only_eos = torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.eos], device=scores.device), 0)
        return torch.where((ids.shape[1] >= self.most)[:, None], only_eos, scores)


# --- parts -------------------------------------------------------------------------------------------------------


def check_shapes(own, state):
    """Raise an InputError unless two {name: tensor} have the same names and shapes."""
    for name in own | state:
        here, there = (
            tuple(x.shape) if isinstance(x, torch.Tensor) else None for x in (own.get(name), state.get(name))
        )
        if here is None or here != there:
            raise InputError(f"{name}: the model has {here}, the file {there}")


def load_llm(source, tokenizer, lora_rank, lora_scale):
    """(causal LM, tokenizer) with the tokens <pad>, <audio>, </audio>, <video>, </video> added, in this order.

    From a hub name or folder: frozen, with LoRA on q and v. From a dict of LlamaConfig's arguments: random, all trained.
    """
    if tokenizer is None:
        if isinstance(source, dict):
            raise InputError("a random LLM needs a tokenizer: see train_tokenizer in tools/tokenizer.py")
        tokenizer = load_tokenizer(source)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{source}: its tokenizer has no end-of-sequence token, so no transcript could end")
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": MARKERS})
    if isinstance(source, dict):
        vocab_size = max(len(tokenizer), source.get("vocab_size", 0))
        return LlamaForCausalLM(make_config(LlamaConfig, source | {"vocab_size": vocab_size})), tokenizer
    llm = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    llm.generation_config = GenerationConfig()  # a checkpoint's own may sample or punish repetition
    ours, own = len(tokenizer) - 1 - len(MARKERS), llm.get_input_embeddings().num_embeddings
    if ours > own:  # a tokenizer with more tokens would enlarge the LLM, with random rows for words
        raise InputError(f"{source}: it knows {own} tokens, but its tokenizer (or the run's) has {ours}")
    if len(tokenizer) > own:
        llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return add_lora(llm, lora_rank, lora_scale), tokenizer


def add_lora(llm, rank=None, scale=0.125):
    """Freeze a Llama and add LoRA to its q and v: W x + scale * B A x, with `rank` rows in A (default: width / 32)."""
    rank = llm.config.hidden_size // 32 if rank is None else rank
    lora = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=["q_proj", "v_proj"])
    return inject_adapter_in_model(lora, llm.requires_grad_(False))
