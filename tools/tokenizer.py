"""Tokenizers: of a pretrained LLM, and one trained on transcripts for an LLM from scratch."""

import tempfile

import sentencepiece
from tokenizers import Regex, normalizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from tools.errors import InputError


def load_tokenizer(source):
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False, clean_up_tokenization_spaces=False)


def train_tokenizer(texts, vocab_size=1000):
    """A tokenizer of transformers around a sentencepiece BPE model trained on transcripts, with at most `vocab_size`
    pieces (fewer where the texts have fewer, more where they have more characters).

    It gives the texts back character by character, white space of any kind as one space. Other characters are <unk>.
    """
    words, characters = " ".join(texts).split(), set("".join(texts))
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words),
            model_prefix=f"{folder}/tokenizer",
            model_type="bpe",
            vocab_size=max(vocab_size, len(characters) + 4),
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",  # the default would rewrite "m²" and "…", and other spellings of "é"
            minloglevel=2,
        )
        backend = LlamaTokenizer.from_pretrained(folder).backend_tokenizer
    backend.model.unk_token = "<unk>"  # without it, characters outside the vocabulary vanish
    spaces = normalizers.Replace(Regex(r"[\s\x1c-\x1f]+"), " ")  # as str.split
    backend.normalizer = normalizers.Sequence([spaces, normalizers.Strip()])
    lost = sorted(set("".join(words)) - backend.get_vocab().keys())
    if lost:
        raise InputError(f"the transcripts hold {', '.join(map(repr, lost))}, which no sentencepiece model can learn")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
