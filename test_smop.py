import json, os
from pathlib import Path
import numpy as np, pytest, torch
from model import *
SHARED = Path(__file__).resolve().parent.parent/"shared"
GOLDEN = SHARED/"golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="")

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The golden whole model: its LLM and Whisper as folders of transformers, its AV-HuBERT as a fairseq file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    folder = tmp_path_factory.mktemp("tiny")
    info = json.loads((GOLDEN / "llama_smop_tiny/model.json").read_text())
    weights = load_file(GOLDEN / "llama_smop_tiny/weights.safetensors")
    ids = {v: k for k, v in info["token_ids"].items()}
    vocab = {f"w{i}": i for i in range(62)} | {ids[62]: 62, ids[63]: 63}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=ids[62], eos_token=ids[63]).save_pretrained(folder / "llm")
    llm = LlamaForCausalLM(LlamaConfig(**info["llama"] | {"vocab_size": 64,"pad_token_id":None}))
    llm.save_pretrained(folder / "llm")
    config=WhisperConfig(**info["whisper"])
    enc=WhisperEncoder(config)
    enc.load_state_dict({k.removeprefix("audio_encoder."):v for k,v in weights.items() if k.startswith("audio_encoder.")})
    enc.save_pretrained(folder/"whisper"); WhisperFeatureExtractor().save_pretrained(folder/"whisper")
    model = LlamaSMoP("avsr", folder/"llm", folder/"whisper", GOLDEN/"avhubert-tiny.pt", projector="JEJR", num_experts=4, top_k=2, dim_hidden=96, lora_rank=4, lora_scale=.25, prompt=info["prompt"])
    own=dict(model.named_parameters())
    names = {}
    for k,v in weights.items():
        if k.startswith("audio_encoder."): continue
        n=k.replace("audiovisual_proj.","projector.smops.audio.")
        for w in "QV":
            n=n.replace(f"lora_down_{w}.weight",f"{w.lower()}_proj.lora_A.default.weight").replace(f"lora_up_{w}.weight",f"{w.lower()}_proj.lora_B.default.weight")
        if n not in own and n.endswith(("q_proj.weight","v_proj.weight")): n=n.replace("_proj.weight","_proj.base_layer.weight")
        own[n].data.copy_(v); names[k]=n
    rest=[n for n in own if n not in names.values() and not n.startswith(("audio_encoder","video_encoder"))]
    assert not rest, rest
    return model, info, np.load(GOLDEN/"llama_smop_tiny/cases.npz"), names

def golden_batch(case, info, cases):
    from data import transform_audio
    spec=info["cases"][case]
    T=lambda n: torch.from_numpy(cases[f"{case}.{n}"])
    return {"ids":[case]*len(spec["texts"]),"texts":spec["texts"],"audio":T("audio")[...,0],"audio_lengths":torch.tensor([T("audio").shape[1]]*len(spec["texts"])),"video":T("video").transpose(1,2),"video_lengths":torch.tensor([T("video").shape[1]]*len(spec["texts"]))}

@needs_golden
@pytest.mark.parametrize("case",["b1","b2","short","round58"])
def test_whole(case,tiny):
    model, info, cases, names = tiny
    model.eval()
    batch=golden_batch(case,info,cases)
    T=lambda n: torch.from_numpy(cases[f"{case}.{n}"])
    emb,mask,labels,routing=model.embed(batch,batch["texts"])
    print((emb-T("embeddings")).abs().max())
    assert torch.equal(labels[:,1:],T("labels")[:,1:])
    logits=model.llm(inputs_embeds=emb,attention_mask=mask).logits
    print((logits-T("logits")).abs().max())
    model.zero_grad()
    l=model(batch)
    print(l.lm-T("lm_loss"), l.load_balancing-T("load_balancing_loss"),l.router_z-T("z_loss"),l.total-T("total_loss"))
    l.total.backward()
    own=dict(model.named_parameters())
    n=0
    for k in cases.files:
        if k.startswith(case+".grad."):
            g=own[names[k[len(case)+6:]]].grad; n+=1
            assert torch.allclose(g,torch.from_numpy(cases[k]),rtol=1e-3,atol=1e-5),(k,(g-torch.from_numpy(cases[k])).abs().max())
    print(n)
    if case != "b2":
        emb,mask,_,_=model.embed(batch)
        print((emb-T("test_embeddings")).abs().max())
        for beams,key in ((1,"greedy"),(4,"beam")):
            want=model.tokenizer.batch_decode(T("decoded_"+key),skip_special_tokens=True)
            got=model.generate(batch,num_beams=beams,max_new_tokens=8)
            print(got,want)
            assert got==want
