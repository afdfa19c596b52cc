"""The clips of a raw corpus, with their splits and transcripts. tools/README.md shows the layouts.

Nothing is lost in silence. A video without a transcript, or a listed clip without a video, is a failure. What belongs
to no split is counted and named. With manifests, only what they list is looked at.
"""

import mimetypes
import os
import re
import zlib
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from data import read_lines, read_manifest
from tools.errors import InputError

VIDEO = {".mp4", ".mov", ".mkv", ".avi", ".mpg", ".webm", ".m4v"}
# What a corpus calls a split: what we call it.
SPLIT_OF = {"train": "train", "valid": "valid", "val": "valid", "test": "test", "others": "others"}
SILENCE = ("sil", "sp")  # in the alignments of GRID
GRAMMAR = [  # of GRID: the name of a clip has one letter for each of its six words
    {word[0]: word for word in "bin lay place set".split()},
    {word[0]: word for word in "blue green red white".split()},
    {word[0]: word for word in "at by in with".split()},
    {letter: letter for letter in "abcdefghijklmnopqrstuvxyz"},
    dict(zip("z123456789", "zero one two three four five six seven eight nine".split())),
    {word[0]: word for word in "again now please soon".split()},
]


class Corpus(NamedTuple):
    clips: list  # (split, id, path, text)
    failures: list  # (split, id, reason)
    skipped: list  # a sentence for each reason


def find_clips(raw, grid=False, talkers=(), others=(), valid_list=None):
    """The Corpus in the folder `raw`. GRID: `talkers` (default: all) are in train, valid and test; those of `others` are
    kept out of training, in a split of that name. `valid_list` divides the trainval/ of LRS3."""
    if not raw.is_dir():
        raise InputError(f"{raw}: no such folder")
    if (talkers or others) and not grid:
        raise InputError("--talkers and --others are only for --grid")
    if valid_list and not (raw / "trainval").is_dir():
        raise InputError(f"--valid-list divides trainval/, which {raw} lacks")
    if not grid and any((raw / f"{name}.csv").is_file() for name in SPLIT_OF):
        corpus = read_manifests(raw)
    else:
        folders = os.walk(raw, followlinks=True)
        files = sorted(Path(folder, name) for folder, _, names in folders for name in names if name[0] != ".")
        corpus = sort_files(files, Grid(raw, files, talkers, others) if grid else Folders(raw, valid_list))
    if not corpus.clips:
        reasons = [*corpus.skipped, *(reason for *_, reason in corpus.failures)]
        raise InputError("; ".join([f"{raw}: no clip with a transcript in a layout of tools/README.md", *reasons[:3]]))
    for talker in (*talkers, *others):
        if not any(name.startswith(f"{talker}/") for _, name, *_ in corpus.clips):
            raise InputError(f"{raw}: no clip of talker {talker}")
    return corpus


def read_manifests(raw):
    corpus, others = Corpus([], [], []), []
    for path in sorted(raw.glob("*.csv")):
        if path.stem in SPLIT_OF:
            rows = read_manifest(path)
            corpus.clips.extend((SPLIT_OF[path.stem], clip.id, clip.path, normalise(clip.text)) for clip in rows)
        else:
            others.append(path)
    if others:
        corpus.skipped.append(say_skipped("named for no split", others))
    return corpus


def sort_files(files, layout):
    """The Corpus of these files. layout.place(path) is (split, id), or (None, why it is skipped)."""
    clips, failures, seen, skipped = [], [], {}, defaultdict(list)
    for path in (path for path in files if path.suffix.lower() in VIDEO):
        split, name = layout.place(path)
        if split is None:
            skipped[name].append(path)
            continue
        try:
            if (split, name) in seen:
                raise InputError(f"{path}: {seen[split, name]} has the same id")
            seen[split, name] = path
            clips.append((split, name, path, layout.read_text(path, name)))
        except InputError as error:
            failures.append((split, name, str(error)))
    missing = [(split, name) for name, split in layout.listed.items() if (split, name) not in seen]
    failures += [(*clip, "a list names it, but it has no video") for clip in missing]

    stems = {path.with_suffix("") for path in files if path.suffix.lower() in VIDEO}
    for path in files:  # x.wav beside x.mp4 is its sound
        kind = mimetypes.guess_type(path.name)[0] or ""
        if kind.startswith(("audio/", "video/")) and path.with_suffix("") not in stems:
            skipped["of sound without a video, or of an unknown kind"].append(path)
    return Corpus(clips, failures, [say_skipped(reason, paths) for reason, paths in skipped.items()])


def say_skipped(reason, paths):
    return f"skipped {len(paths)} files {reason}: {', '.join(map(str, paths[:3]))}{', ...' * (len(paths) > 3)}"


def draw_split(key, valid, test):
    """The split that a checksum of `key` decides, so that no list is needed. `valid` and `test` are per cent."""
    place = zlib.crc32(key.encode()) % 100
    return "valid" if place < valid else "test" if place < valid + test else "train"


class Folders:
    """SPLIT/.../x.mp4 with x.txt beside it, as in LRS3; LRS2 has lists of the clips (ID/NUMBER) of each split."""

    def __init__(self, raw, valid_list):
        self.raw, self.valid_list = raw, valid_list
        lists = {raw / f"{name}.txt": split for name, split in SPLIT_OF.items() if (raw / f"{name}.txt").is_file()}
        self.has_lists = bool(lists)
        if valid_list:
            lists[valid_list] = "valid"
        self.listed = {name: split for path, split in lists.items() for name in read_list(path)}

    def place(self, path):
        top, *folders = path.relative_to(self.raw).with_suffix("").parts
        name = "/".join(folders)
        if top == "pretrain":
            return None, "in pretrain/"
        if self.has_lists:
            return (self.listed[name], name) if name in self.listed else (None, "that no list names")
        if top == "trainval" and folders:
            split = self.listed.get(name, "train") if self.valid_list else draw_split(folders[0], 4, 0)
            return split, name
        if top in SPLIT_OF and folders:
            return SPLIT_OF[top], name
        return None, "outside train/, valid/ or val/, test/, others/ and trainval/"

    def read_text(self, path, name):
        path = path.with_suffix(".txt")
        if not path.is_file():
            raise InputError(f"{path}: no such transcript")
        lines = read_lines(path)
        if lines and lines[0].startswith("Text:"):  # LRS: the lines below say when each word is spoken
            lines = [lines[0].removeprefix("Text:")]
        text = normalise(" ".join(lines))
        if not text:
            raise InputError(f"{path}: empty transcript")
        return text


class Grid:
    """s1/.../bbaf2n.mpg. Its words are in a bbaf2n.align below a folder s1; without one, its name spells them."""

    listed = {}

    def __init__(self, raw, files, talkers, others):
        self.raw, self.talkers, self.others = raw, talkers, others
        self.alignments = {self.name(path): path for path in files if path.suffix.lower() == ".align"}

    def name(self, path):
        *folders, stem = path.relative_to(self.raw).with_suffix("").parts
        talker = next((folder.lower() for folder in folders if re.fullmatch(r"[sS]\d+", folder)), None)
        return talker and f"{talker}/{stem.lower()}"

    def place(self, path):
        name = self.name(path)
        if name is None:
            return None, "outside the folders s1, s2, ... of the talkers"
        talker = name.partition("/")[0]
        if talker in self.others:
            return "others", name
        if self.talkers and talker not in self.talkers:
            return None, "of other talkers"
        return draw_split(name, 5, 10), name

    def read_text(self, path, name):
        if name in self.alignments:
            path = self.alignments[name]
            rows = [line.split() for line in read_lines(path)]
            words = [row[2].lower() for row in rows if len(row) == 3 and row[2] not in SILENCE]
            if not words or any(len(row) != 3 for row in rows):
                raise InputError(f"{path}: not an alignment of GRID, a START END WORD in each line")
            return " ".join(words)
        letters = name.rpartition("/")[2]
        if len(letters) != 6 or any(letter not in words for letter, words in zip(letters, GRAMMAR)):
            raise InputError(f"{path}: neither an alignment nor a name such as bbaf2n, which spells the sentence")
        return " ".join(words[letter] for letter, words in zip(letters, GRAMMAR))


def read_list(path):
    """The clips of a list, as SPEAKER/NUMBER: LRS2 adds MV or NF behind it, AV-HuBERT's list trainval/ before it."""
    if not path.is_file():
        raise InputError(f"{path}: no such list")
    return ["/".join(line.split()[0].split("/")[-2:]) for line in read_lines(path)]


def normalise(text):
    """Lower case, and one space for white space of any kind: LRS writes upper case, people write both."""
    return " ".join(text.lower().split())
