"""Which of T5's tokens belong to the words of a subject."""

import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dynaip_jax.errors import UserError
from dynaip_jax.families.plain_tokenizer import PlainTokenizer
from dynaip_jax.families.tokenizers import Tokenizers, check_tokenizer
from dynaip_jax.shapeland import default

ROOT = Path(__file__).parents[2]
PIECES = ("▁A", "▁a", "▁and", "▁red", "▁star", "s", ",", "▁", "n", "d")


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer of T5's kind, whose tokens reach over the space before a word, of 12 rows."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), *((piece, -2.0) for piece in PIECES)]
    tokenizer = Tokenizer(models.Unigram(vocab, 2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return Tokenizers(fast, None, 12)


def rows(weights):
    for row in weights:
        own = row[row > 0]
        np.testing.assert_allclose(own, 1 / len(own))
    return [np.flatnonzero(row).tolist() for row in weights]


def test_rows_are_those_of_the_words(pieces):
    prompt = "A red star, a star and a  RED\nstars"  # tokens: A red star , a star and a ...
    assert rows(pieces.words(prompt, ["red star"])) == [[1, 2]]
    assert rows(pieces.words(prompt, ["Star", "star"])) == [[2], [5]]
    assert rows(pieces.words(prompt, ["star", "red star", "a"])) == [[5], [1, 2], [0]]
    assert pieces.words(prompt, []).shape == (0, 12)


def test_bytes_have_a_row_each_and_the_space_none(tiny):
    tokenizers = Tokenizers.load(tiny[0] / "tokenizers", 16)
    assert rows(tokenizers.words("a ré  d", ["RÉ d"])) == [[2, 3, 4, 7]]


TEXTS = ["a ré  d\n", "", " ".join("abcdefghijkl"), "a</s>b<pad> <unk>\u2603", "  A  "]


def plain(tmp_path, **special):
    """A folder of words and letters, its tokenizer as tokenizers writes it."""
    words = {token: n for n, token in enumerate(["<pad>", "</s>", "<unk>", *"abcdefgr"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Split("", "isolated")
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast", **special))
    )
    return tmp_path


def test_a_tokenizer_of_no_model_is_what_transformers_makes_of_it(tiny, tmp_path):
    """Its words for special tokens too, wherever they stand."""
    own = plain(tmp_path, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    for folder in (tiny[0] / "tokenizers" / "t5", default.paths()[0] / "tokenizers" / "clip", own):
        found, usual = check_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        assert isinstance(found, PlainTokenizer)
        padded = dict(padding="max_length", max_length=6, truncation=True)
        for options in (padded, {}, dict(add_special_tokens=False), dict(return_offsets_mapping=True), padded):
            assert found(TEXTS, **options)["input_ids"] == usual(TEXTS, **options)["input_ids"]
            for text in TEXTS:
                mine, theirs = found(text, **options), usual(text, **options)
                assert all(mine[name] == theirs[name] for name in mine)
        assert found.unk_token_id == usual.unk_token_id
        assert found.num_special_tokens_to_add() == usual.num_special_tokens_to_add()
        ids = found(TEXTS[0])["input_ids"]
        assert found.decode(ids) == usual.decode(ids)
        assert pickle.loads(pickle.dumps(found))(TEXTS) == found(TEXTS)


def test_what_is_beyond_a_plain_tokenizer_is_left_to_transformers(tmp_path):
    folder = plain(tmp_path, pad_token="<pad>", model_max_length=4)
    assert not isinstance(check_tokenizer(folder), PlainTokenizer)
    plain(tmp_path, pad_token="<pad>")
    assert isinstance(check_tokenizer(folder), PlainTokenizer)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert not isinstance(check_tokenizer(folder), PlainTokenizer)


def test_a_tokenizer_that_names_no_padding_is_refused(tmp_path):
    with pytest.raises(UserError, match="it names no token to pad with"):
        check_tokenizer(plain(tmp_path, unk_token="<unk>"))


@pytest.mark.parametrize(
    "which, name, left_out", [("tiny", "t5", "transformers"), ("tiny2", "qwen3", "transformers.models.auto")]
)
def test_no_more_is_imported_than_a_tokenizer_needs(which, name, left_out, request):
    code = (
        "import sys, pathlib; from dynaip_jax.families.tokenizers import check_tokenizer as read; read(pathlib.Path(sys.argv[1])); "
        "sys.exit(bool({'torch', sys.argv[2]} & {*sys.modules}))"
    )
    folder = request.getfixturevalue(which)[0] / "tokenizers" / name
    assert subprocess.run([sys.executable, "-c", code, folder, left_out], cwd=ROOT).returncode == 0


def test_words_that_are_not_there_are_refused(pieces, tiny):
    for prompt, phrases, message in (
        ("a red star", ["blue"], "'blue' are not in the prompt; expected"),
        ("a red stars", ["star"], "'star' are not in the prompt"),
        ("a red star", [" "], "' ' are not in the prompt"),
        ("a red star", ["red star", "star"], r"'star' stand in the prompt 1 time\(s\), all taken"),
        ("red " * 10 + "a star", ["star"], "'star' lie beyond the 12 tokens that T5 takes; shorten"),
    ):
        with pytest.raises(UserError, match=message):
            pieces.words(prompt, phrases)
    rows(pieces.words("red " * 10 + "star", ["star"]))  # the last row before </s>


def test_a_tokenizer_without_positions_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="does not say where its tokens stand.*`masks`"):
        Tokenizers(Slow(), None, 12).words("a star", ["star"])


def test_words_without_a_token_are_named(pieces, tiny):
    tokenizers = Tokenizers(pieces._tokenizers["T5"][0], pieces._tokenizers["T5"][0], 12)
    assert tokenizers.unknown("a red star and stars") == {}
    assert tokenizers.unknown("a red cat, a cat \U0001f31f on a sofa") == dict.fromkeys(
        ("T5", "CLIP"), ["cat", "\U0001f31f", "on", "sofa"]
    )
    assert Tokenizers.load(tiny[0] / "tokenizers", 16).unknown("any \U0001f31f byte") == {}

    class Slow:
        is_fast, unk_token_id = False, 2

        def tokenize(self, text):
            return [f"\u2581{word}" for word in text.split()]

        def convert_tokens_to_ids(self, tokens):
            return [2 if "cat" in token else 5 for token in tokens]

    assert Tokenizers(Slow(), Slow(), 12).unknown("a cat")["T5"] == ["cat"]


@pytest.fixture
def own(tiny, tmp_path):
    """A copy of the tiny bundle's tokenizers."""
    shutil.copytree(tiny[0] / "tokenizers", tmp_path / "own")
    return tmp_path / "own"


def test_a_tokenizer_that_wants_code_of_its_own_is_refused(own):
    (own / "t5" / "code.py").write_text(f"open({str(own / 'sprung')!r}, 'w')\nclass Trap: pass\n")
    for file in ("tokenizer_config.json", "config.json"):
        config = dict(
            tokenizer_class="PreTrainedTokenizerFast", auto_map=dict(AutoTokenizer=["code.Trap", "code.Trap"])
        )
        (own / "t5" / file).write_text(json.dumps(config))
        with pytest.raises(UserError, match=f"t5/{file}: asks for code of its own .auto_map., which is never run"):
            Tokenizers.load(own, 16)
        (own / "t5" / file).unlink()
    assert not (own / "sprung").exists()


@pytest.mark.parametrize("kind", ["MistralCommonBackend", "os.system", 3, ["T5Tokenizer"]])
def test_tokenizers_of_other_kinds_are_refused(own, kind):
    (own / "clip" / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class=kind)))
    with pytest.raises(
        UserError, match="clip/tokenizer_config.json: tokenizer_class .*; expected one of T5Tokenizer, CLIPTokenizer"
    ):
        Tokenizers.load(own, 16)


def test_a_tokenizer_without_a_token_for_what_it_does_not_know_is_refused(own):
    file = own / "t5" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"] |= dict(vocab=dict(a=2), merges=[])
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"t5: not a tokenizer that transformers can read .Unk token `<unk>` not found"):
        Tokenizers.load(own, 16)


def test_tokenizers_that_cannot_be_used_are_one_line(own):
    """Without a padding token; with a `tokenizer.json` that makes the library panic or complain."""
    config = json.loads((own / "t5" / "tokenizer_config.json").read_text())
    (own / "t5" / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token"}))
    with pytest.raises(UserError, match="t5: not a tokenizer that transformers can read"):
        Tokenizers.load(own, 16)
    for content in ("{}", "[" * 9999, json.dumps(dict(model=dict(type="BPE", vocab={"a": -1}, merges=[["a", "b"]])))):
        (own / "clip" / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="not a tokenizer that transformers can read|not readable") as e:
            check_tokenizer(own / "clip")
        assert "\n" not in str(e.value)


def test_threads_share_tokenizers(pieces):
    """A fast tokenizer pads and cuts as its last caller said, whichever thread that was."""
    tokenizers = pickle.loads(pickle.dumps(Tokenizers(*2 * (pieces._tokenizers["T5"][0],), 12)))
    expected = tokenizers.t5(["a star"]).tolist()
    with ThreadPoolExecutor(2) as pool:
        asking = pool.submit(lambda: [tokenizers.cut("a red star and " * 9)["T5"] for _ in range(2000)])
        while not asking.done():
            assert tokenizers.t5(["a star"]).tolist() == expected
        assert len(set(asking.result())) == 1
