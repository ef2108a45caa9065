"""A small corpus of real text and its tokenizer, made from what every machine has.

The text is the Python standard library's own source code; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import tempfile
from pathlib import Path

from launcher.model import KitError

#: Matches torchtitan's ``debugmodel`` flavor, whose embedding has this many rows.
VOCABULARY_SIZE = 2048
#: Characters of source text kept; about 1.2 million tokens.
CORPUS_CHARACTERS = 4_000_000
#: Characters per sample, so that data can be split finely between ranks.
SAMPLE_CHARACTERS = 4_000


def build(folder: Path) -> bool:
    """Write ``corpus/train.jsonl`` and ``tokenizer/`` under ``folder``; idempotent.

    Returns:
        True when something was built, False when it was all there already.

    Raises:
        KitError: there is too little source text to learn from, or no tokenizer library.
    """
    corpus = folder / "corpus" / "train.jsonl"
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    if corpus.is_file() and tokenizer.is_file():
        return False
    samples = _samples()
    corpus.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(corpus, "".join(json.dumps({"text": text}) + "\n" for text in samples))
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "add_bos_token": True}
    _write_atomically(tokenizer.parent / "tokenizer_config.json", json.dumps(config, indent=2))
    _write_atomically(tokenizer, _train_tokenizer(samples))
    return True


def _samples() -> list[str]:
    library = Path(sysconfig.get_path("stdlib"))
    text: list[str] = []
    total = 0
    for path in sorted(library.glob("*.py")) + sorted(library.glob("*/*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        text.append(source)
        total += len(source)
        if total >= CORPUS_CHARACTERS:
            break
    if total < CORPUS_CHARACTERS // 10:
        raise KitError(
            f"only {total} characters of Python source under {library}: too little to train on; "
            "install the full standard library (python3 and libpython3-stdlib)"
        )
    whole = "".join(text)
    pieces = [
        whole[start : start + SAMPLE_CHARACTERS]
        for start in range(0, len(whole), SAMPLE_CHARACTERS)
    ]
    # A fixed shuffle, so that each rank's share is a mix and not one module's text.
    return sorted(pieces, key=lambda piece: hashlib.sha256(piece.encode()).digest())


def _train_tokenizer(samples: list[str]) -> str:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise KitError(f"{error}: run `make setup` first") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(samples, trainer)
    return str(tokenizer.to_str())


def _write_atomically(path: Path, content: str) -> None:
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
