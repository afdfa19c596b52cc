"""Folders that several test files read, made once."""

import pytest
from common import write_published

import synthetic
from tools import prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Twelve synthetic clips as real files with manifests, as prepare.py writes them."""
    folder = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 12), ("valid", 3), ("test", 4)):
        rows = ["id,path,frames,text"]
        for i, (name, frames, text) in enumerate(synthetic.corpus(split)[:count]):
            text = " ".join(text.split()[: 1 + i % 4])  # batches differ in their numbers of tokens
            prepare.write_video(folder / f"{name}.mp4", synthetic.render(name, "video"))
            prepare.write_audio(folder / f"{name}.wav", synthetic.render(name, "audio"))
            rows.append(f"{name},{name}.mp4,{frames},{text}")
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def theirs(tmp_path_factory):
    """The authors' tiny checkpoint and its parts, see write_published."""
    folder = tmp_path_factory.mktemp("published")
    write_published(folder)
    return folder
