"""Random models of a few thousand parameters, saved as transformers and sentence-transformers save theirs."""

import json

WORDS = [
    "apple",
    "pear",
    "plum",
    "tree",
    "river",
    "sea",
    "boat",
    "stone",
    "fire",
    "snow",
    "who",
    "what",
    "query",
    "passage",
]


def save_tokenizer(folder, limit=64):
    from transformers import BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", *WORDS, *(f"w{i}" for i in range(100))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(
        vocab={word: number for number, word in enumerate(vocabulary)}, model_max_length=limit, do_lower_case=True
    )
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def save_encoder(folder, *, pooling="mean", normalize=True, seed=0, limit=64):
    """A sentence encoder with vectors of 32 numbers; `pooling` None leaves its sentence-transformers files out."""
    from transformers import BertConfig, BertModel

    folder.mkdir()
    BertModel(_settings(BertConfig, save_tokenizer(folder, limit), seed, limit)).save_pretrained(folder)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        names = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}
        modes = {name: kind == pooling for kind, name in names.items()}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32} | modes))
        kinds = ["Transformer", "Pooling"] + ["Normalize"] * normalize
        modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
        (folder / "modules.json").write_text(json.dumps(modules))
    return str(folder)


def save_cross_encoder(folder, *, outputs=1, seed=0):
    from transformers import BertConfig, BertForSequenceClassification

    folder.mkdir()
    config = _settings(BertConfig, save_tokenizer(folder), seed, 64, num_labels=outputs)
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def _settings(kind, words, seed, limit, **more):
    import torch

    torch.manual_seed(seed)
    # Weights this large make the vectors of different texts differ by more than rounding.
    return kind(
        vocab_size=words,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=limit,
        initializer_range=0.4,
        **more,
    )
