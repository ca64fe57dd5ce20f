"""Translation and language modelling: files, tokens, losses and metrics."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from nmconvert.errors import DataError, ModelError, UsageError
from nmconvert.tasks import Batch, build_task, misfits_named
from nmconvert.tasks.language_model import LanguageModel
from nmconvert.tasks.text import IGNORED, encode, read_lines, read_text
from nmconvert.tasks.translation import Translation, greedy

tokenizers = pytest.importorskip("tokenizers")

TEXT = "The quick brown fox jumps over the lazy dög.\n" * 20
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "one", "two", "three", "eins", "zwei", "drei"]


class Bigram(nn.Module):
    """logits = a table of the last token."""

    def __init__(self, size: int = 256) -> None:
        super().__init__()
        self.vocab_size = size
        self.table = nn.Embedding(size, size)

    def forward(self, ids):
        return self.table(ids)


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(WORDS[:3])
    made.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    (tmp_path / "val.en").write_text("one two\nthree\ntwo two one\n")
    (tmp_path / "val.de").write_text("eins zwei\ndrei\nzwei zwei eins\n")
    return str(tmp_path)


# --- language modelling ---------------------------------------------------------------------------------------------


def whole(task: LanguageModel, data: Path, split="test", size=3):
    return DataLoader(task.dataset(str(data), split=split, augment=False), size, collate_fn=task.collate)


@pytest.mark.parametrize("block", [7, 64, 10_000])
def test_every_token_but_the_first_is_predicted_once(tmp_path, block):
    (tmp_path / "a.txt").write_text(TEXT)
    batches = [*whole(LanguageModel(block=block), tmp_path / "a.txt")]
    wanted = torch.cat([b.targets["labels"][b.targets["labels"] >= 0] for b in batches])
    assert bytes(wanted.tolist()) == TEXT.encode()[1:]
    assert sum(b.size for b in batches) == sum(b.targets["bytes"] for b in batches) == len(TEXT.encode()) - 1


def test_perplexity_is_that_of_the_formula(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    task, model = LanguageModel(block=50), Bigram().double()
    ids = torch.tensor(list(TEXT.encode()))
    loss = F.cross_entropy(model(ids[:-1]), ids[1:]).item()
    result = task.evaluate(task.predictor(model), whole(task, tmp_path / "a.txt"))
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-5)


def test_bits_per_byte_counts_bytes_not_tokens(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one  two\nthree ünknown two\n" * 5)
    task = LanguageModel(tokenizer=tokenizer, block=4)
    batches = [*whole(task, tmp_path / "a.txt")]
    assert sum(b.size for b in batches) == 24
    assert sum(b.targets["bytes"] for b in batches) == len(("one  two\nthree ünknown two\n" * 5).encode()) - 3 - 1


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r"), max_size=300))
def test_bytes_are_the_default_tokens(text):
    ids, ends = encode(text, None)
    assert bytes(ids.tolist()) == text.encode()
    assert ends.tolist() == [*range(1, len(ids) + 1)]


def test_long_texts_are_tokenised_in_pieces(tmp_path, tokenizer):
    text = "one two three\n" * 20_000
    ids, ends = encode(text, tokenizer)
    assert ids.tolist() == [4, 5, 6] * 20_000
    assert ends[-1] == len(text) - 1
    assert (np.diff(ends) > 0).all()


def test_one_piece_is_split_at_its_end(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(100)))
    task = LanguageModel(block=8)
    parts = {s: [x for b in whole(task, tmp_path / "a.txt", s) for x in b.inputs.flatten().tolist()] for s in ("train", "val")}
    assert max(parts["train"]) < 90 <= min(x for x in parts["val"] if x)


def test_training_blocks_start_anywhere_but_the_same_for_the_same_seed(tmp_path):
    (tmp_path / "train.txt").write_text(TEXT)
    data = LanguageModel(block=16).dataset(str(tmp_path), split="train", augment=True)
    data.set_epoch(1, seed=5)
    first = [LanguageModel(block=16).collate([data[i]]).inputs.tolist() for i in range(len(data))]
    assert [LanguageModel(block=16).collate([data[i]]).inputs.tolist() for i in range(len(data))] == first
    data.set_epoch(2, seed=5)
    assert [LanguageModel(block=16).collate([data[i]]).inputs.tolist() for i in range(len(data))] != first
    assert all(len(row[0]) == 16 for row in first[:-2])


def test_documents_are_blocks_of_their_own(tmp_path):
    np.savez(tmp_path / "a.npz", ids=np.arange(12, dtype=np.int16), lengths=np.array([5, 1, 6]))
    batch = next(iter(whole(LanguageModel(block=4), tmp_path / "a.npz")))
    assert batch.inputs.tolist() == [[0, 1, 2], [6, 7, 8]]
    assert batch.targets["labels"].tolist() == [[1, 2, 3], [7, 8, 9]]
    result = LanguageModel(block=4).evaluate(lambda ids: torch.zeros(*ids.shape, 16), [batch])
    assert result == pytest.approx({"perplexity": 16, "loss": math.log(16)})


def test_distillation_of_equals_is_nothing(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    task, model = LanguageModel(block=50), Bigram()
    batch = next(iter(whole(task, tmp_path / "a.txt")))
    assert task.distill(model, model, batch).abs() < 1e-6
    assert task.distill(model, Bigram(), batch) > 0.1
    assert task.loss(model, batch) > 0


def test_distillation_counts_positions_that_have_a_label():
    ids, labels = torch.randint(0, 5, (2, 3)), torch.tensor([[1, 2, IGNORED], [3, IGNORED, IGNORED]])
    model, teacher = Bigram(5), Bigram(5)
    p, q = teacher(ids).softmax(-1), model(ids).softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    found = LanguageModel(temperature=1.0).distill(model, teacher, Batch(ids, {"labels": labels}, 3))
    assert torch.allclose(found, each[labels != IGNORED].mean(), atol=1e-6)


def test_hugging_face_causal_models(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "a.txt").write_text(TEXT)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=256, bos_token_id=0, eos_token_id=0)
    ).eval()
    task = LanguageModel(block=32)
    batch = next(iter(whole(task, tmp_path / "a.txt")))
    assert torch.allclose(task.loss(model, batch), model(batch.inputs, labels=None).logits.flatten(0, 1).log_softmax(-1).gather(
        1, batch.targets["labels"].flatten()[:, None]).neg().mean())  # fmt: skip


def test_tokens_beyond_the_model_are_said(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    task = LanguageModel(block=32)
    with pytest.raises(DataError, match="out of range: the model knows 100"):
        task.loss(Bigram(100), next(iter(whole(task, tmp_path / "a.txt"))))


def test_text_that_is_none_is_said(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff bad")
    (tmp_path / "empty.txt").write_text("")
    np.savez(tmp_path / "images.npz", images=np.zeros(3))
    cases = {"a.txt": "no UTF-8 text: byte 5 is 0xff", "empty.txt": "no text", "images.npz": "no array 'ids'", "x": "text file"}
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            LanguageModel().dataset(str(tmp_path / name), split="test", augment=False)


def test_documents_in_one_piece_are_held_out(tmp_path):
    np.savez(tmp_path / "a.npz", ids=np.repeat(np.arange(20), 3), lengths=np.full(20, 3))
    parts = {
        split: {int(x) for batch in whole(LanguageModel(), tmp_path / "a.npz", split) for x in batch.inputs.unique()}
        for split in ("train", "val", "test")
    }
    assert parts["val"] == {9, 19}
    assert parts["train"] == parts["test"] - parts["val"] == {*range(20)} - {9, 19}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.arange(12), "lengths": np.array([5, 5])}, "'lengths' add up to 10, but there are 12 'ids'"),
        ({"ids": np.arange(12), "lengths": np.array([14, -2])}, "'lengths' holds -2; it counts from 0"),
        ({"ids": np.arange(12) - 5}, "'ids' holds -5"),
        ({"ids": np.arange(12) + 0.5}, "'ids' is float64; whole numbers are needed"),
        ({"ids": np.arange(12), "lengths": np.array([12.0])}, "'lengths' is float64"),
    ],
)
def test_ids_and_lengths_that_are_none_are_said(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=rf"a\.npz: {message}"):
        LanguageModel().dataset(str(tmp_path / "a.npz"), split="test", augment=False)


def test_what_a_tokenizer_was_last_used_with_is_not_done_to_texts(tmp_path, tokenizer):
    text, plain = "one two three\n" * 50, tokenizers.Tokenizer.from_file(tokenizer)
    plain.enable_truncation(5)
    plain.save(str(tmp_path / "cuts.json"))
    plain.no_truncation()
    plain.enable_padding(length=1000)
    plain.save(str(tmp_path / "pads.json"))
    for name in ("cuts.json", "pads.json"):
        ids, ends = encode(text, str(tmp_path / name))
        assert ids.tolist() == [4, 5, 6] * 50
        assert (np.diff(ends) > 0).all()


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("ab\r\nc\n", encoding="utf-8-sig", newline="")
    assert read_text(tmp_path / "a.txt") == "ab\nc\n"
    assert read_lines(tmp_path / "a.txt") == ["ab", "c"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\xff")
    with pytest.raises(DataError, match="byte 4 is 0xff"):
        read_text(tmp_path / "a.txt")


class Placed(Bigram):
    """As `Bigram`, with places for so many tokens."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = nn.Embedding(places, 256)

    def forward(self, ids):
        return self.table(ids) + self.places(torch.arange(ids.shape[1]))


def test_a_block_that_is_longer_than_the_model_reads_is_said(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    task, model = LanguageModel(block=64), Placed(32)
    with (
        pytest.raises(ModelError, match=r"IndexError.*longer than it reads \(--task-arg block=N cuts it\)"),
        misfits_named(model, task.misfit),
    ):
        task.evaluate(task.predictor(model), whole(task, tmp_path / "a.txt"))
    with pytest.raises(ModelError, match=r"--task-arg block=N or max_length=N cuts"), misfits_named(model):
        model(next(iter(whole(task, tmp_path / "a.txt"))).inputs)  # without a task, as when it is calibrated


# --- translation ----------------------------------------------------------------------------------------------------


class Dictionary(nn.Module):
    """Translates word by word: 4 → 7, 5 → 8, 6 → 9; logits and generate agree."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(20.0))

    def table(self, ids):
        return torch.where(ids >= 4, ids + 3, ids)

    def forward(self, input_ids, attention_mask, labels=None, decoder_input_ids=None):
        length = (labels if labels is not None else decoder_input_ids).shape[1]
        source = F.pad(self.table(input_ids), (0, max(length - input_ids.shape[1], 0)), value=2)[:, :length]
        return F.one_hot(source, len(WORDS)).float() * self.sharpness


class Generating(Dictionary):
    def generate(self, input_ids, attention_mask, max_new_tokens):
        assert max_new_tokens == 6
        return F.pad(self.table(input_ids), (1, 0), value=1)


@pytest.mark.parametrize("model", [Dictionary(), Generating()])
def test_a_dictionary_translates_perfectly(pairs, tokenizer, model):
    task = Translation(tokenizer=tokenizer, max_length=6)
    loader = DataLoader(task.dataset(pairs, split="val", augment=False), 2, collate_fn=task.collate)
    batch = next(iter(loader))
    assert batch.inputs["input_ids"].tolist() == [[4, 5, 2], [6, 2, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.targets["labels"].tolist() == [[7, 8, 2], [9, 2, -100]]
    assert batch.size == 5
    assert task.predictor(model)(batch.inputs) == ["eins zwei", "drei"]
    assert task.evaluate(task.predictor(model), loader)["chrf"] == pytest.approx(100)


def test_metrics_are_sacrebleus(pairs, tokenizer):
    sacrebleu = pytest.importorskip("sacrebleu")
    task = Translation(tokenizer=tokenizer)
    said = ["the cat sat on the mat today", "drei", "zwei zwei eins"]
    references = ["the cat sat on the mat", "drei", "zwei eins zwei"]
    batch = task.collate([("one", reference) for reference in references])
    result = task.evaluate(lambda _: said, [batch])
    assert result["bleu"] == sacrebleu.corpus_bleu(said, [references]).score
    assert result["chrf"] == sacrebleu.corpus_chrf(said, [references]).score
    assert 0 < result["bleu"] < 100


def test_greedy_stops_at_the_end_and_at_the_limit(pairs, tokenizer):
    task = Translation(tokenizer=tokenizer)
    inputs = task.collate([("one two three", None)]).inputs
    assert greedy(Dictionary(), inputs, 1, 2, 50).tolist() == [[1, 7, 8, 9, 2]]
    assert greedy(Dictionary(), inputs, 1, 2, 2).tolist() == [[1, 7, 8]]


def test_loss_and_distillation(pairs, tokenizer):
    task = Translation(tokenizer=tokenizer, label_smoothing=0.0)
    batch = task.collate([*task.dataset(pairs, split="val", augment=False)])
    model, blunt = Dictionary(), Dictionary()
    blunt.sharpness.data.fill_(1.0)
    assert task.loss(model, batch) < 1e-4 < task.loss(blunt, batch)
    assert task.distill(model, model, batch).abs() < 1e-6
    assert task.distill(blunt, model, batch) > 0.1


def test_without_translations_the_teachers_own_are_the_goal(pairs, tokenizer):
    Path(pairs, "val.de").unlink()
    task = Translation(tokenizer=tokenizer)
    batch = task.collate([*task.dataset(pairs, split="val", augment=False)])
    assert not batch.labelled
    taught = task.taught(Dictionary(), batch)
    assert taught.targets["labels"].tolist() == [[7, 8, 2, -100], [9, 2, -100, -100], [8, 8, 7, 2]]
    assert taught.targets["references"] == ["eins zwei", "drei", "zwei zwei eins"]
    assert task.evaluate(task.predictor(Dictionary()), [taught])["chrf"] == pytest.approx(100)
    blunt = Dictionary()
    blunt.sharpness.data.fill_(1.0)
    assert task.distill(blunt, Dictionary(), batch) > 0.1
    with pytest.raises(DataError, match="no labels"):
        task.loss(blunt, batch)


def test_hugging_face_encoder_decoders(pairs, tokenizer):
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=10, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=2,
    )  # fmt: skip
    task, model = Translation(tokenizer=tokenizer, max_length=6), transformers.BartForConditionalGeneration(config).eval()
    loader = DataLoader(task.dataset(pairs, split="val", augment=False), 2, collate_fn=task.collate)
    assert task.loss(model, next(iter(loader))) > 0
    assert set(task.evaluate(task.predictor(model), loader)) == {"bleu", "chrf"}


def test_pairs_that_do_not_fit_are_said(pairs, tokenizer):
    task = Translation(tokenizer=tokenizer)
    Path(pairs, "val.de").write_text("eins\n")
    with pytest.raises(DataError, match=r"val\.en has 3 lines, .*val\.de 1"):
        task.dataset(pairs, split="val", augment=False)
    with pytest.raises(DataError, match="source=… and target=…"):
        Translation(source="fr").dataset(pairs, split="val", augment=False)


def test_the_tokenizer_is_asked_for_and_taken_from_the_models_folder(pairs, tokenizer, tmp_path):
    with pytest.raises(UsageError, match="--task-arg tokenizer="):
        Translation().collate([("one", "eins")])
    with pytest.raises(UsageError, match="no such tokenizer"):
        Translation(tokenizer=str(tmp_path / "no.json")).collate([("one", "eins")])
    assert build_task("translation", {}, folder=tmp_path).collate([("one", "eins")]).inputs["input_ids"].tolist() == [[4, 2]]
    assert build_task("language_model", {"tokenizer": ""}, folder=tmp_path) == LanguageModel()


def test_a_tokenizer_without_an_end_is_said(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<pad>": 1}, unk_token="a"))
    made.save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match="no end token"):
        Translation(tokenizer=str(tmp_path / "t.json")).collate([("a", "a")])
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        Translation(tokenizer=str(tmp_path / "bad.json")).collate([("a", "a")])


def test_a_line_ends_where_its_file_says(pairs):
    Path(pairs, "val.en").write_bytes("one\u2028 two\r\nthree\x85\r\ntwo\x0b two one".encode())
    samples = [*Translation().dataset(pairs, split="val", augment=False)]
    assert samples == [("one\u2028 two", "eins zwei"), ("three\x85", "drei"), ("two\x0b two one", "zwei zwei eins")]


def test_blank_lines_are_left_out_and_said(pairs):
    Path(pairs, "val.en").write_text("one two\n\ntwo two one\n")
    Path(pairs, "val.de").write_text("eins zwei\ndrei\n   \n")
    with pytest.warns(UserWarning, match=r"val\.en: 2 of 3 lines are left out"):
        assert [*Translation().dataset(pairs, split="val", augment=False)] == [("one two", "eins zwei")]


def test_beams_that_a_model_has_not_are_said(pairs, tokenizer):
    task = Translation(tokenizer=tokenizer, beams=4)
    batch = task.collate([*task.dataset(pairs, split="val", augment=False)])
    with pytest.raises(UsageError, match="beams=4: the generate of Generating has no num_beams"):
        task.predictor(Generating())(batch.inputs)
