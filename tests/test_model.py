"""model.py and whisper_encoder.py: one clip against a batch, any Whisper and any Llama, runs saved and loaded.

That the model computes the numbers of the authors' code is in test_parity.py.
"""

import json
import unicodedata

import pytest
import torch
import torch.nn.functional as F
from common import (
    AVHUBERT, LLM, PROJECTORS, WHISPER, WORDS, byte_level_tokenizer, close, small_batch, small_model, write_llama,
    write_tokenizer, write_whisper,
)  # fmt: skip
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, WhisperFeatureExtractor

from data import Clip, collate
from model import MARKERS, PROMPTS, LlamaSMoP, add_lora
from smop import MultimodalSMoP, load_balancing_loss, router_z_loss
from tools.checks import check_clips, find_altered
from tools.errors import InputError
from tools.tokenizer import load_tokenizer, train_tokenizer
from whisper_encoder import encode, load_whisper, log_mel, mel_filters

# --- what the LLM reads, and the losses --------------------------------------------------------------------------


def test_worked_example_of_the_docstring(tmp_path):
    write_tokenizer(tmp_path)
    write_llama(tmp_path)
    model = LlamaSMoP("avsr", tmp_path, WHISPER, AVHUBERT, prompt="at")
    signs = {-1: "A", -2: "V", -100: "-"}

    def spell(row):
        return " ".join(signs.get(i) or model.tokenizer.convert_ids_to_tokens(i) for i in row.tolist())

    counts = {"audio": torch.tensor([3, 1]), "video": torch.tensor([2, 1])}
    ids, labels = model.token_ids(counts, ["lay blue", "now"])
    assert spell(ids[0]) == "<s> <audio> A A A </audio> <video> V V </video> at lay blue </s>"
    assert spell(labels[0]) == "- - - - - - - - - - - lay blue </s>"
    assert spell(ids[1]) == "<s> <audio> A </audio> <video> V </video> at now </s> <pad> <pad> <pad> <pad>"
    assert spell(labels[1]) == "- - - - - - - - now </s> - - - -"
    ids, labels = model.token_ids(counts)  # to generate from
    assert spell(ids[1]) == "<pad> <pad> <pad> <s> <audio> A </audio> <video> V </video> at"
    assert set(labels.flatten().tolist()) == {-100}
    published = LlamaSMoP("asr", tmp_path, WHISPER).token_ids({"audio": torch.tensor([1])})[0][0]
    assert published[4:].tolist() == model.tokenizer(PROMPTS["asr"], add_special_tokens=False).input_ids


def test_total_is_the_transcripts_loss_and_the_weighted_routing():
    batch = collate(small_batch("asr"))
    losses = small_model("asr", load_balancing_weight=0.5, router_z_weight=0.25)(batch)
    close(losses.auxiliary, 0.5 * losses.load_balancing + 0.25 * losses.router_z)
    default = small_model("asr")(batch)
    close(default.total, default.lm + 0.01 * losses.load_balancing + 0.001 * losses.router_z)
    single = small_model("asr", "MLP")(batch)
    assert single.total == single.lm  # its router has no choice


@pytest.mark.parametrize("window", ["clip", "30s"])
def test_batch_equals_its_clips_one_by_one(window):
    model, items = small_model(audio_window=window).eval(), small_batch()
    batch = collate(items)
    for modality, value in (("audio", 5.0), ("video", 200)):  # what stands in the padding is nobody's business
        for row, length in zip(batch[modality], batch[f"{modality}_lengths"]):
            row[length:] = value
    features, counts, _ = model.project(batch)
    losses, lm, words = model(batch), 0, 0
    logits, experts = ({modality: [] for modality in features} for _ in range(2))
    for i, item in enumerate(items):
        alone = collate([item])
        one, count, decisions = model.project(alone)
        for modality in features:
            assert counts[modality][i] == count[modality][0] == len(one[modality])
            close(features[modality].split(counts[modality].tolist())[i], one[modality], rtol=0, atol=1e-4)
            logits[modality].append(decisions.by_modality[modality].logits)
            experts[modality].append(decisions.by_modality[modality].experts)
        text = [*model.tokenizer(item["text"], add_special_tokens=False).input_ids, model.tokenizer.eos_token_id]
        predicted = model.llm(inputs_embeds=model.embed(alone, alone["texts"])[0]).logits[0, -len(text) - 1 : -1]
        lm, words = lm + F.cross_entropy(predicted, torch.tensor(text), reduction="sum"), words + len(text)
    close(losses.lm, lm / words, rtol=0, atol=1e-4)
    balance = sum(load_balancing_loss(torch.cat(logits[m]), torch.cat(experts[m])) for m in features)
    close(losses.load_balancing, balance, atol=1e-4)
    close(losses.router_z, sum(router_z_loss(torch.cat(logits[m])) for m in features), atol=1e-4)
    for beams in (1, 3):
        alone = [model.generate(collate([item]), beams, max_new_tokens=6)[0] for item in items]
        assert model.generate(batch, beams, max_new_tokens=6) == alone
    assert len(set(alone)) > 1


# --- modes, places and precision ---------------------------------------------------------------------------------


def test_generate_leaves_the_model_as_it_was():
    model, batch = small_model(), collate(small_batch())
    before = {name: x.clone() for name, x in model.state_dict().items()}
    expected = model.eval().generate(batch, 2, max_new_tokens=5)
    assert not model.training
    assert model.train().generate(batch, 2, max_new_tokens=5) == expected
    with pytest.raises(InputError, match="^1, 2: too short for video pooling by 2"):
        model.generate(collate(small_batch(seconds=[0.4, 0.04, 0.04])))
    assert model.training and model.video_encoder.training  # after a fault, too
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())  # BatchNorm's statistics, too


def test_frozen_parts_stay_in_eval_mode():
    model, batch = small_model(), collate(small_batch())
    for part in (model.audio_encoder, model.video_encoder):
        part.requires_grad_(False)
    model.eval().train()
    assert model.training and model.llm.training and model.projector.training
    assert not any(m.training for part in (model.audio_encoder, model.video_encoder) for m in part.modules())
    model(batch).total.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    """Frozen matrices are in bf16 there; the losses stay close. The batch may have been moved as a whole."""
    model, batch = small_model().eval(), collate(small_batch())
    model.video_encoder.requires_grad_(False)
    expected = model(batch).total
    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    close(model.cuda()(moved).total.cpu(), expected, rtol=0.05)
    assert model.video_encoder.proj.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.cpu().parameters())


def test_bf16(monkeypatch):
    """As on a GPU: frozen matrices and the arithmetic are in bf16; the router, and what is trained, are not."""
    model, batch = small_model(), collate(small_batch())
    exact = model(batch).total
    for part in (model.audio_encoder, model.video_encoder, model.llm):
        part.requires_grad_(False)
    add_lora(model.llm, rank=2)
    for p in model.parameters():
        if p.ndim > 1 and not p.requires_grad:
            p.data = p.data.bfloat16()
    monkeypatch.setattr(LlamaSMoP, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    losses = model(batch)
    losses.total.backward()
    close(losses.total, exact, rtol=0.05)
    assert {x.dtype for x in losses} == {torch.float32}
    assert {r.logits.dtype for r in model.project(batch)[2].by_modality.values()} == {torch.float32}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} and all(p.grad.isfinite().all() for p in trained)
    assert model.generate_ids(batch, 2, max_new_tokens=4).shape[0] == 3


# --- any Whisper, any Llama --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mels, vocab", [(80, 51864), (80, 51865), (128, 51866)])  # .en, the others, large-v3
def test_any_whisper(tmp_path, mels, vocab):
    whisper = write_whisper(tmp_path, vocab_size=vocab, num_mel_bins=mels)
    encoder = load_whisper(tmp_path)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    clips = [item["audio"] for item in small_batch("asr", seconds=(1.0, 0.3, 2.2))]
    extractor = WhisperFeatureExtractor(feature_size=mels)
    expected = extractor([x.numpy() for x in clips], sampling_rate=16000, return_tensors="pt").input_features
    padded = nn.utils.rnn.pad_sequence(clips, batch_first=True)
    with torch.autocast("cpu", torch.bfloat16):  # makes no difference
        mel = log_mel(F.pad(padded, (0, 480_000 - padded.shape[1])), mel_filters(encoder))
    close(mel, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        close(encode(encoder, mel[:1]), whisper.model.encoder(expected[:1]).last_hidden_state, atol=1e-4)
    whisper.model.encoder.save_pretrained(tmp_path / "only")
    only = load_whisper(tmp_path / "only")
    assert all(torch.equal(a, b) for a, b in zip(only.parameters(), encoder.parameters(), strict=True))


def test_what_is_no_whisper_is_refused(tmp_path):
    write_llama(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(WHISPER | {"model_type": "whisper", "decoder_attention_heads": 2}))
    with pytest.raises(InputError, match="not a Whisper encoder, it lacks .* more"):
        load_whisper(tmp_path)


TOKENIZERS = {
    "no pad": lambda folder: write_tokenizer(folder, unk_token="<unk>", bos_token="<s>", eos_token="</s>"),
    "no bos": lambda folder: write_tokenizer(folder, unk_token="<unk>", eos_token="</s>"),
    "pad is eos": lambda folder: write_tokenizer(folder, bos_token="<s>", eos_token="</s>", pad_token="</s>"),
    "pad is unk": lambda folder: write_tokenizer(folder, unk_token="<unk>", eos_token="</s>", pad_token="<unk>"),
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
    llm = write_llama(tmp_path / "llm", vocab_size=rows, tie_word_embeddings=tied)
    model = LlamaSMoP("asr", tmp_path / "llm", WHISPER, audio_window="clip", prompt="at").eval()
    model.save(tmp_path / "run")
    texts = "lay blue", "a now", "at"
    batch = collate(small_batch("asr", texts=texts))
    for one in (model, LlamaSMoP.load(tmp_path / "run")):
        ends = one.llm.get_input_embeddings().weight, one.llm.get_output_embeddings().weight
        assert (ends[0] is ends[1]) == tied and len(ends[0]) == max(rows, len(plain) + 5)
        if not spare:
            assert torch.equal(ends[0][:rows], llm.get_input_embeddings().weight)
        assert one.tokenizer.convert_tokens_to_ids(["<pad>", *MARKERS]) == list(range(len(plain), len(plain) + 5))
        close(one(batch).total, model(batch).total)
    begin = [] if plain.bos_token_id is None else [plain.bos_token_id]
    prompt = plain("at", add_special_tokens=False).input_ids
    ids, labels = model.token_ids({"audio": torch.tensor([2])}, texts[:1])
    text = [*plain(texts[0], add_special_tokens=False).input_ids, plain.eos_token_id]
    assert ids[0].tolist() == [*begin, len(plain) + 1, -1, -1, len(plain) + 2, *prompt, *text]
    assert model.count_tokens(texts[:1]).tolist() == [len(text)] == (labels != -100).sum(1).tolist()
    mask, items = model.embed(batch, texts)[1], small_batch("asr", texts=texts)
    assert mask.sum(1).tolist() == [model.embed(collate([item]), [item["text"]])[0].shape[1] for item in items]
    alone = [model.generate(collate([item]), max_new_tokens=5)[0] for item in items]
    assert model.generate(batch, max_new_tokens=5) == alone  # neither EOS nor <unk> is taken for padding


def test_decoding_is_ours_whatever_the_checkpoint_prefers(tmp_path):
    write_tokenizer(tmp_path)
    torch.manual_seed(3)
    write_llama(tmp_path)
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


def test_lora_is_on_queries_and_values():
    llm = add_lora(LlamaForCausalLM(LlamaConfig(**LLM | {"hidden_size": 64, "vocab_size": 8})))
    x = torch.randn(3, 64)
    for layer in (llm.model.layers[0].self_attn.q_proj, llm.model.layers[0].self_attn.v_proj):
        a, b = layer.lora_A["default"].weight, nn.init.normal_(layer.lora_B["default"].weight)
        assert a.shape == (2, 64)  # a 32nd of the width
        close(layer(x), layer.base_layer(x) + 0.125 * x @ a.T @ b.T)
    trained = [name for name, p in llm.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all("lora_" in name for name in trained)


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task, projector", [("asr", "MLP"), ("vsr", "DEDR"), *zip(["avsr"] * 4, PROJECTORS)])
def test_save_and_load(tmp_path, task, projector):
    model, batch = small_model(task, projector), collate(small_batch(task))
    model(batch).total.backward()  # changes BatchNorm's statistics
    model.eval().save(tmp_path)
    loaded = LlamaSMoP.load(tmp_path)
    assert not loaded.training
    for a, b in zip(model(batch), loaded(batch)):
        close(a, b)
    assert model.generate(batch, max_new_tokens=5) == loaded.generate(batch, max_new_tokens=5)
    saved = load_file(tmp_path / "model.safetensors")
    saved = {name.removeprefix("projector."): x for name, x in saved.items() if name.startswith("projector.")}
    config, experts = ("DEDR", 1) if projector == "MLP" else (projector, 4)
    bare = MultimodalSMoP(dict.fromkeys(model.modalities, 32), 32, config, num_experts=experts, top_k=min(experts, 2))
    bare.load_state_dict(saved)  # the same names, each tensor once


def test_trained_video_encoder_serves_another_run(tmp_path, monkeypatch):
    first, batch = small_model("vsr"), collate(small_batch("avsr"))
    first(batch)
    first.save(tmp_path / "vsr")
    monkeypatch.chdir(tmp_path)
    second = LlamaSMoP("avsr", LLM, WHISPER, "vsr", first.tokenizer, audio_window="clip")
    second.save("avsr")
    monkeypatch.chdir("/")
    third = LlamaSMoP.load(tmp_path / "avsr")
    (tmp_path / "vsr").rename(tmp_path / "moved")
    fourth = LlamaSMoP.load(tmp_path / "avsr", video_encoder=tmp_path / "moved")
    for model in (second, third, fourth):
        close(model.encode_video(batch), first.eval().encode_video(batch))
        assert not any(p.requires_grad for p in model.video_encoder.parameters())
    small_model("asr").save(tmp_path / "asr")
    with pytest.raises(InputError, match="asr: a run of the task asr has no video encoder"):
        LlamaSMoP("avsr", LLM, WHISPER, tmp_path / "asr", first.tokenizer)


def test_runs_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(InputError, match="no config.json; expected a folder"):
        LlamaSMoP.load(tmp_path)
    model = small_model("asr")
    model.save(tmp_path)
    with pytest.raises(InputError, match="model.safetensors: .*gate.*weight: the model has.*the file"):
        LlamaSMoP.load(tmp_path, num_experts=3)
    with pytest.raises(InputError, match="config.json: of another version, differing in experts"):
        LlamaSMoP.load(tmp_path, experts=3)
    (tmp_path / "model.safetensors").write_bytes(b"half a copy")
    with pytest.raises(InputError, match="model.safetensors: .*header"):
        LlamaSMoP.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors: No such file"):
        LlamaSMoP.load(tmp_path)


@pytest.mark.parametrize("arguments, message", [
    ({"task": "tts"}, "task must be one of asr, vsr, avsr, got 'tts'"),
    ({"projector": "DEDJ"}, "projector must be one of MLP, DEDR, JEDR, JEJR, got 'DEDJ'"),
    ({"audio_window": "10s"}, "audio_window must be one of 30s, clip"),
    ({"llm": LLM | {"width": 3}}, "LlamaConfig has no width"),
    ({"audio_encoder": WHISPER | {"width": 3}}, "WhisperConfig has no width"),
    ({"video_encoder": AVHUBERT | {"width": 3}}, "video_encoder: .*'width'"),
    ({"video_encoder": None}, "video_encoder: a checkpoint, a run folder or"),
    ({"video_encoder": AVHUBERT | {"dim": 64}, "projector": "JEDR"}, "JEDR shares its experts: encoders must be"),
    ({"tokenizer": None}, "a random LLM needs a tokenizer: see train_tokenizer"),
])  # fmt: skip
def test_wrong_arguments_are_named(arguments, message):
    parts = {"llm": LLM, "audio_encoder": WHISPER, "video_encoder": AVHUBERT, "tokenizer": train_tokenizer(["now"])}
    with pytest.raises(InputError, match=message):
        LlamaSMoP(**parts | arguments)


def test_vocabularies_that_do_not_fit_are_refused(tmp_path):
    write_tokenizer(tmp_path / "llm", eos_token="</s>")
    write_llama(tmp_path / "llm", vocab_size=len(WORDS) - 2)
    with pytest.raises(InputError, match="llm: it knows 6 tokens, but its tokenizer .* has 8"):
        LlamaSMoP("asr", tmp_path / "llm", WHISPER)
    write_tokenizer(tmp_path / "llm", bos_token="<s>")
    with pytest.raises(InputError, match="llm: its tokenizer has no end-of-sequence token"):
        LlamaSMoP("asr", tmp_path / "llm", WHISPER)


@pytest.mark.parametrize("part", ["llm", "run"])
def test_folder_that_brings_code_is_refused(tmp_path, part, monkeypatch):
    """transformers would ask on the terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda question: "y")
    model, folder = small_model("asr"), tmp_path / part
    model.save(tmp_path / "run")
    write_tokenizer(tmp_path / "llm", eos_token="</s>")
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


# --- transcripts -------------------------------------------------------------------------------------------------

HARD = ["well… no", "m²", "don’t", "ﬁne", "ＡＢＣ", "5 ℃", "क़िला", "ok 👩‍👧", "co\xadop", "a\u200bb"]
HARD += [unicodedata.normalize(form, word) for form in ("NFC", "NFD") for word in ("café", "각", "tiếng Việt")]
HARD += ["lay " * 2000 + "z"]  # sentencepiece skips long sentences


def test_tokenizer_gives_back_every_character(tmp_path):
    tokenizer = train_tokenizer([*HARD, "lay\tblue\xa0at\u3000a  now\n"], vocab_size=30)
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, load_tokenizer(tmp_path)):
        for text in HARD:
            assert one.decode(one(text, add_special_tokens=False).input_ids, skip_special_tokens=True) == text
        ids = one(" lay\tblue\xa0at\u3000a  now\x1c\n", add_special_tokens=False).input_ids
        assert one.decode(ids) == "lay blue at a now"
        assert one.decode(one("lay ξ blue", add_special_tokens=False).input_ids) == "lay <unk> blue"  # not nothing
    with pytest.raises(InputError, match="the transcripts hold '▅', which no sentencepiece model can learn"):
        train_tokenizer(["a ▅"])


def test_transcripts_that_a_tokenizer_alters_are_found(tmp_path):
    model = small_model("asr")
    altered = {
        "lay blue": False, "lay \t blue": False, "lay ξ blue": False, "ξ": False,  # valid and test may have new letters
        "a </s> b": True, "a<pad>": True, "<audio>": True, "ξ <s>": True, "<unk>": True, "a▁b": True, "ξ▁b": True,
    }  # fmt: skip
    assert find_altered(model.tokenizer, list(altered)).tolist() == list(altered.values())
    byte_level_tokenizer(tmp_path)  # knows every byte
    assert not find_altered(load_tokenizer(tmp_path), HARD).any()
    assert find_altered(load_tokenizer(tmp_path), ["ok", "a<|end|>"]).tolist() == [False, True]


def test_clips_that_do_not_fit_the_model_are_all_named():
    model = small_model(audio_pool=30, video_pool=20)
    lengths, texts = (9, 19, 20, 751, 20), ("now", "now", "lay " * 300, "now", "now </s>")
    clips = [Clip(f"clip{i}", None, frames, text) for i, (frames, text) in enumerate(zip(lengths, texts))]
    with pytest.raises(InputError) as error:
        check_clips(model, clips)
    assert str(error.value) == (
        "clip0: too short for audio pooling by 30; clip0: too short for video pooling by 20; clip1: too short for video "
        "pooling by 20; clip3: longer than Whisper's 30 s; clip2: a transcript of more than 256 tokens; clip4: a "
        "transcript that the tokenizer alters, or with a token like </s>"
    )
    check_clips(model, [Clip("fits", None, 750, "now")])
    with pytest.raises(InputError, match="clip19: .*; and 5 more$"):
        check_clips(model, [Clip(f"clip{i}", None, 19, "now") for i in range(25)])
    model.llm.config.max_position_embeddings = 60
    with pytest.raises(InputError, match="clip3: more tokens than the LLM's 60 positions"):
        check_clips(model, clips[3:4])


def test_a_clip_of_over_30_s_is_refused_by_the_model_itself():
    long = {"id": "long", "text": "now", "audio": torch.zeros(480_640)}
    with pytest.raises(InputError, match="long: longer than Whisper's 30 s"):
        small_model("asr")(collate([long]))
